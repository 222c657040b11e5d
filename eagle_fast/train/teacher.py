"""What the target teaches: its features and its distribution over the draft vocabulary, computed as they are needed.

B sequences, L tokens, J steps, F feature width, R rows that count, V and Vd the target's and the draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.target import Target
from eagle_fast.train.pool import Batch

BLOCK = 2048  # rows whose logits exist in fp32 at a time


class Lesson(NamedTuple):
    """One batch as the head learns from it."""

    tokens: Tensor  # [B, L + J]
    features: Tensor  # [B, L, F]
    asked: Tensor  # [R] positions in [B * L]
    targets: Tensor  # [R, Vd] the target's probabilities after them; less than 1 together
    best: Tensor  # [R] draft id of the target's most likely token, -1 where the draft vocabulary lacks it


class Teacher:
    """`target`, asked about a draft vocabulary `token_ids` [Vd], None for all tokens.

    scale [F]: factors on the features. The head is trained on scaled ones, because a few channels of some models are
    hundreds of times larger than the others, and its `fc` takes the factors in when it is written.
    """

    def __init__(self, target: Target, token_ids: Tensor | None, scale: Tensor):
        self.target, self.token_ids, self.scale = target, token_ids, scale
        self.draft_ids = torch.arange(target.vocab_size, device=target.device)
        if token_ids is not None:
            self.draft_ids = torch.full_like(self.draft_ids, -1)
            self.draft_ids[token_ids] = torch.arange(len(token_ids), device=target.device)

    @torch.no_grad()
    def teach(self, batch: Batch, num_steps: int) -> Lesson:
        width = batch.tokens.shape[1] - num_steps
        logits, features = self.target.read(batch.tokens[:, :width])
        logits = logits.flatten(0, 1)
        vocab_size = self.target.vocab_size if self.token_ids is None else len(self.token_ids)
        targets = torch.empty(len(batch.asked), vocab_size, dtype=self.target.dtype, device=logits.device)
        best = torch.empty_like(batch.asked)
        for first in range(0, len(batch.asked), BLOCK):
            rows = slice(first, first + BLOCK)
            asked = logits.index_select(0, batch.asked[rows])
            best[rows] = self.draft_ids[asked.argmax(-1)]
            log_probs = asked.log_softmax(-1, dtype=torch.float32)
            chosen = log_probs if self.token_ids is None else log_probs.index_select(1, self.token_ids)
            targets[rows] = chosen.exp_()
        scaled = (features * self.scale).to(features.dtype)
        return Lesson(batch.tokens, scaled, batch.asked, targets, best)
