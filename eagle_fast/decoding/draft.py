"""The draft: grow a tree from the newest token, then absorb what the target accepted.

B sequences, k = top_k rows per level, T tree nodes, A most nodes on a path, F feature width, H hidden size of the head.

A row of the head pairs the target's features of token i with the embedding of token i + 1 and has position i, so the
head's cache always holds as many rows as the target's. Growing feeds the head its own hidden states instead (EAGLE,
Li et al. 2024; EAGLE-2 for the beam and the reranking, section 4).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from eagle_fast_kernels.draft_head import rope_append
from eagle_fast_kernels.grow import finish_tree, grow
from eagle_fast_kernels.lm_head_topk import lm_head_topk
from torch import Tensor

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.decoding.tree import Tree, chain_masks, root_only
from eagle_fast.head import Attend, DraftHead
from eagle_fast.layers.attention import PrefillStep, Step, TreeStep
from eagle_fast.layers.links import Proposed
from eagle_fast.layers.lockstep import Work, alone
from eagle_fast.layers.slab import KVSlab, LayerShape

MOST_WAITING = 64  # rows that wait for the head: as many as a word of an ancestor mask has bits


class NoHead:
    """The drafter of plain decoding: its tree is the root alone, and it has nothing to absorb."""

    def __init__(self, device: torch.device):
        self.device = device
        self.slabs: list[Tensor] = []

    @property
    def parts(self) -> list[NoHead]:
        """Drafters of one device each."""
        return [self]

    def grow(self, roots: Tensor, lengths: Tensor, sampling: SamplingTensors) -> Tree:
        """The tree under roots [B], whose position is lengths [B]."""
        return root_only(roots)

    def absorb(self, features: Tensor, path: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Take in what was accepted: features [B, T, F] of the tree's nodes, the path [B, A] of counts [B] of them,
        the tokens [B, A] after those, lengths [B] before them."""

    def absorb_prompt(self, features: Tensor, tokens: Tensor, start: int) -> None:
        """Take in a prompt chunk: features [B, C, F] of positions start.., tokens [B, C] after each."""

    def start_without_prefix(self, roots: Tensor) -> None:
        """Before a prompt is absorbed, which may have no token but its root."""

    def under(self, tree: TreeConfig) -> NoHead:
        """The same drafter, in the same memory, growing other trees."""
        return self

    def row(self, index: int) -> NoHead:
        """One sequence of this drafter, in the same memory: a drafter of batch 1."""
        return self

    def copy_prefix(self, other: NoHead, count: int) -> None:
        """Take over the first `count` cache rows of every sequence of `other`, which has the same batch, and the state
        that its next tree grows from."""

    def adopt(self, rows: Tensor, other: NoHead) -> None:
        """Copy the first sequences of `other` to sequences `rows` [R] of this one."""


class PathRows(NamedTuple):
    """Rows of paths of up to A nodes, of B sequences."""

    numbers: Tensor  # [A]
    last: Tensor  # [A + 1], the last row of a path by its length, 0 of none
    masks: Tensor  # [B, A, W], of a chain

    @classmethod
    def up_to(cls, most: int, batch: int, device: torch.device) -> PathRows:
        numbers = torch.arange(most, device=device)
        last = (torch.arange(most + 1, device=device) - 1).clamp(min=0)
        return cls(numbers, last, chain_masks(most, device).repeat(batch, 1, 1))


