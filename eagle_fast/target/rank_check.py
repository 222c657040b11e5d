"""A target over ranks before it is used: held against itself, bit for bit, as `bits` does with one on one device.

P nodes of a path, L layers, n ranks. There is no stock model to hold it against: its weights are cut as they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eagle_fast.target.differing import differs
from eagle_fast.target.exactness import BITWISE, ROUNDING, UNMEASURED, Exactness
from eagle_fast.target.paths import Run, forwards, runs
from eagle_fast.target.rank_files import CutModel
from eagle_fast.target.ranked import RankedTarget
from eagle_fast.target.rehearsal import PROMPT


def ranked_target(
    model: PreTrainedModel, cut: CutModel, feature_layers: tuple[int, ...], draft_device: torch.device, num_nodes: int
) -> RankedTarget:
    """A `RankedTarget` whose exactness is known. ValueError for a head that is not beside rank 0."""
    target = RankedTarget(model, *cut, feature_layers)
    if draft_device != target.device:
        raise ValueError(
            f"the draft head is on {draft_device}: with tensor_parallel it lies on the first GPU, {target.device}"
        )
    with torch.no_grad(), target.turn.lock, target.turn():
        target.exactness = measured(target, num_nodes)
        target.check()
    return target


def measured(target: Any, num_nodes: int) -> Exactness:
    """See `bits.measured`: the path's keys and values on all ranks, what the head reads, and the logits."""
    cache = target.new_cache(1, 64)
    ids = 5 + torch.arange(PROMPT, device=target.device) * 37 % (min(target.vocab_size, 1000) - 5)
    positions: list[int] = []
    try:
        target.prefill(ids[None], 0, cache)
        for plainly, among_others in runs(target, cache.slab, 0, num_nodes):
            positions.append(plainly.lengths[plainly.own])
            expected = _bits(target, plainly)
            for run in among_others:
                found = _first_difference(expected, _bits(target, run))
                if found is not None:
                    return Exactness(ROUNDING, _name(found, target), _reason(_name(found, target), run))
    except torch.OutOfMemoryError:
        return UNMEASURED
    where = " and ".join(map(str, dict.fromkeys(positions)))
    return Exactness(
        BITWISE,
        reason=f"at positions from {where} on, in trees and in a batch, all layers of {len(target.ranks)} ranks and "
        "the logits gave a row the bits that they give it alone",
    )


def _bits(target: Any, run: Run) -> list[list[Tensor]]:
    """Of each layer keys and values of the path on every rank; at the end features and logits."""
    path, slab, count = list(run.form.path), run.cache.slab, target.anatomy.num_layers
    said = []
    for tokens, step in forwards(target, run):
        logits, features = target.verify(tokens, step, run.cache)
        said.append((logits.clone(), features))  # the next verify writes over them
    keys, values = slab.keys, slab.values
    found: list[list[Tensor]] = []
    for layer in range(count):
        held = [each[layer + rank * count] for rank in range(len(target.ranks)) for each in (keys, values)]
        found.append([each[run.own, :, run.rows].to(target.device) for each in held])
    logits, features = (torch.cat(each, 1)[run.own, path] for each in zip(*said, strict=True))
    return [*found, [features, logits]]


def _first_difference(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> int | None:
    flags = [
        torch.stack([differs(a, b) for a, b in zip(*pair, strict=True)]).any()
        for pair in zip(ours, theirs, strict=True)
    ]
    found = torch.stack(flags).tolist()
    return found.index(True) if True in found else None


def _name(found: int, target: Any) -> str:
    """Keys differ where the layer before gave other bits, or the layer's own product of them."""
    return f"layer {found}" if found < target.anatomy.num_layers else "the end of the last layer"


def _reason(module: str, run: Run) -> str:
    return (
        f"{module} gives a row other bits in {run.where} than alone, at position {run.lengths[run.own]}: texts may "
        "part where the two best scores are about a rounding apart"
    )
