"""What a row becomes alone and among others, bit for bit: the twin of a target held against itself.

P nodes of a path, H hidden size, Hkv key heads, D head size, V vocabulary.

`paths.py` says what is decoded: a path node by node, as plain decoding does, and the same path in trees of three forms
and in a batch, at the start of a text and deep in it. Of the path, every layer's output, its keys and values and the
logits are compared. The first difference ends it, and is traced to a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.layers.slab import KVSlab
from eagle_fast.target.differing import differs, first_differing
from eagle_fast.target.exactness import BITWISE, ROUNDING, UNMEASURED, Exactness
from eagle_fast.target.paths import Run, forwards, runs
from eagle_fast.target.rehearsal import layer_outputs
from eagle_fast.target.target import Target


class Bits(NamedTuple):
    """What a target computed of a path."""

    layers: list[tuple[Tensor, ...]]  # of each: keys and values [1, Hkv, P, D], output [P, H]
    logits: Tensor  # [P, V]


def measured(target: Target, names: Sequence[str], real: KVSlab, at: int, num_nodes: int) -> Exactness:
    """What a target is, in a turn of its own.

    names: of the layers. real, at, num_nodes: see `runs`.
    """
    positions: list[int] = []
    try:
        for plainly, among_others in runs(target, real, at, num_nodes):
            positions.append(plainly.lengths[plainly.own])
            expected = bits(target, plainly)
            for run in among_others:
                layer = first_difference(expected, bits(target, run))
                if layer is not None:
                    module = first_differing(target, layer, plainly, run) or names[layer]
                    return Exactness(ROUNDING, module, _reason(module, run))
    except torch.OutOfMemoryError:
        return UNMEASURED
    where = " and ".join(map(str, dict.fromkeys(positions)))
    return Exactness(
        BITWISE,
        reason=f"at positions from {where} on, in trees and in a batch, all layers and the logits gave a row the bits "
        "that they give it alone",
    )


def bits(target: Target, run: Run) -> Bits:
    """What a run computes of its path."""
    with layer_outputs(target.decoder_layers) as outputs:
        logits = [target.verify(tokens, step, run.cache).logits for tokens, step in forwards(target, run)]
    path, slab, layers = list(run.form.path), run.cache.slab, []
    for layer, found in enumerate(outputs):
        hidden = torch.cat(found, 1)[run.own, path]
        stored = (each[run.own, :, run.rows] for each in (slab.keys[layer], slab.values[layer]))
        layers.append((*stored, hidden))
    return Bits(layers, torch.cat(logits, 1)[run.own, path])


def first_difference(ours: Bits, theirs: Bits) -> int | None:
    """The first layer of which a bit differs; their number where of the logits alone."""
    pairs = [*zip(ours.layers, theirs.layers, strict=True), ((ours.logits,), (theirs.logits,))]
    device = ours.logits.device  # read once, not for each layer
    flags = [torch.stack([differs(a, b).to(device) for a, b in zip(*pair, strict=True)]).any() for pair in pairs]
    found = torch.stack(flags).tolist()
    return found.index(True) if True in found else None


def _reason(module: str, run: Run) -> str:
    return (
        f"{module} gives a row other bits in {run.where} than alone, at position {run.lengths[run.own]}: texts may "
        "part where the two best scores are about a rounding apart"
    )
