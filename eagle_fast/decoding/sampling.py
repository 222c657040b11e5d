"""Sampling settings as device tensors, so that one captured graph serves them all.

Sampling is a deterministic function: the token after a node at absolute position p is, of those that the warpers keep,
argmax_v(logits[v] / temperature + G(seed, sequence, p, v)) with standard Gumbel noise G from a counter-based generator
(`eagle_fast_kernels.noise`). Each position's noise is used once, whatever the tree looked like, so decoding
with and without speculation gives the same tokens for the same seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from eagle_fast_kernels.sample import sample
from eagle_fast_kernels.sample_warp import warp

from eagle_fast.config import MAX_SEED, SamplingParams

SHARPNESS = 1.25  # k of `draft_scales`, measured


class DraftScales(NamedTuple):
    """How a draft scores the token v after a node: log_softmax(gain z + share G)[v], z its logits, G the noise."""

    gain: float
    share: float


def draft_scales(temperature: float, shared_noise: bool) -> DraftScales:
    """What makes a draft's scores honest: the log-probability that the target will choose v, as far as a draft knows.

        with the noise    gain = k,                                    share = T        k = SHARPNESS
        without           gain = 1 / sqrt((1 - T^2) / k^2 + T^2),      share = 0

    docs/design.md, "The draft's scores", derives both.
    """
    if shared_noise:
        return DraftScales(SHARPNESS, temperature)
    return DraftScales(1 / math.sqrt((1 - temperature**2) / SHARPNESS**2 + temperature**2), 0.0)


class SamplingTensors:
    """Per-sequence settings [B]; `draft_gain` and `draft_share` are those of `DraftScales`."""

    def __init__(self, batch: int, device: torch.device):
        self.temperature = torch.zeros(batch, dtype=torch.float32, device=device)
        self.draft_gain = torch.ones(batch, dtype=torch.float32, device=device)
        self.draft_share = torch.zeros(batch, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(batch, dtype=torch.long, device=device)
        self.top_p = torch.ones(batch, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(batch, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.long, device=device)
        self.sequences = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def parts(self) -> list[SamplingTensors]:
        """Those of one device each."""
        return [self]

    def load(self, params: SamplingParams, shared_noise: bool) -> None:
        """Fill in place. One seed: its streams differ by sequence; a seed per sequence: each as if it ran alone."""
        batch, device = self.seeds.numel(), self.seeds.device
        self.temperature.fill_(params.temperature)
        gain, share = draft_scales(params.temperature, shared_noise)
        self.draft_gain.fill_(gain)
        self.draft_share.fill_(share)
        self.top_k.fill_(params.top_k)
        self.top_p.fill_(max(params.top_p, torch.finfo(torch.float32).tiny) if params.top_p else 1.0)
        self.min_p.fill_(params.min_p)
        if isinstance(params.seed, tuple):
            if len(params.seed) != batch:
                raise ValueError(f"{len(params.seed)} seeds for {batch} sequences: pass one integer or {batch} of them")
            self.seeds.copy_(torch.tensor(params.seed, device=device))
            self.sequences.zero_()
        else:
            seed = params.seed
            if seed is None:  # the default generator is only asked where its answer is used
                seed = int(torch.randint(MAX_SEED, (), device="cpu").item()) if params.temperature > 0 else 0
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

    def warp(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What tokens [B, T] were chosen from: logits [B, T, V] over the temperature, -inf at what the warpers remove;
        of greedy sequences the logits."""
        return warp(logits, tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    def warp_row(self, scores: torch.Tensor, row: int, token: int) -> torch.Tensor:
        """The same for one sequence and one node: scores [1, V] -> [1, V]."""
        one = slice(row, row + 1)
        tokens = torch.full((1, 1), token, dtype=torch.long, device=scores.device)
        settings = self.temperature[one], self.top_k[one], self.top_p[one], self.min_p[one]
        return warp(scores[:, None], tokens, *settings)[:, 0]
