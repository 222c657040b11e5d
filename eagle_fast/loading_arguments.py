"""What the options of `commands/loading.py` say, as arguments of `EaModel.from_pretrained`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from eagle_fast.commands.loading import OPTIONS
from eagle_fast.loading_options import UnknownOption
from eagle_fast.model import EaModel
from eagle_fast.pairs import SMOLLM2, smollm2_head, smollm2_target

DEMO = "smollm2"
WORDS = {"head_revision": "ea_revision"}  # of from_pretrained, where they are others
APART = ("model", "head", "tree", "load")


def load_pair(args: argparse.Namespace) -> EaModel:
    """The pair that the arguments name, the demo's if they name none. Raises ValueError."""
    options = loading_options(args)
    with as_written():
        return EaModel.from_pretrained(**options)


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of from_pretrained. Of the demo's pair a folder is made, if there is none."""
    model, head = getattr(args, "model", None), getattr(args, "head", None)
    is_demo = model in (None, DEMO)
    if model is None and head is not None:
        raise ValueError("--head is about a model: name it with --model")
    if not is_demo and head is None:
        raise ValueError("--model needs a draft head: name it with --head, or train one with `eagle-fast train`")
    nodes, depth, top_k = args.tree
    found = {"device_map": "auto", "total_token": nodes, "depth": depth, "top_k": top_k} | given(args)
    if is_demo and "dtype" not in found:  # its file is in float32
        on_cpu = found["device_map"] == "cpu" or not torch.cuda.is_available()
        found["dtype"] = torch.float32 if on_cpu else torch.bfloat16
    found["base_model_path"] = target_path(args)
    found["ea_model_path"] = str(smollm2_head()) if head is None else head
    return found


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Option of from_pretrained -> value, of all that was given, but paths and the tree. Raises ValueError."""
    values = {name: getattr(args, name, None) for name in OPTIONS if name not in APART}
    found = {WORDS.get(name, name): value for name, value in values.items() if value is not None}
    for name in READ.keys() & found.keys():
        found[name] = READ[name](found[name])
    more = dict(_assignment(each) for each in getattr(args, "load", []))
    own = {WORDS.get(name, name) for name in values} | {"base_model_path", "ea_model_path", "total_token", "depth"}
    for name in more:
        if name in own | {"top_k"}:
            raise ValueError(f"--load {name}=...: there is an option for it, see --help")
    return found | more


def target_path(args: argparse.Namespace) -> str:
    """Name or folder of the target. That of the demo is made, if there is none."""
    return str(smollm2_target()) if getattr(args, "model", None) in (None, DEMO) else args.model


def name_of(args: argparse.Namespace) -> str:
    """What the target is called."""
    return SMOLLM2 if getattr(args, "model", None) in (None, DEMO) else args.model


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


def memory_of(listed: str) -> dict[int | str, int | str]:
    """What "70GiB,60GiB" says: {0: "70GiB", 1: "60GiB"}, and nothing on the CPU."""
    return {index: size.strip() for index, size in enumerate(listed.split(","))}


def dtype_of(name: str) -> torch.dtype:
    """The dtype that is called so. Raises ValueError for what is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {name}: use bfloat16, float16 or float32")
    return dtype


def ranks_of(text: str) -> bool | int | list[str]:
    """What --tensor-parallel says: a number of GPUs, which, "all", or "off", whatever --device-map is."""
    words = {"all": True, "off": False}
    if text.strip() in words:
        return words[text.strip()]
    return int(text) if text.strip().isdigit() else [each.strip() for each in text.split(",")]


READ: dict[str, Callable[[str], Any]] = {
    "device_map": device_map, "max_memory": memory_of, "dtype": dtype_of, "tensor_parallel": ranks_of,
}  # fmt: skip


@contextmanager
def as_written() -> Iterator[None]:
    """Around loading: its errors, with the names that arguments have on the command line; bars on a terminal alone."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    except UnknownOption as error:
        raise ValueError(f"--load: {error}") from error
    except ValueError as error:
        message = str(error).replace("base_model_path=", "--model ").replace("ea_model_path=", "--head ")
        raise ValueError(message) from error


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"--load {text}: write NAME=VALUE, as load_in_4bit=true")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name.strip().replace("-", "_"), parsed
