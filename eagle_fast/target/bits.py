"""What a row becomes alone and among others, bit for bit: the twin of a target held against itself.

P nodes of a path, H hidden size, Hkv key heads, D head size, V vocabulary.

`paths.py` says what is decoded: a path node by node, as plain decoding does, and the same path in trees of three forms
and in a batch, at the start of a text and deep in it. Of the path, every layer's output, its keys and values and the
logits are compared. The first difference ends it, and is traced to a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from eagle_fast.layers.slab import KVSlab
from eagle_fast.target.differing import differs, first_differing
from eagle_fast.target.exactness import BITWISE, ROUNDING, UNMEASURED, Exactness
from eagle_fast.target.paths import Run, forwards, runs
from eagle_fast.target.rehearsal import layer_outputs
from eagle_fast.target.target import Target

# What a target computed of a path: of each layer keys and values [1, Hkv, P, D] and output [P, H]; last of its end, the
# logits [P, V] among them. Of ranks, see `rank_check`.
Bits = list[tuple[Tensor, ...]]


def measured(target: Target, names: Sequence[str], real: KVSlab, at: int, num_nodes: int) -> Exactness:
    """What a target is, in a turn of its own.

    names: of the layers. real, at, num_nodes: see `runs`.
    """
    return held_together(
        runs(target, real, at, num_nodes),
        lambda run: bits(target, run),
        lambda layer, plainly, run: first_differing(target, layer, plainly, run) or names[layer],
        "all layers and the logits",
    )


def held_together(
    pairs: Iterable[tuple[Run, list[Run]]], bits_of: Callable[[Run], Bits], module_of: Callable[[int, Run, Run], str],
    whole: str,
) -> Exactness:  # fmt: skip
    """What the runs of `paths.runs` say, compared bit for bit. module_of: the first that differs, of a place among the
    bits and the two runs. whole: what is the same if all is."""
    positions: list[int] = []
    try:
        for plainly, among_others in pairs:
            positions.append(plainly.lengths[plainly.own])
            expected = bits_of(plainly)
            for run in among_others:
                place = first_difference(expected, bits_of(run))
                if place is not None:
                    module = module_of(place, plainly, run)
                    return Exactness(ROUNDING, module, _reason(module, run))
    except torch.OutOfMemoryError:
        return UNMEASURED
    where = " and ".join(map(str, dict.fromkeys(positions)))
    return Exactness(
        BITWISE,
        reason=f"at positions from {where} on, in trees and in a batch, {whole} gave a row the bits that they give it "
        "alone",
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
    return [*layers, (torch.cat(logits, 1)[run.own, path],)]


def first_difference(ours: Bits, theirs: Bits) -> int | None:
    """The first place at which a bit differs."""
    device = ours[-1][0].device  # read once, not for each layer
    flags = [
        torch.stack([differs(a, b).to(device) for a, b in zip(*pair, strict=True)]).any()
        for pair in zip(ours, theirs, strict=True)
    ]
    found = torch.stack(flags).tolist()
    return found.index(True) if True in found else None


def _reason(module: str, run: Run) -> str:
    return (
        f"{module} gives a row other bits in {run.where} than alone, at position {run.lengths[run.own]}: texts may "
        "part where the two best scores are about a rounding apart"
    )
