"""Rows of a prefix that nobody computed: keys and values with which attention at a deep position can be looked at.

P rows, D head size, n visible keys.

Keys are random and score about as far apart as a normal variable, so that a query weighs all of them; values are so
large that their mean is not lost beside what a real prefix gives. Where a window or a chunk begins for one of the next
rows, values stand out by sqrt(n): there, one key seen or not is a difference no rounding makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from eagle_fast.layers.slab import KVSlab
from eagle_fast.target.interface import LayerBinding

MARKED = 24  # rows on either side of a border


def make_up(slab: KVSlab, rows: int, bindings: Sequence[LayerBinding], real: int) -> None:
    """Overwrite the first `rows` rows of a slab; the first `real` of them give the measures.

    bindings: of the layers, with the window and chunk of each.
    """
    noise: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, binding in enumerate(bindings):
        window, chunk = binding.window, binding.chunk
        keys, values = slab.keys[layer], slab.values[layer]
        visible = min(window or rows, rows % chunk or chunk if chunk else rows, rows)
        key_norm = keys[:, :, :real].float().norm(dim=-1).mean()
        value_size = values[:, :, :real].float().square().mean().sqrt() * math.sqrt(visible)
        kind = tuple(keys.shape), keys.dtype, keys.device
        if kind not in noise:
            generator = torch.Generator(keys.device).manual_seed(17)
            shape = (*keys.shape[:2], rows, keys.shape[-1])
            drawn = [torch.randn(shape, generator=generator, device=keys.device) for _ in range(2)]
            noise[kind] = drawn[0].to(keys.dtype), drawn[1].to(keys.dtype)
        for_keys, for_values = noise[kind]
        torch.mul(for_keys, math.sqrt(keys.shape[-1]) / key_norm, out=keys[:, :, :rows])
        torch.mul(for_values, value_size, out=values[:, :, :rows])
        for border in _borders(rows, window, chunk):
            values[:, :, max(0, border - MARKED) : border + MARKED].mul_(math.sqrt(visible) / 2)


def _borders(rows: int, window: int, chunk: int) -> list[int]:
    """The first visible row of a query behind so many rows."""
    borders = [rows - window] if 0 < window < rows else []
    return [*borders, rows // chunk * chunk] if 0 < chunk < rows else borders
