"""A round whose head is cut over ranks as its target is.

B sequences, T tree nodes, A most nodes on a path, F feature width.

    draft     rank 0 sends roots and lengths; every rank grows the tree
    verify    nothing is sent: every rank has the tree, and keeps the features that its part of the head reads
    accept    on rank 0
    compact   rank 0 sends what was accepted
    absorb    on every rank
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.draft import NoHead, Postponed
from eagle_fast.decoding.ranked_draft import RankedDraft, RankedPostponed, RankedSampling
from eagle_fast.decoding.records import Keeps
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.tree import Tree, root_only
from eagle_fast.head import DraftHead
from eagle_fast.head.cut import cut_head
from eagle_fast.layers.attention import TreeStep
from eagle_fast.target import Verified


def parts_for(head: DraftHead, target: Any) -> list[DraftHead] | None:
    """The parts of a head over a target's ranks; None where it cannot be cut, or its parts would not keep in step.

    What is not exchanged is computed on every rank: it has the same bits on GPUs of one kind. Rows of another width or
    precision than the target's have no mailboxes.
    """
    devices = target.links.devices
    kinds = {torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"}
    size = target.anatomy.hidden_size
    if len(kinds) > 1 or (head.device, head.dtype, head.config.hidden_size) != (target.device, target.dtype, size):
        return None
    return cut_head(head, devices, [rank.embedding for rank in target.ranks])


class RankedTree(Tree):
    """Rank 0's tree. everywhere: it on each rank, and lengths [B] of what it stands on."""

    everywhere: list[Tree]
    lengths: list[Tensor]

    @classmethod
    def of(cls, trees: list[Tree], lengths: list[Tensor]) -> RankedTree:
        made = cls(*trees[0])
        made.everywhere, made.lengths = trees, lengths
        return made


class RankedRound(Round):
    """See `Round`. target: a `RankedTarget`. heads: the part of each rank."""

    def __init__(
        self,
        target: Any,
        heads: Sequence[DraftHead],
        tree: TreeConfig,
        batch: int,
        max_length: int,
        keeps: Keeps = Keeps.NOTHING,
        others: Sequence[TreeConfig] = (),
    ):
        self.heads, self.links = heads, target.links
        super().__init__(target, heads[0], tree, batch, max_length, keeps, others)
        self.ranked: Any = target
        self.draft_sampling = RankedSampling(batch, self.links)  # type: ignore[assignment]
        self.accepted: list[tuple[Tensor, ...]] = []  # of each rank: path, counts, lengths and emitted tokens

    def _new_drafter(self, head: DraftHead | None, capacity: int) -> NoHead:
        assert self.heads is not None
        return RankedDraft(self.heads, self.links, self.tree, self.batch, capacity)

    def _new_waiting(self) -> Postponed:
        assert isinstance(self.drafter, RankedDraft)
        return RankedPostponed(self.drafter)

    def draft(self) -> RankedTree:
        sent = self.links.send("roots", self.roots, self.lengths)
        roots, lengths = [each for each, _ in sent], [each for _, each in sent]
        if self.tree == ROOT_ALONE:
            return RankedTree.of([root_only(each) for each in roots], lengths)
        drafter: Any = self.drafter
        return RankedTree.of(drafter.grow(roots, lengths, self.draft_sampling), lengths)

    def verify(self, tree: Tree) -> Verified:
        """See `Round`; features of every rank."""
        assert isinstance(tree, RankedTree)
        steps = [
            TreeStep(lengths, each.ancestors, each.depths)
            for lengths, each in zip(tree.lengths, tree.everywhere, strict=True)
        ]
        return Verified(*self.ranked.verify_everywhere([each.tokens for each in tree.everywhere], steps, self.cache))

    def compact(self, path: Tensor) -> None:
        self.accepted = self.links.send("accepted", path, self.counts, self.lengths, self.emitted)
        slab: Any = self.cache.slab
        slab.compact_everywhere([each[:3] for each in self.accepted], self.target.transfers)

    def absorb(self, path: Tensor, features: Any) -> None:
        """features: of every rank. What was accepted is what `compact` sent."""
        nodes, counts, lengths, tokens = zip(*self.accepted, strict=True)
        drafter: Any = self.drafter
        drafter.absorb(features, nodes, tokens, counts, lengths)
        self.lengths.add_(self.counts)

    def _prefill(self, tokens: Tensor, start: int, cache: Any) -> Any:
        return (self.prompts or self.ranked.prefill_everywhere)(tokens, start, cache)
