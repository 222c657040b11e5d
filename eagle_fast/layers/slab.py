"""Keys and values of one target or head: one slab per device, written in place, compacted in place.

B sequences, L rows allocated for each, A most nodes on a path. Row n < lengths[b] holds token n of sequence b; the tree
of the running round lies in the rows after. Accepted nodes are moved to the end of the prefix: keys carry their
absolute rotary position already, so a move is exact.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from eagle_fast_kernels.compact_kv import compact_kv

from eagle_fast.layers.transfers import Transfers


class LayerShape(NamedTuple):
    """What a layer stores per token."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Of its key and value."""
        return 2 * self.num_heads * self.head_dim * self.dtype.itemsize


class KVSlab:
    """K and V of some layers: layers of one shape and device share a slab [2 * layers, B, Hkv, L, D]."""

    def __init__(self, layers: list[LayerShape], batch: int, capacity: int):
        self.capacity = capacity
        indices: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layers):
            indices.setdefault(shape, []).append(index)
        self.members = list(indices.values())  # of each slab
        slabs: list[torch.Tensor] = []
        for shape, members in indices.items():
            size = (2 * len(members), batch, shape.num_heads, capacity, shape.head_dim)
            slabs.append(torch.zeros(size, dtype=shape.dtype, device=shape.device))
        self._set_slabs(slabs)

    def _set_slabs(self, slabs: list[torch.Tensor]) -> None:
        """Make these the memory of all layers."""
        self.slabs = slabs
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for slab, members in zip(slabs, self.members, strict=True):
            parts = slab.unbind()
            self.keys.update(zip(members, parts[::2], strict=True))
            self.values.update(zip(members, parts[1::2], strict=True))

    def row(self, index: int) -> KVSlab:
        """One sequence of this slab, in the same memory: a slab of batch 1."""
        view = copy.copy(self)
        view._set_slabs([slab[:, index : index + 1] for slab in self.slabs])
        return view

    def compact(self, path: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, transfers: Transfers) -> None:
        """Move tree rows path[b, r], r < counts[b], to rows lengths[b] + r, in every layer, on whichever device."""
        moves: dict[torch.device, tuple[torch.Tensor, ...]] = {path.device: (path, counts, lengths)}
        for slab in self.slabs:
            if slab.device not in moves:
                moves[slab.device] = transfers.packed(slab.device, path, counts, lengths)
            compact_kv(slab, *moves[slab.device])

    def copy_prefix(self, other: KVSlab, count: int) -> None:
        """Take over the first `count` rows of every sequence of `other`, a slab of the same layers and batch."""
        for mine, theirs in zip(self.slabs, other.slabs, strict=True):
            mine[..., :count, :].copy_(theirs[..., :count, :])

    def adopt(self, rows: torch.Tensor, other: KVSlab) -> None:
        """Copy the first sequences of `other`, a slab of the same layers, to sequences `rows` [R] of this one."""
        shared = min(self.capacity, other.capacity)
        for mine, theirs in zip(self.slabs, other.slabs, strict=True):
            mine[:, :, :, :shared].index_copy_(1, rows.to(mine.device), theirs[:, : len(rows), :, :shared])
