"""The round of speculative decoding, and the state that it carries from one round to the next.

B sequences, T tree nodes, A most nodes on a path (and most tokens per round emits).

    draft     grow a tree under the newest token of each sequence
    verify    one target forward over its nodes
    accept    each node gets the token that the target puts after it; walk down while a child carries that token
    compact   move the accepted nodes' keys and values to the end of the prefix
    absorb    run the head over them; the last emitted token is the next root

The newest token, the root, is never in the cache: the first root is the last token of the prompt. Plain decoding is the
same round with a tree of just the root. Nothing here reads a value on the host.

The state lies on the device of the logits. A head elsewhere gets the roots and sends its tree, each as one copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from eagle_fast_kernels.accept import accept
from torch import Tensor

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.draft import MOST_WAITING, Drafter, NoHead, Postponed
from eagle_fast.decoding.held import Held
from eagle_fast.decoding.ranked_prompts import RankedPrompts
from eagle_fast.decoding.records import HOST, Keeps, Kept
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.decoding.tree import Tree, root_only
from eagle_fast.head import DraftHead
from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.transfers import distinct
from eagle_fast.target import Target, Verified
from eagle_fast.target.interface import SlabCache

PREFILL_CHUNK = 8192  # rows of a prompt that one forward takes: bounds its activations


class Round:
    """Decoding state of B sequences of up to `max_length` tokens, and the step that advances it by one round.

    Without a head it decodes plainly, one token per round, whatever `tree` says. `kept` is what it keeps of the logits.
    Its rounds may run under one tree and then under another of `trees`, see `under`; the root alone is one.
    """

    heads: Sequence[DraftHead] | None = None  # of a head that is cut over ranks: see `RankedRound`
    prompts: RankedPrompts | None = None  # of a target over ranks, kept by whoever has several states

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        tree: TreeConfig,
        batch: int,
        max_length: int,
        keeps: Keeps = Keeps.NOTHING,
        others: Sequence[TreeConfig] = (),
    ):
        self.target, self.batch, self.max_length, self.keeps = target, batch, max_length, keeps
        self.tree = tree if head else ROOT_ALONE
        self.trees = tuple(dict.fromkeys([self.tree, *(others if head else ())]))
        postpones = ROOT_ALONE in self.trees[1:]
        slots = max(MOST_WAITING * postpones, *(each.num_slots for each in self.trees))
        capacity = -(-(max_length + slots) // 64) * 64
        self.cache = target.new_cache(batch, capacity)
        device = target.device
        self.drafter = self._new_drafter(head, capacity)
        self.waiting = self._new_waiting() if postpones else None
        self.devices = distinct([*target.devices, self.drafter.device])
        self.sampling = self.draft_sampling = SamplingTensors(batch, device)
        if self.drafter.device != device:
            self.draft_sampling = SamplingTensors(batch, self.drafter.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # tokens in the cache
        self.roots = torch.zeros_like(self.lengths)  # the newest token, not in the cache
        self.ends = torch.zeros_like(self.lengths)  # length at which a sequence is done
        longest = max(each.max_path for each in self.trees)
        self.largest_report = torch.zeros(batch * (1 + 2 * longest), dtype=torch.long, device=device)
        nothing = keeps is Keeps.NOTHING
        self.kept = None if nothing else Kept(keeps, batch, longest, target.vocab_size, device)
        self._set_report()
        self.views: dict[TreeConfig, Round] = {self.tree: self}  # by tree
        self.held: Held | None = None  # what a call that prefills may count on, kept by whoever runs rounds

    def _new_drafter(self, head: DraftHead | None, capacity: int) -> NoHead:
        return Drafter(head, self.tree, self.batch, capacity) if head else NoHead(self.target.device)

    def _new_waiting(self) -> Postponed:
        assert isinstance(self.drafter, Drafter)
        return Postponed(self.drafter)

    @property
    def num_nodes(self) -> int:
        """Nodes of a tree."""
        return self.tree.total_token

    @property
    def max_path(self) -> int:
        """Most tokens that a round emits for a sequence."""
        return self.tree.max_path

    @property
    def num_bytes(self) -> int:
        """Memory of the caches and of all other tensors here, over all devices."""
        owners: list[object] = [self, self.sampling, *self.draft_sampling.parts, self.kept and self.kept.largest]
        owners += [part for view in self.views.values() for part in view.drafter.parts]
        named = [vars(owner) for owner in owners if owner is not None]
        tensors = [each for names in named for each in names.values() if isinstance(each, Tensor)]
        tensors += [*self.cache.slab.slabs, *self.cache.long_rows.values(), *self.drafter.slabs]
        sizes = {id(each): each.nbytes for each in tensors}
        parts = self.sent, self.report, self.ranks, self.counts, self.emitted  # of the largest report
        return sum(sizes.values()) - sum(each.nbytes for each in parts)

    # -- trees -----------------------------------------------------------------------------------------------------

    def under(self, tree: TreeConfig) -> Round:
        """This state, in the same memory, with rounds under another of its trees. To be made between rounds.

        Under the root alone the head absorbs nothing for now, see `Postponed`; before a round under a tree with drafts
        it has to `catch_up`.
        """
        if tree not in self.views:
            assert tree in self.trees, "a state is made for the trees that it will have"
            view = copy.copy(self)
            view.tree = tree
            view.drafter = self.waiting if tree == ROOT_ALONE and self.waiting else self.drafter.under(tree)
            view._set_report()
            self.views[tree] = view
        return self.views[tree]

    def _set_report(self) -> None:
        """What the host reads of a round: counts [B] and emitted tokens [B, A], one tensor, and their ranks [B, A]."""
        counts = self.batch * (1 + self.max_path)
        self.sent = self.largest_report[: counts + self.batch * self.max_path]
        self.report, self.ranks = self.sent[:counts].view(self.batch, -1), self.sent[counts:].view(self.batch, -1)
        self.counts, self.emitted = self.report[:, 0], self.report[:, 1:]
        self.kept = self.kept and self.kept.of_paths(self.max_path)

    @torch.no_grad()
    def postpone(self) -> None:
        """Before a round under the root alone: make room for what the head will have to absorb."""
        assert self.waiting is not None
        if self.waiting.rounds >= MOST_WAITING:
            self.catch_up()
        if self.waiting.rounds == 0:
            self.waiting.start_from(self.lengths)
        self.waiting.rounds += 1

    @torch.no_grad()
    def catch_up(self) -> None:
        """Let the head absorb what rounds under the root alone have accepted since it drafted last."""
        if self.waiting is not None and self.waiting.rounds:
            self.release()
            self.waiting.rounds = 0

    @torch.no_grad()
    def release(self) -> None:
        """`catch_up` without the host's part."""
        assert self.waiting is not None
        (lengths,) = self.target.transfers.packed(self.waiting.device, self.lengths)
        self.waiting.release(lengths)

    # -- one round -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, accept: Callable[[Tree, Tensor], Tensor] | None = None) -> None:
        """Advance every sequence; `emitted` [B, A] and `counts` [B] then hold the new tokens.

        accept: in place of the method, where the host chooses the tokens.
        """
        tree = self.draft()
        logits, features = self.verify(tree)
        path = (accept or self.accept)(tree, logits)
        if self.kept is not None:
            self.kept.take(logits, path, self.emitted)
        self.compact(path)
        self.absorb(path, features)

    def draft(self) -> Tree:
        """The tree under the newest token of each sequence."""
        transfers = self.target.transfers
        if self.tree == ROOT_ALONE:
            return root_only(self.roots)
        roots, lengths = transfers.packed(self.drafter.device, self.roots, self.lengths)
        tree = self.drafter.grow(roots, lengths, self.draft_sampling)
        return Tree(*transfers.packed(self.target.device, *tree))

    def verify(self, tree: Tree) -> Verified:
        """The target's logits [B, T, V] for the tree's nodes, and their features [B, T, F]."""
        return self.target.verify(tree.tokens, TreeStep(self.lengths, tree.ancestors, tree.depths), self.cache)

    def accept(self, tree: Tree, logits: Tensor) -> Tensor:
        """The accepted nodes [B, A]; `emitted`, `counts` and `roots` are then the next ones.

        Of NaN logits -1 is emitted, which the host reports.
        """
        chosen = self.sampling.choose(logits, self.lengths[:, None] + tree.depths)
        return accept(tree.tokens, tree.parents, chosen, self.lengths, self.ends, self.roots, self.report, self.ranks)

    def compact(self, path: Tensor) -> None:
        """Move keys and values of the accepted nodes [B, A] to the end of the prefix."""
        self.cache.slab.compact(path, self.counts, self.lengths, self.target.transfers)

    def absorb(self, path: Tensor, features: Tensor) -> None:
        """Let the head take in the accepted nodes [B, A] of a tree with features [B, T, F]; lengths grow by them."""
        transfers = self.target.transfers
        rows = transfers.packed(self.drafter.device, path, self.emitted, self.counts, self.lengths)
        self.drafter.absorb(features, *rows)
        self.lengths.add_(self.counts)

    # -- before the first round ------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, texts: Sequence[Sequence[int]], ends: Sequence[int], starts: Sequence[int] | None = None) -> None:
        """Prefill all but the last token of each prompt, `texts` [B] of one token or more.

        Each is prefilled by itself, in chunks that its own length sets: its cache rows have the bits that they have
        alone, whatever its neighbours are. Prompts of the very same tokens are prefilled once, and their rows copied.

        ends [B]: the length, root not counted, at which a sequence is done.
        starts [B]: the first token to prefill, where the caches hold those before it; <= its length - 2 unless 0.
        """
        self.held = None
        if starts and any(starts):
            self.catch_up()
        if self.waiting is not None:
            self.waiting.rounds = 0
        if self.draft_sampling is not self.sampling:
            self.draft_sampling.copy_(self.sampling)
        prefilled: dict[tuple[int, ...], int] = {}
        for row, (text, end, start) in enumerate(zip(texts, ends, starts or [0] * len(texts), strict=True)):
            source = row if start else prefilled.setdefault(tuple(text), row)
            if source == row:
                self.begin_row(row, text, end, start)
            else:
                self._begin_like(source, row, text, end)

    @torch.no_grad()
    def begin_row(self, row: int, text: Sequence[int], end: int, start: int = 0) -> None:
        """`begin` of one sequence with the prompt `text`; the others stay as they are."""
        cache, drafter = self._place(row, text, end)
        device = self.target.device
        tokens = torch.tensor([text], device=HOST, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        prefix = len(text) - 1
        if prefix == 0:
            drafter.start_without_prefix(tokens[:, 0].to(drafter.device))
        for first in range(start, prefix, PREFILL_CHUNK):
            last = min(first + PREFILL_CHUNK, prefix)
            features = self._prefill(tokens[:, first:last], first, cache)
            drafter.absorb_prompt(features, tokens[:, first + 1 : last + 1].to(drafter.device), first)

    def _prefill(self, tokens: Tensor, start: int, cache: SlabCache) -> Tensor:
        if self.prompts is not None:
            return self.prompts(tokens, start, cache)[0]
        return self.target.prefill(tokens, start, cache)

    def _begin_like(self, source: int, row: int, text: Sequence[int], end: int) -> None:
        """`begin_row` by a copy of sequence `source`, which has the same prompt."""
        cache, drafter = self._place(row, text, end)
        cache.slab.copy_prefix(self.cache.slab.row(source), len(text) - 1)
        drafter.copy_prefix(self.drafter.row(source), len(text) - 1)

    def _place(self, row: int, text: Sequence[int], end: int) -> tuple[SlabCache, NoHead]:
        """Set all that a sequence has but its cache rows; returns the caches of target and head, narrowed to it."""
        for values, value in ((self.lengths, len(text) - 1), (self.roots, text[-1]), (self.ends, end)):
            values[row].fill_(value)  # an assignment would wait for the device
        if self.waiting is not None:
            self.waiting.set_row(row, len(text) - 1)
        cache = self.cache.row(row)
        self.target.choose_frequencies(cache, torch.tensor([len(text)], device=HOST))
        return cache, self.drafter.row(row)

    def finish(self, row: int) -> None:
        """Emit nothing more for this sequence."""
        self.ends[row].zero_()  # assigning a number would wait for the device: it is copied there

    @torch.no_grad()
    def copy_prefix(self, other: Round, count: int) -> None:
        """Take over the first `count` cache rows of every sequence of `other`, which has the same target, head, trees
        and batch: `begin` can go on from there."""
        other.catch_up()
        self.cache.slab.copy_prefix(other.cache.slab, count)
        self.drafter.copy_prefix(other.drafter, count)
        self.held = other.held and replace(other.held, rows=[min(rows, count) for rows in other.held.rows])

    @torch.no_grad()
    def adopt(self, rows: Tensor, other: Round) -> None:
        """Let the first sequences of `other` go on here as sequences `rows` [R], whatever those held; the rest go on.

        `other` has the same target, head and trees, and any batch; its texts have to fit into `max_length`.
        """
        self.held = None
        self.catch_up()
        other.catch_up()
        self.cache.adopt(rows, other.cache)
        self.sampling.adopt(rows, other.sampling)
        there = rows.to(self.drafter.device)
        if self.draft_sampling is not self.sampling:
            self.draft_sampling.adopt(there, other.draft_sampling)
        self.drafter.adopt(there, other.drafter)
        for name in ("lengths", "roots", "ends"):
            getattr(self, name)[rows] = getattr(other, name)[: len(rows)]
