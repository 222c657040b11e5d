"""Keys and values of a model over ranks: a slab for each, of the heads that it has.

B sequences, A most nodes on a path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_fast.layers.links import Links
from eagle_fast.layers.slab import KVSlab, LayerShape
from eagle_fast.layers.transfers import Transfers
from eagle_fast.target.interface import SlabCache


class RankedSlab:
    """What `KVSlab` is to a model on one device. parts: the slab of each rank."""

    def __init__(self, parts: Sequence[KVSlab], links: Links):
        self.parts, self.links = list(parts), links

    @classmethod
    def empty(cls, shapes: Sequence[list[LayerShape]], batch: int, capacity: int, links: Links) -> RankedSlab:
        """shapes: of the layers, of each rank."""
        return cls([KVSlab(each, batch, capacity) for each in shapes], links)

    @property
    def capacity(self) -> int:
        return self.parts[0].capacity

    @property
    def slabs(self) -> list[Tensor]:
        """Of all ranks."""
        return [slab for part in self.parts for slab in part.slabs]

    @property
    def keys(self) -> dict[int, Tensor]:
        """[B, Hkv, L, D] of the layers of rank 0, then of rank 1, ..."""
        return dict(enumerate(part.keys[layer] for part in self.parts for layer in sorted(part.keys)))

    @property
    def values(self) -> dict[int, Tensor]:
        return dict(enumerate(part.values[layer] for part in self.parts for layer in sorted(part.values)))

    def row(self, index: int) -> RankedSlab:
        """See `KVSlab`, here and below."""
        return RankedSlab([part.row(index) for part in self.parts], self.links)

    def compact(self, path: Tensor, counts: Tensor, lengths: Tensor, transfers: Transfers) -> None:
        """path [B, A], counts [B], lengths [B] on rank 0."""
        self.compact_everywhere(self.links.send("path", path, counts, lengths), transfers)

    def compact_everywhere(self, sent: Sequence[tuple[Tensor, ...]], transfers: Transfers) -> None:
        """sent: path, counts and lengths on each rank."""
        for part, (path, counts, lengths) in zip(self.parts, sent, strict=True):
            part.compact(path, counts, lengths, transfers)

    def copy_prefix(self, other: RankedSlab, count: int) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_prefix(theirs, count)

    def adopt(self, rows: Tensor, other: RankedSlab) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.adopt(rows, theirs)


class RankedCache(SlabCache):
    """A `SlabCache` that no stock layer sees."""

    def __init__(self, slab: RankedSlab):
        super().__init__(slab, {}, {})  # type: ignore[arg-type]  # has what decoding uses of one
        self.ranked = slab

    def row(self, index: int) -> RankedCache:
        return RankedCache(self.ranked.row(index))

    def adopt(self, rows: torch.Tensor, other: SlabCache) -> None:
        assert isinstance(other, RankedCache)
        self.ranked.adopt(rows, other.ranked)
