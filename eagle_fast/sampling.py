"""Sampling settings as device tensors, so that one captured graph serves them all.

Sampling is a deterministic function: the token after a node at absolute position p is
argmax_v(warped_logits[v] / temperature + G(seed, sequence, p, v)) with standard Gumbel noise G from a counter-based
generator (`eagle_fast_kernels.noise`). Each position's noise is used once, whatever the tree looked like, so decoding
with and without speculation gives the same tokens for the same seed.
"""

from __future__ import annotations

import torch
from eagle_fast_kernels.sample import sample

from eagle_fast.config import MAX_SEED, SamplingParams


class SamplingTensors:
    """Per-sequence settings [B]. `draft_temperature` is 0 where the draft ranks by its own probabilities alone."""

    def __init__(self, batch: int, device: torch.device):
        self.temperature = torch.zeros(batch, device=device)
        self.draft_temperature = torch.zeros(batch, device=device)
        self.top_k = torch.zeros(batch, dtype=torch.long, device=device)
        self.top_p = torch.ones(batch, device=device)
        self.min_p = torch.zeros(batch, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.long, device=device)
        self.sequences = torch.zeros(batch, dtype=torch.long, device=device)

    def load(self, params: SamplingParams, shared_noise: bool) -> None:
        """Fill in place. One seed: its streams differ by sequence; a seed per sequence: each as if it ran alone."""
        batch, device = self.seeds.numel(), self.seeds.device
        self.temperature.fill_(params.temperature)
        self.draft_temperature.fill_(params.temperature if shared_noise else 0.0)
        self.top_k.fill_(params.top_k)
        self.top_p.fill_(params.top_p or 1.0)
        self.min_p.fill_(params.min_p)
        if isinstance(params.seed, tuple):
            if len(params.seed) != batch:
                raise ValueError(f"{len(params.seed)} seeds for {batch} sequences: pass one integer or {batch} of them")
            self.seeds.copy_(torch.tensor(params.seed, device=device))
            self.sequences.zero_()
        else:
            seed = params.seed
            if seed is None:  # the default generator is only asked where its answer is used
                seed = int(torch.randint(MAX_SEED, ()).item()) if params.temperature > 0 else 0
            self.seeds.fill_(seed)
            self.sequences.copy_(torch.arange(batch, device=device))

    def copy_(self, other: SamplingTensors) -> None:
        """Take over the settings of `other`, of as many sequences on any device."""
        for name, mine in vars(self).items():
            mine.copy_(getattr(other, name))

    def adopt(self, rows: torch.Tensor, other: SamplingTensors) -> None:
        """Copy the settings of the first sequences of `other` to sequences `rows` [R] of this one."""
        for name, mine in vars(self).items():
            mine[rows] = getattr(other, name)[: len(rows)]

    def choose(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The token after each node: logits [B, T, V], positions [B, T] of the nodes -> [B, T], -1 where NaN."""
        return sample(
            logits, positions, self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.sequences
        )

    def choose_row(self, scores: torch.Tensor, row: int, position: int) -> int:
        """The same for one sequence and one node, read on the host: scores [1, V] -> token, -1 where NaN."""
        one = slice(row, row + 1)
        positions = torch.full((1, 1), position, dtype=torch.long, device=scores.device)
        token = sample(
            scores[:, None], positions, self.temperature[one], self.top_k[one], self.top_p[one], self.min_p[one],
            self.seeds[one], self.sequences[one],
        )  # fmt: skip
        return int(token)
