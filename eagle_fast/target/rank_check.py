"""A target over ranks before it is used: held against itself, bit for bit, as `bits` does with one on one device.

P nodes of a path, L layers, n ranks. There is no stock model to hold it against: its weights are cut as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.target.bits import Bits, held_together
from eagle_fast.target.exactness import Exactness
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
    return held_together(
        _runs(target, num_nodes),
        lambda run: _bits(target, run),
        lambda place, *_: _name(place, target),
        f"all layers of {len(target.ranks)} ranks and the logits",
    )


def _runs(target: Any, num_nodes: int) -> Iterator[tuple[Run, list[Run]]]:
    """Behind a prompt of its own."""
    cache = target.new_cache(1, 64)
    ids = 5 + torch.arange(PROMPT, device=target.device) * 37 % (min(target.vocab_size, 1000) - 5)
    target.prefill(ids[None], 0, cache)
    yield from runs(target, cache.slab, 0, num_nodes)


def _bits(target: Any, run: Run) -> Bits:
    """Of each layer keys and values of the path on every rank; at the end features and logits."""
    path, slab, count = list(run.form.path), run.cache.slab, target.anatomy.num_layers
    said = []
    for tokens, step in forwards(target, run):
        logits, features = target.verify(tokens, step, run.cache)
        said.append((logits.clone(), features))  # the next verify writes over them
    keys, values = slab.keys, slab.values
    found: Bits = []
    for layer in range(count):
        held = [each[layer + rank * count] for rank in range(len(target.ranks)) for each in (keys, values)]
        found.append(tuple(each[run.own, :, run.rows].to(target.device) for each in held))
    logits, features = (torch.cat(each, 1)[run.own, path] for each in zip(*said, strict=True))
    return [*found, (features, logits)]


def _name(found: int, target: Any) -> str:
    """Keys differ where the layer before gave other bits, or the layer's own product of them."""
    return f"layer {found}" if found < target.anatomy.num_layers else "the end of the last layer"
