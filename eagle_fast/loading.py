"""Load a target and a head that fit each other."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.config import TreeConfig
from eagle_fast.head import DraftHead, read_head
from eagle_fast.head.checkpoint import check_folder
from eagle_fast.head.checks import NUMBER, plain
from eagle_fast.head.inference import Overrides
from eagle_fast.loading_options import BITSANDBYTES_OPTIONS, HEAD_OPTIONS, names_options
from eagle_fast.loading_target import (
    CONFIG_OPTIONS,
    HUB_OPTIONS,
    TOKENIZER_OPTIONS,
    known_path,
    load_target,
    load_tokenizer,
    modern_options,
)
from eagle_fast.messages import short
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.ends import device_of, dtype_of, ends, matrix, num_rows
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.sound import check_base

__all__ = [
    "BITSANDBYTES_OPTIONS",
    "CONFIG_OPTIONS",
    "HEAD_OPTIONS",
    "HUB_OPTIONS",
    "TOKENIZER_OPTIONS",
    "check_pair",
    "known_path",
    "load_head",
    "load_target",
    "load_tokenizer",
    "modern_options",
    "names_options",
    "runs_in_int8",
]


def check_pair(base_model: Any, ea_layer: Any, tree: Any, name: Any = "") -> None:
    """ValueError, or UnsupportedModel, for what is no target, no head, no tree or no name."""
    if not isinstance(name, (str, os.PathLike, type(None))):
        raise ValueError(f"name={short(name)}: give the hub name or the folder of the base model's tokenizer")
    check_base(base_model)
    if not isinstance(ea_layer, DraftHead):
        raise ValueError(f"ea_layer is a {type(ea_layer).__name__}: give a DraftHead, as from_pretrained loads one")
    if tree is not None and not isinstance(tree, TreeConfig):
        raise ValueError(f"tree={tree!r}: give a TreeConfig(total_token, depth, top_k), or None")


def check_head_arguments(path: str, threshold: Any, use_eagle3: Any, options: dict[str, Any]) -> None:
    """ValueError for what can be told of the head without its target, and before that is loaded.

    options: `HEAD_OPTIONS` and `HUB_OPTIONS`.
    """
    NUMBER.check_argument("threshold", plain(threshold))
    Overrides(use_eagle3, **{name: value for name, value in options.items() if name in HEAD_OPTIONS})
    if os.path.isdir(path):
        check_folder(path)


def load_head(
    path: str,
    base_model: PreTrainedModel,
    *,
    use_eagle3: bool | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> DraftHead:
    """The draft head for a target, by default beside the lm_head. options: `HEAD_OPTIONS` and `HUB_OPTIONS`."""
    first, lm_head = ends(base_model)
    anatomy, cut = Anatomy(base_model), cut_of(base_model)
    embedding = matrix(first) if cut is None else cut.ranks[0].embedding
    found = read_head(
        path,
        target_hidden_size=anatomy.hidden_size,
        target_vocab_size=min(num_rows(lm_head), num_rows(first)),  # what it cannot embed must not be drafted
        target_embedding=embedding,
        num_target_layers=anatomy.num_layers,
        use_eagle3=use_eagle3,
        revision=revision,
        **(options or {}),
    )
    if cut is None:
        lm_head_weight, bias, home = matrix(lm_head), getattr(lm_head, "bias", None), device_of(lm_head)
    else:
        own = found.config.own_lm_head and found.config.kind != "eagle"
        lm_head_weight, bias, home = None if own else cut.whole_lm_head(), None, cut.ranks[0].device
    return DraftHead(
        found,
        embedding=embedding,
        lm_head_weight=lm_head_weight,
        lm_head_bias=bias,
        dtype=dtype_of(lm_head),
        device=device or home,
    )


def runs_in_int8(head: DraftHead, wanted: bool | None) -> bool:
    """Whether the head's weights become int8: `wanted`, or None for where the kernels can and the head is in 16 bits.

    Raises ValueError where it is wanted and cannot be.
    """
    if not isinstance(wanted, (bool, type(None))):
        raise ValueError(f"draft_int8={short(wanted)}: use True, False or None")
    capable = head.device.type == "cuda" and torch.cuda.get_device_capability(head.device) >= (8, 0)
    able = capable and head.dtype in (torch.bfloat16, torch.float16)
    if wanted and not able:
        raise ValueError(
            f"draft_int8=True, but the head runs in {head.dtype} on {head.device}: int8 needs a GPU of compute "
            "capability 8.0 or newer and a target in bfloat16 or float16; leave draft_int8 out"
        )
    return able if wanted is None else wanted
