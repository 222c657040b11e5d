"""Small decoders, built once and shared by all tests: a model of the zoo, its often-right head, a small tree.

Tests must leave them as they are: no change of generation_config or weights (`copy.deepcopy` the base model instead).
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings

import torch
from often_right import write_often_right_head
from torch import Tensor
from zoo import make

from eagle_fast import EaModel

TREE = {"total_token": 16, "depth": 3, "top_k": 4, "adaptive": False}  # what rounds bring is the same each time


@functools.cache
def decoder(name: str, device: torch.device) -> EaModel:
    """Model `name` of the zoo with a head that is often right."""
    return with_head(make(name), device)


def with_head(model, device: torch.device, **tree) -> EaModel:
    """A decoder for a CPU model, which is moved to `device`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model caps its attention scores")
        write_often_right_head(copy.deepcopy(model), folder)
        return EaModel.from_pretrained(base_model_path=model.to(device), ea_model_path=folder, **{**TREE, **tree})


def rebuilt(ea_model: EaModel, change=lambda model: None) -> EaModel:
    """The same head on a copy of the target that `change` may alter."""
    model = copy.deepcopy(ea_model.base_model)
    change(model)
    return EaModel(model, ea_model.ea_layer, tree=ea_model.tree, adaptive=ea_model.adaptive)


def prompt(length: int, device: torch.device, seed: int = 1) -> Tensor:
    """[1, length] random tokens, none of them special."""
    return torch.randint(3, 130, (1, length), generator=torch.Generator().manual_seed(seed)).to(device)


def batch_of(lengths: list[int], device: torch.device, side: str = "left", pad: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, L] of the prompts of these lengths; row b is prompt(lengths[b], seed=b)."""
    ids = torch.full((len(lengths), max(lengths)), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(ids.shape[1] - length, None) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = prompt(length, device, row)[0], 1
    return ids, mask


def stock(ea_model: EaModel, ids: Tensor, **options) -> Tensor:
    """The base model's own `generate`, greedy unless told otherwise."""
    if "longrope" in str(getattr(ea_model.config, "rope_parameters", "")):
        options["use_cache"] = False  # stock generate drops the whole prefix where longrope switches
    return ea_model.base_model.generate(ids, **{"do_sample": False, **options})
