"""Decoders over ranks, all on the CPU unless told otherwise, and what they are held against: the same on one device."""

from __future__ import annotations

import copy
import tempfile
from typing import NamedTuple

import torch
from decoders import TREE
from often_right import write_often_right_head

from eagle_fast import EaModel

WIDE = {  # 8 heads with 2 key heads, and 4 with 1
    "hidden_size": 768,
    "intermediate_size": 1536,
    "head_dim": 64,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
}


class Pair(NamedTuple):
    """One target and head, loaded twice."""

    single: EaModel
    ranked: EaModel


def folders(model, folder, writer=write_often_right_head, **options):
    """Keywords of from_pretrained for a CPU model and a head for it, saved in a folder."""
    model.save_pretrained(f"{folder}/target")
    writer(copy.deepcopy(model), f"{folder}/head", **options)
    return {"base_model_path": f"{folder}/target", "ea_model_path": f"{folder}/head"}


def both(model, ranks=("cpu", "cpu"), single="cpu", writer=write_often_right_head, **options) -> Pair:
    """A CPU model on one device and over ranks. options: of from_pretrained, `TREE` where they say nothing."""
    options = {**TREE, **options}
    with tempfile.TemporaryDirectory() as folder:
        paths = folders(model, folder, writer)
        alone = EaModel.from_pretrained(**paths, device_map=single, **options)
        return Pair(alone, EaModel.from_pretrained(**paths, tensor_parallel=list(ranks), **options))


def prompts(batch: int, device="cpu") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of prompts of several lengths, padded in front."""
    lengths = [19, 5, 11][:batch]
    ids, mask = torch.zeros(batch, 19, dtype=torch.long), torch.zeros(batch, 19, dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        ids[row, 19 - length :] = torch.randint(3, 130, (length,), generator=generator)
        mask[row, 19 - length :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def graphs_of(model):
    """Of each rank, of every step of the idle states that was captured."""
    steps = [step for _, steps, _ in model.states.idle for step in steps.of_trees.values() if step.graph is not None]
    return [[step.graph, *step.others] for step in steps]
