"""Options of commands that load a pair, or a part of one: those of `EaModel.from_pretrained`, under the same names."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from eagle_fast.config import TreeConfig
from eagle_fast.pairs import SMOLLM2

TREE = TreeConfig()
SWITCH = {"action": argparse.BooleanOptionalAction, "default": None}
FLAG = {"action": "store_true", "default": None}
# name of the argument -> how argparse takes it; None where it is not given, and then from_pretrained decides
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "NAME", "help": "the target: hub name or folder; smollm2 for that of `eagle-fast demo`"},
    "head": {"metavar": "NAME", "help": "its draft head: hub name or folder"},
    "device_map": {"metavar": "MAP", "help": '"auto" (default), "balanced", "balanced_low_0", "sequential", a device '
        'as "cuda:1" or "cpu", or {"module": device, ...} as JSON'},
    "max_memory": {"metavar": "LIST", "help": 'of each GPU, as "70GiB,70GiB"; default: what is free'},
    "tensor_parallel": {"metavar": "N", "help": 'cut every layer over N GPUs, "all", or over "cuda:2,cuda:3", in place '
        'of --device-map; "off": not even a model that no GPU holds'},
    "draft_device": {"metavar": "DEVICE", "help": "of the head; default: where the lm_head is"},
    "dtype": {"help": "bfloat16, float16 or float32; default: the checkpoint's"},
    "target_bits": {"type": int, "choices": (4, 8), "help": "round the target's layers to so many bits"},
    "lm_head_bits": {"type": int, "choices": (8,), "help": "the same of lm_head and embedding"},
    "draft_int8": {**SWITCH, "help": "the head in int8; default: on a GPU in 16 bits"},
    "adaptive": {**SWITCH, "help": "choose the tree of each round; default: where that changes no text"},
    "tree": {"nargs": 3, "type": int, "default": [TREE.total_token, TREE.depth, TREE.top_k],
        "metavar": ("NODES", "DEPTH", "TOP_K"), "help": "most that a tree may be (default %(default)s)"},
    "revision": {"help": "of the model on the hub"},
    "head_revision": {"metavar": "REVISION", "help": "of the head on the hub"},
    "cache_dir": {"metavar": "FOLDER", "help": "of what comes from the hub"},
    "local_files_only": {**FLAG, "help": "ask no hub"},
    "trust_remote_code": {**FLAG, "help": "run code that comes with the model"},
    "attn_implementation": {"metavar": "NAME", "help": "of the stock model, as transformers takes it"},
    "load": {"metavar": "NAME=VALUE", "action": "append", "default": [],
        "help": "any other option of EaModel.from_pretrained, the value as JSON or text; may be repeated"},
}  # fmt: skip
PAIR = tuple(OPTIONS)
OF_HUB = ("revision", "head_revision", "cache_dir", "local_files_only")
OF_HEAD = ("head", "tensor_parallel", "draft_device", "draft_int8", "adaptive", "tree", "head_revision")
TARGET = tuple(name for name in OPTIONS if name not in (*OF_HEAD, "max_memory"))  # on one device, without a head
ALIASES = {"device_map": ("--device",)}


def add_loading_arguments(
    parser: argparse.ArgumentParser,
    names: Collection[str] = PAIR,
    *,
    title: str = "the pair, and how it is loaded",
    required: Collection[str] = (),
    **more: str,
) -> None:
    """Those of these names. more: what this command adds to the help of one of them."""
    group = parser.add_argument_group(title)
    for name in OPTIONS:
        if name in names:
            settings = OPTIONS[name] | {"required": name in required}
            settings["help"] += more.get(name, "")
            group.add_argument(f"--{name.replace('_', '-')}", *ALIASES.get(name, ()), dest=name, **settings)


DEMO_PAIR = {"model": f" (default: {SMOLLM2}, as in `eagle-fast demo`)"}