class Drafter(NoHead):
    """One head drafting for B sequences, with its own keys and values and the state that the next tree grows from."""

    def __init__(self, head: DraftHead, tree: TreeConfig, batch: int, capacity: int):
        super().__init__(head.device)
        self.head, self.batch = head, batch
        device, config = head.device, head.config
        shapes = [LayerShape(layer.num_kv_heads, layer.head_dim, head.dtype, device) for layer in head.draft_layers]
        self.slab = KVSlab(shapes, batch, capacity)
        self.slabs = self.slab.slabs
        self.cos, self.sin = head.rope_table(capacity)
        self.hidden = torch.zeros(batch, config.hidden_size, dtype=head.dtype, device=device)
        self.states = torch.zeros_like(self.hidden)
        self._set_tree(tree)

    def under(self, tree: TreeConfig) -> Drafter:
        view = copy.copy(self)
        view._set_tree(tree)
        return view

    def _set_tree(self, tree: TreeConfig) -> None:
        """What depends on the tree, and never changes while rounds run."""
        self.tree = tree
        device, batch, k = self.device, self.batch, tree.top_k
        self.path = PathRows.up_to(tree.max_path, batch, device)
        rows = torch.arange(max(tree.depth, 1) * k, device=device)
        self.level_depths = rows.div(k, rounding_mode="floor")
        levels = torch.arange(tree.depth + 1, device=device)[:, None]
        self.level_offsets = torch.stack([levels, levels * k])
        words = -(-(tree.depth + 1) * k // 64)
        # the root as a beam: score, candidate, ancestors
        self.root = (
            torch.zeros(batch, 1, dtype=torch.float32, device=device),
            torch.full((batch, 1), -1, device=device),
            torch.zeros(batch, 1, words, dtype=torch.long, device=device),
        )

    # -- grow ------------------------------------------------------------------------------------------------------

    def grow(self, roots: Tensor, lengths: Tensor, sampling: SamplingTensors) -> Tree:
        return alone(self.growing(roots, lengths, sampling))

    def growing(self, roots: Tensor, lengths: Tensor, sampling: SamplingTensors) -> Work[Tree]:
        """`grow`, which stops where ranks have to hear of each other; so does what else ends in -ing here."""
        if self.tree.total_token == 1:
            return root_only(roots)
        k, batch = self.tree.top_k, roots.numel()
        size = (batch, self.tree.num_candidates)
        candidate_tokens, parents = torch.empty(2, *size, dtype=torch.long, device=self.device)
        candidates = torch.empty(size, dtype=torch.float32, device=self.device), candidate_tokens, parents
        positions, slots = lengths + self.level_offsets  # [depth + 1, B]
        best = yield from self._proposing(self.states[:, None], lengths, sampling)
        tokens, scores, beam, rows, masks = grow(*best, *self.root, 0, *candidates)
        hidden = self.hidden
        for level in range(1, self.tree.depth + 1):
            step = TreeStep(lengths, masks, self.level_depths.expand(batch, -1), first=(level - 1) * k)
            attend = self._attend(step, slots[level - 1])
            rows_at = positions[level - 1][:, None].expand_as(tokens)
            hidden, states = yield from self.head.passing(tokens, hidden, rows_at, attend, rows=rows, parts=True)
            best = yield from self._proposing(states, positions[level], sampling)
            tokens, scores, beam, rows, masks = grow(*best, scores, beam, masks, level, *candidates)
        return Tree(*finish_tree(*candidates, roots, self.tree.total_token))

    def _proposing(
        self, states: Tensor, positions: Tensor, sampling: SamplingTensors
    ) -> Work[tuple[Tensor, Tensor]]:  # fmt: skip
        """Best k next tokens after rows [B, R, H] whose tokens stand at positions [B]: (scores, tokens) [B, R, k]."""
        batch, rows, _ = states.shape
        sums = states.new_empty(batch * rows, 2, dtype=torch.float32) if self.head.is_part else None
        scores, tokens = lm_head_topk(
            states.reshape(batch * rows, -1),
            self.head.lm_head_weight,
            self.tree.top_k,
            bias=self.head.lm_head_bias,
            scale=self.head.lm_head_scale,
            token_ids=self.head.token_ids,
            gain=sampling.draft_gain,
            share=sampling.draft_share,
            positions=positions,
            seeds=sampling.seeds,
            sequences=sampling.sequences,
            sums=sums,
        )
        if sums is not None:
            scores, tokens = yield Proposed(scores, tokens, sums)
        return scores.view(batch, rows, -1), tokens.view(batch, rows, -1)

    def _attend(self, step: Step, slots: Tensor) -> Attend:
        """Attention of rows that are written from cache rows slots [B] on; see `DraftHead.forward`."""
        config = self.head.config

        def attend(index, layer, qkv, positions):
            keys, values = self.slab.keys[index], self.slab.values[index]
            query = rope_append(
                qkv, positions, self.cos, self.sin, keys, values, slots, layer.num_heads, layer.num_kv_heads,
                q_norm=layer.q_norm, k_norm=layer.k_norm, eps=layer.eps, interleaved=config.rope_interleaved,
            )  # fmt: skip
            return step.attend(query, keys, values, scale=layer.scale, window=layer.window).flatten(2)

        return attend

    # -- absorb ----------------------------------------------------------------------------------------------------

    def absorb(self, features: Tensor, path: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Rows r >= counts[b] are computed too; what they write lies past the new length and is written over later."""
        alone(self.absorbing(features, path, tokens, counts, lengths))

    def absorbing(self, features: Tensor, path: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor) -> Work[None]:
        features = features.gather(1, path[..., None].expand(-1, -1, features.shape[-1]))
        hidden, states, last = yield from self._passing_path(features, tokens, counts, lengths, self.path)
        torch.gather(hidden, 1, last, out=self.hidden[:, None])
        torch.gather(states, 1, last, out=self.states[:, None])

    def absorbing_waiting(
        self, features: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor, rows: PathRows
    ) -> Work[None]:  # fmt: skip
        """Take in features [B, N, F] of counts [B] tokens, those from position lengths [B] on, and the tokens [B, N]
        after each. A sequence of which none waits goes on from what it has."""
        hidden, states, last = yield from self._passing_path(features, tokens, counts, lengths, rows)
        some = counts[:, None] > 0
        for mine, new in ((self.hidden, hidden), (self.states, states)):
            torch.where(some, new.gather(1, last)[:, 0], mine, out=mine)

    def _passing_path(
        self, features: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor, rows: PathRows
    ) -> Work[tuple[Tensor, Tensor, Tensor]]:
        """(hidden, states) [B, A, H] of the rows of paths, and where in them [B, 1, H] the last of each path stands."""
        positions = lengths[:, None] + rows.numbers
        step = TreeStep(lengths, rows.masks, rows.numbers.expand(lengths.numel(), -1))
        attend, given = self._attend(step, lengths), self.head.embed_features(features)
        hidden, states = yield from self.head.passing(tokens, given, positions, attend, parts=True)
        return hidden, states, rows.last[counts][:, None, None].expand(-1, 1, hidden.shape[-1])

    def absorb_prompt(self, features: Tensor, tokens: Tensor, start: int) -> None:
        alone(self.absorbing_prompt(features, tokens, start))

    def absorbing_prompt(self, features: Tensor, tokens: Tensor, start: int) -> Work[None]:
        batch, count = tokens.shape
        attend = self._attend(PrefillStep(start, count), torch.full((batch,), start, device=tokens.device))
        positions = torch.arange(start, start + count, device=tokens.device).expand_as(tokens)
        given = self.head.embed_features(features)
        hidden, states = yield from self.head.passing(tokens, given, positions, attend, parts=True)
        self.hidden.copy_(hidden[:, -1])
        self.states.copy_(states[:, -1])

    def start_without_prefix(self, roots: Tensor) -> None:
        """A sequence of one token has no features yet: draft its first tree from zeros. Costs acceptance, not text."""
        alone(self.starting_without_prefix(roots))

    def starting_without_prefix(self, roots: Tensor) -> Work[None]:
        batch, path = roots.numel(), self.tree.max_path
        features = torch.zeros(batch, path, self.head.feature_size, dtype=self.hidden.dtype, device=self.device)
        nothing = torch.zeros_like(roots)
        first = torch.zeros(batch, path, dtype=torch.long, device=self.device)
        yield from self.absorbing(features, first, roots[:, None].repeat(1, path), nothing + 1, nothing)

    def row(self, index: int) -> Drafter:
        one, view = slice(index, index + 1), copy.copy(self)
        view.slab = self.slab.row(index)
        view.slabs, view.batch = view.slab.slabs, 1
        view.hidden, view.states = self.hidden[one], self.states[one]
        view.path = PathRows(self.path.numbers, self.path.last, self.path.masks[one])
        scores, candidates, masks = self.root
        view.root = scores[one], candidates[one], masks[one]
        return view

    def copy_prefix(self, other: NoHead, count: int) -> None:
        assert isinstance(other, Drafter)
        self.slab.copy_prefix(other.slab, count)
        self.hidden.copy_(other.hidden)
        self.states.copy_(other.states)

    def adopt(self, rows: Tensor, other: NoHead) -> None:
        assert isinstance(other, Drafter)
        self.slab.adopt(rows, other.slab)
        self.hidden[rows], self.states[rows] = other.hidden[: len(rows)], other.states[: len(rows)]


class Postponed(NoHead):
    """The drafter of rounds without a draft, where the head will draft again: the root alone is the tree, and what
    such rounds accept waits here until the head absorbs it in one pass.

    features [B, N, F], tokens [B, N] of the rows that wait; absorbed [B]: how many rows the head has.
    rounds: how many such rounds were launched since it took in the last, as the host knows it: no sequence has more
    rows waiting.
    """

    def __init__(self, drafter: Drafter):
        super().__init__(drafter.device)
        self.drafter = drafter
        batch, size = drafter.batch, (drafter.batch, MOST_WAITING, drafter.head.feature_size)
        self.features = torch.zeros(size, dtype=drafter.hidden.dtype, device=self.device)
        self.tokens = torch.zeros(batch, MOST_WAITING, dtype=torch.long, device=self.device)
        self.absorbed = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.rows = PathRows.up_to(MOST_WAITING, batch, self.device)
        self.rounds = 0

    def absorb(self, features: Tensor, path: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor) -> None:
        """Keep the row of the root, which a sequence that has ended writes to a place that means nothing."""
        place = (lengths - self.absorbed).clamp(0, MOST_WAITING - 1)[:, None]
        features = features.to(self.features.dtype)
        self.features.scatter_(1, place[..., None].expand(-1, -1, features.shape[-1]), features)
        self.tokens.scatter_(1, place, tokens)

    def start_from(self, lengths: Tensor) -> None:
        """Nothing waits: the head has lengths [B] rows."""
        self.absorbed.copy_(lengths)

    def set_row(self, row: int, length: int) -> None:
        """The same of one sequence."""
        self.absorbed[row].fill_(length)  # an assignment would wait for the device

    def release(self, lengths: Tensor) -> None:
        """Let the head absorb what waits; then it has lengths [B] rows, as many as the target."""
        alone(self.releasing(lengths))

    def releasing(self, lengths: Tensor) -> Work[None]:
        counts = (lengths - self.absorbed).clamp(0, MOST_WAITING)
        yield from self.drafter.absorbing_waiting(self.features, self.tokens, counts, self.absorbed, self.rows)
        self.absorbed.copy_(lengths)
