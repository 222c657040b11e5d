"""The round of speculative decoding, and the state that it carries from one round to the next.

B sequences, T tree nodes, A most nodes on a path (and most tokens a round emits).

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

import torch
from eagle_fast_kernels.accept import accept

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.draft import Drafter
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.decoding.tree import Tree, root_only
from eagle_fast.head import DraftHead
from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.transfers import distinct
from eagle_fast.target import Target

PREFILL_CHUNK = 8192  # prompt rows of all sequences that one forward takes: bounds its activations


class Round:
    """Decoding state of B sequences of up to `max_length` tokens, and the step that advances it by one round.

    Without a head it decodes plainly, one token a round.
    """

    def __init__(self, target: Target, head: DraftHead | None, tree: TreeConfig, batch: int, max_length: int):
        self.target, self.batch, self.max_length = target, batch, max_length
        self.num_nodes = tree.total_token if head else 1
        self.max_path = tree.max_path if head else 1
        level_rows = tree.depth * tree.top_k if head else 0
        capacity = -(-(max_length + max(self.num_nodes, level_rows)) // 64) * 64
        self.cache = target.new_cache(batch, capacity)
        self.drafter = Drafter(head, tree, batch, capacity) if head else None
        device = target.device
        self.devices = distinct([*target.devices, self.drafter.device if self.drafter else device])
        self.sampling = SamplingTensors(batch, device)
        self.draft_sampling = self.sampling
        if self.drafter and self.drafter.device != device:
            self.draft_sampling = SamplingTensors(batch, self.drafter.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # tokens in the cache
        self.roots = torch.zeros_like(self.lengths)  # the newest token, not in the cache
        self.ends = torch.zeros_like(self.lengths)  # length at which a sequence is done
        self.long_rope = torch.zeros(batch, dtype=torch.bool, device=device)
        self.report = torch.zeros(batch, 1 + self.max_path, dtype=torch.long, device=device)  # what the host reads
        self.counts, self.emitted = self.report[:, 0], self.report[:, 1:]

    # -- one round -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Advance every sequence; `emitted` [B, A] and `counts` [B] then hold the new tokens."""
        tree, logits, features = self.propose()
        self.commit(self.accept(tree, logits), features)

    def draft(self) -> Tree:
        """The tree under the newest token of each sequence."""
        if self.drafter is None:
            return root_only(self.roots)
        roots, lengths = self.target.transfers.packed(self.drafter.device, self.roots, self.lengths)
        tree = self.drafter.grow(roots, lengths, self.draft_sampling)
        return Tree(*self.target.transfers.packed(self.target.device, *tree))

    def propose(self) -> tuple[Tree, torch.Tensor, torch.Tensor]:
        """Draft and verify: the tree, the target's logits [B, T, V] and the features [B, T, F] of its nodes."""
        self.target.set_long_rope(self.long_rope)
        tree = self.draft()
        step = TreeStep(self.lengths, tree.ancestors, tree.depths)
        return tree, *self.target.verify(tree.tokens, step, self.cache)

    def accept(self, tree: Tree, logits: torch.Tensor) -> torch.Tensor:
        """The accepted nodes [B, A]; `emitted`, `counts` and `roots` are then the next ones.

        Of NaN logits -1 is emitted, which the host reports.
        """
        chosen = self.sampling.choose(logits, self.lengths[:, None] + tree.depths)
        return accept(tree.tokens, tree.parents, chosen, self.lengths, self.ends, self.roots, self.report)

    def commit(self, path: torch.Tensor, features: torch.Tensor) -> None:
        """Compact, absorb and move on by the accepted nodes [B, A]."""
        transfers = self.target.transfers
        self.cache.slab.compact(path, self.counts, self.lengths, transfers)
        if self.drafter:
            nodes, *rows = transfers.packed(self.drafter.device, path, self.emitted, self.counts, self.lengths)
            self.drafter.absorb(features.gather(1, nodes[..., None].expand(-1, -1, features.shape[-1])), *rows)
        self.lengths.add_(self.counts)

    # -- before the first round ------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, ends: torch.Tensor) -> None:
        """Prefill all but the last token of each prompt.

        tokens [B, P] from position 0 on, padded behind with any valid id; prompt_lengths [B] >= 1; ends [B]: the
        length, root not counted, at which a sequence is done. All on the CPU or the target's device.
        """
        device = self.target.device
        tokens, prompt_lengths = tokens.to(device), prompt_lengths.to(device)
        self.lengths.copy_(prompt_lengths - 1)
        self.ends.copy_(ends)
        self.roots.copy_(tokens.gather(1, self.lengths[:, None])[:, 0])
        if self.target.rope_switch is not None:
            self.long_rope.copy_(prompt_lengths > self.target.rope_switch)
        self.target.set_long_rope(self.long_rope)
        lengths = self.lengths
        if self.drafter:
            if self.draft_sampling is not self.sampling:
                self.draft_sampling.copy_(self.sampling)
            roots, lengths = self.target.transfers.packed(self.drafter.device, self.roots, lengths)
            self.drafter.start_without_prefix(roots)
        prefix = tokens.shape[1] - 1
        chunk = max(1, PREFILL_CHUNK // self.batch)
        for start in range(0, prefix, chunk):
            end = min(start + chunk, prefix)
            features = self.target.prefill(tokens[:, start:end], start, self.cache)
            if self.drafter:
                following = tokens[:, start + 1 : end + 1].to(self.drafter.device)
                self.drafter.absorb_prompt(features, following, start, lengths)

    def finish(self, row: int) -> None:
        """Emit nothing more for this sequence."""
        self.ends[row].zero_()  # assigning a number would wait for the device: it is copied there

    @torch.no_grad()
    def adopt(self, rows: torch.Tensor, other: Round) -> None:
        """Let the first sequences of `other` go on here as sequences `rows` [R], whatever those held; the rest go on.

        `other` has the same target, head and tree, and any batch; its texts have to fit into `max_length`.
        """
        self.cache.slab.adopt(rows, other.cache.slab)
        self.sampling.adopt(rows, other.sampling)
        if self.drafter:
            assert other.drafter is not None
            there = rows.to(self.drafter.device)
            if self.draft_sampling is not self.sampling:
                self.draft_sampling.adopt(there, other.draft_sampling)
            self.drafter.adopt(there, other.drafter)
        for name in ("lengths", "roots", "ends", "long_rope"):
            getattr(self, name)[rows] = getattr(other, name)[: len(rows)]
