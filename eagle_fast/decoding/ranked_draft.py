"""A head that is cut over ranks, drafting: every rank grows the same tree and absorbs the same tokens, with its part.

B sequences, T tree nodes, A most nodes on a path, F feature width, n ranks.

Hidden states and candidates are the same to the bit on all ranks, since what they exchange is. Where a tensor here is a
list, it is each rank's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.draft import Drafter, NoHead, Postponed
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.decoding.tree import Tree
from eagle_fast.head import DraftHead
from eagle_fast.layers.links import Links
from eagle_fast.layers.lockstep import together


class RankedSampling:
    """`SamplingTensors` of every rank."""

    def __init__(self, batch: int, links: Links):
        self.links, self.parts = links, [SamplingTensors(batch, device) for device in links.devices]

    def copy_(self, other: SamplingTensors) -> None:
        """`other` is on rank 0. Sent as words of 4 bytes; those of 8 come first, so that they lie where they may."""
        names = sorted(vars(other), key=lambda name: -getattr(other, name).element_size())
        words = self.links.send("sampling", *(getattr(other, name).view(torch.int32) for name in names))
        for mine, sent in zip(self.parts, words, strict=True):
            for name, each in zip(names, sent, strict=True):
                own = getattr(mine, name)
                own.copy_(each.view(own.dtype))

    def adopt(self, rows: Tensor, other: RankedSampling) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.adopt(rows.to(mine.seeds.device), theirs)


class RankedDraft(NoHead):
    """See `Drafter`. heads: the parts of one head, rank 0's first."""

    def __init__(self, heads: Sequence[DraftHead], links: Links, tree: TreeConfig, batch: int, capacity: int):
        super().__init__(heads[0].device)
        self.links = links
        self._set_parts([Drafter(head, tree, batch, capacity) for head in heads])

    def _set_parts(self, parts: list[Drafter]) -> None:
        self.drafters = parts
        self.slabs = [slab for part in parts for slab in part.slabs]

    @property
    def parts(self) -> list[NoHead]:
        return list(self.drafters)

    def grow(  # type: ignore[override]
        self, roots: Sequence[Tensor], lengths: Sequence[Tensor], sampling: RankedSampling
    ) -> list[Tree]:
        given = zip(self.drafters, roots, lengths, sampling.parts, strict=True)
        with self.links.forward():
            return together([part.growing(root, rows, own) for part, root, rows, own in given], self.links)

    def absorb(  # type: ignore[override]
        self, features: Sequence[Tensor], path: Sequence[Tensor], tokens: Sequence[Tensor], counts: Sequence[Tensor],
        lengths: Sequence[Tensor],
    ) -> None:  # fmt: skip
        given = zip(self.drafters, features, path, tokens, counts, lengths, strict=True)
        with self.links.forward():
            together([part.absorbing(*each) for part, *each in given], self.links)

    def absorb_prompt(self, features: Sequence[Tensor], tokens: Tensor, start: int) -> None:  # type: ignore[override]
        """tokens [B, C] on rank 0."""
        sent = [each for (each,) in self.links.send("prompt", tokens)]
        given = zip(self.drafters, features, sent, strict=True)
        with self.links.forward():
            together([part.absorbing_prompt(own, each, start) for part, own, each in given], self.links)

    def start_without_prefix(self, roots: Tensor) -> None:
        """roots [B] on rank 0."""
        sent = self.links.send("roots", roots)
        with self.links.forward():
            together(
                [part.starting_without_prefix(each) for part, (each,) in zip(self.drafters, sent, strict=True)],
                self.links,
            )

    def under(self, tree: TreeConfig) -> RankedDraft:
        return self._view([part.under(tree) for part in self.drafters])

    def row(self, index: int) -> RankedDraft:
        return self._view([part.row(index) for part in self.drafters])

    def _view(self, parts: list[Drafter]) -> RankedDraft:
        view = copy.copy(self)
        view._set_parts(parts)
        return view

    def copy_prefix(self, other: NoHead, count: int) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_prefix(theirs, count)

    def adopt(self, rows: Tensor, other: NoHead) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.adopt(rows.to(mine.device), theirs)


class RankedPostponed(Postponed):
    """See `Postponed`: on every rank its own features wait for its part of the head."""

    def __init__(self, drafter: RankedDraft):
        NoHead.__init__(self, drafter.device)
        self.links, self.rounds = drafter.links, 0
        self.each = [Postponed(part) for part in drafter.drafters]

    @property
    def parts(self) -> list[NoHead]:
        return list(self.each)

    def absorb(  # type: ignore[override]
        self, features: Sequence[Tensor], path: Sequence[Tensor], tokens: Sequence[Tensor], counts: Sequence[Tensor],
        lengths: Sequence[Tensor],
    ) -> None:  # fmt: skip
        for part, *each in zip(self.each, features, path, tokens, counts, lengths, strict=True):
            part.absorb(*each)

    def start_from(self, lengths: Tensor) -> None:
        for part, (each,) in zip(self.each, self.links.send("absorbed", lengths), strict=True):
            part.start_from(each)

    def set_row(self, row: int, length: int) -> None:
        for part in self.each:
            part.set_row(row, length)

    def release(self, lengths: Tensor) -> None:
        # copies: ranks note them after their last exchange, when the next of this name may be on its way
        sent = [each.clone() for (each,) in self.links.send("absorbed", lengths)]
        with self.links.forward():
            together([part.releasing(each) for part, each in zip(self.each, sent, strict=True)], self.links)
