"""Options of commands that load a pair: those of `EaModel.from_pretrained`, under the same names."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import torch

from eagle_fast.config import TreeConfig
from eagle_fast.loading_options import UnknownOption
from eagle_fast.model import EaModel
from eagle_fast.pairs import SMOLLM2, smollm2_head, smollm2_target

DEMO = "smollm2"
# argument -> option of from_pretrained, for those that go there as they are
PLAIN = {
    "draft_device": "draft_device",
    "target_bits": "target_bits",
    "lm_head_bits": "lm_head_bits",
    "draft_int8": "draft_int8",
    "adaptive": "adaptive",
    "revision": "revision",
    "head_revision": "ea_revision",
    "cache_dir": "cache_dir",
    "local_files_only": "local_files_only",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
}


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    tree = TreeConfig()
    group = parser.add_argument_group("the pair, and how it is loaded")
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--model", metavar="NAME", help=f"the target: hub name or folder (default: {SMOLLM2}, as in `eagle-fast demo`)")
    add("--head", metavar="NAME", help="its draft head: hub name or folder")
    add("--device-map", default="auto", metavar="MAP", help='"auto" (default), "balanced", "balanced_low_0", '
        '"sequential", a device as "cuda:1" or "cpu", or {"module": device, ...} as JSON')  # fmt: skip
    add("--max-memory", metavar="LIST", help='of each GPU, as "70GiB,70GiB"; default: what is free')
    add("--tensor-parallel", metavar="GPUS", help='cut every layer over several: a number of GPUs, "all", '
        'a list as "0,1", or "off"; default: for a model that no GPU holds, where --device-map is "auto"')  # fmt: skip
    add("--draft-device", metavar="DEVICE", help="of the head; default: where the lm_head is")
    add("--dtype", help="bfloat16, float16 or float32; default: the checkpoint's")
    add("--target-bits", type=int, choices=(4, 8), help="round the target's layers to so many bits")
    add("--lm-head-bits", type=int, choices=(8,), help="the same of lm_head and embedding")
    add("--draft-int8", action=switch, help="the head in int8; default: on a GPU in 16 bits")
    add("--adaptive", action=switch, help="choose the tree of each round; default: where that changes no text")
    add("--tree", nargs=3, type=int, default=[tree.total_token, tree.depth, tree.top_k],
        metavar=("NODES", "DEPTH", "TOP_K"), help="most that a tree may be (default %(default)s)")  # fmt: skip
    add("--revision", help="of the model on the hub")
    add("--head-revision", metavar="REVISION", help="of the head on the hub")
    add("--cache-dir", metavar="FOLDER", help="of what comes from the hub")
    add("--local-files-only", action="store_true", default=None, help="ask no hub")
    add("--trust-remote-code", action="store_true", default=None, help="run code that comes with the model")
    add("--attn-implementation", metavar="NAME", help="of the stock model, as transformers takes it")
    add("--load", action="append", default=[], metavar="NAME=VALUE",
        help="any other option of EaModel.from_pretrained, the value as JSON or text; may be repeated")  # fmt: skip


def load_pair(args: argparse.Namespace) -> EaModel:
    """The pair that the arguments name, the demo's if they name none. Raises ValueError."""
    options = loading_options(args)
    try:
        return EaModel.from_pretrained(**options)
    except UnknownOption as error:
        raise ValueError(f"--load: {error}") from error
    except ValueError as error:
        raise ValueError(_as_written(str(error))) from error


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of from_pretrained. Of the demo's pair a folder is made, if there is none."""
    is_demo = args.model in (None, DEMO)
    if args.model is None and args.head is not None:
        raise ValueError("--head is about a model: name it with --model")
    if not is_demo and args.head is None:
        raise ValueError("--model needs a draft head: name it with --head, or train one with `eagle-fast train`")
    nodes, depth, top_k = args.tree
    more = dict(_assignment(each) for each in args.load)
    found = {option: getattr(args, name) for name, option in PLAIN.items() if getattr(args, name) is not None}
    found |= {"total_token": nodes, "depth": depth, "top_k": top_k, "device_map": device_map(args.device_map)}
    found |= {"max_memory": memory_of(args.max_memory)}
    if args.tensor_parallel is not None:
        found["tensor_parallel"] = ranks_of(args.tensor_parallel)
    dtype = dtype_of(args.dtype)
    if dtype is None and is_demo and "dtype" not in more:  # its file is in float32
        on_cpu = found["device_map"] == "cpu" or not torch.cuda.is_available()
        dtype = torch.float32 if on_cpu else torch.bfloat16
    if dtype is not None:
        found["dtype"] = dtype
    twice = more.keys() & (found.keys() | {"base_model_path", "ea_model_path"})
    if twice:
        name = min(twice)
        raise ValueError(f"--load {name}=...: there is an option for it, see --help")
    found["base_model_path"] = str(smollm2_target()) if is_demo else args.model
    found["ea_model_path"] = str(smollm2_head()) if args.head is None else args.head
    return found | more


def name_of(args: argparse.Namespace) -> str:
    """What the target is called."""
    return SMOLLM2 if args.model in (None, DEMO) else args.model


def device_map(text: str) -> Any:
    """What --device-map says: a strategy, a device, or a dict of modules."""
    if text.isdigit():
        return int(text)
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--device-map {text}: not JSON ({error})") from error


def ranks_of(text: str) -> bool | int | list[str]:
    """What --tensor-parallel says: "all", "off", a number of GPUs, or a list of them."""
    words = {"all": True, "off": False}
    if text in words:
        return words[text]
    if text.isdigit():
        return int(text)
    devices = [each.strip() for each in text.split(",")]
    if len(devices) < 2 or not all(devices):
        raise ValueError(f"--tensor-parallel {text}: use a number of GPUs, all, off, or a list as 0,1")
    return [f"cuda:{each}" if each.isdigit() else each for each in devices]


def memory_of(listed: str | None) -> dict[int | str, int | str] | None:
    """What "70GiB,60GiB" says: {0: "70GiB", 1: "60GiB"}, and nothing on the CPU."""
    return None if listed is None else {index: size.strip() for index, size in enumerate(listed.split(","))}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that is called so. Raises ValueError for what is none."""
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype {name}: use bfloat16, float16 or float32")
    return dtype


def _as_written(message: str) -> str:
    """An error of loading, with the names that arguments have on the command line."""
    message = message.replace("base_model_path=", "--model ").replace("ea_model_path=", "--head ")
    return re.sub(r"tensor_parallel=(?=[\[TF\d])", "--tensor-parallel ", message)


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"--load {text}: write NAME=VALUE, as load_in_4bit=true")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name.strip().replace("-", "_"), parsed
