"""Completes prompts with the target, many at a time, starting a new one as soon as another is done.

B sequences under way, N steps between two looks at what they emitted.

Decoding is the plain round (a tree of the root alone), so a step is one CUDA graph. The host looks every N steps: it
cuts each text at its first stop token and admits new prompts in place of finished ones, by prefilling them in a small
round of their own, which the large one adopts. Bytes of a step: the target's weights, and K and V of all live rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.generation import NaNLogitsError
from eagle_fast.decoding.graph import GraphedStep
from eagle_fast.decoding.round import Round
from eagle_fast.target import Target

STEPS = 16  # a text runs STEPS / 2 tokens too far on average; a look takes the host some milliseconds
ENTRY_SHARE = 16  # one of these of the batch is adopted together


class Job(NamedTuple):
    """A prompt to complete with at most `max_new` tokens. temperature 0 is greedy; `tag` is the caller's."""

    prompt: list[int]
    max_new: int
    temperature: float = 1.0
    min_p: float = 0.0
    tag: Any = None


class Completion(NamedTuple):
    job: Job
    number: int  # of prompts started before it; its noise is that of the sequence of this number
    tokens: np.ndarray  # int32, with the stop token
    ended: bool  # by a stop token, not by max_new


class Completer:
    """Texts of up to `max_prompt` + `max_new` tokens; every prompt gets noise of its own from `seed`."""

    def __init__(self, target: Target, batch: int, max_prompt: int, max_new: int, stop_ids: list[int], seed: int = 0):
        self.device, self.max_prompt, self.max_new = target.device, max_prompt, max_new
        self.state = Round(target, None, TreeConfig(), batch, max_prompt + max_new)
        self.entry = Round(target, None, TreeConfig(), max(1, batch // ENTRY_SHARE), max_prompt)
        for round_ in (self.state, self.entry):
            round_.sampling.seeds.fill_(seed)
        self.step = GraphedStep(self.state.step, self.state.devices)
        self.recent = torch.zeros(STEPS, batch, dtype=torch.long, device=target.device)
        self.is_stop = np.zeros(target.vocab_size, dtype=bool)
        self.is_stop[stop_ids] = True
        self.num_started = 0
        self.jobs: list[Job | None] = [None] * batch
        self.numbers = np.zeros(batch, dtype=np.int64)
        self.busy = np.zeros(batch, dtype=bool)
        self.counts = np.zeros(batch, dtype=np.int64)
        self.limits = np.zeros(batch, dtype=np.int64)
        self.texts = np.zeros((batch, max_new + STEPS), dtype=np.int32)

    @torch.no_grad()
    def advance(self, next_job: Callable[[], Job]) -> list[Completion]:
        """Admit prompts where there is room, decode STEPS tokens of every text; returns what got finished."""
        self._admit(next_job)
        for step in range(STEPS):
            self.step()
            self.recent[step].copy_(self.state.emitted[:, 0])
        return self._collect(self.recent.cpu().numpy().T)

    def _admit(self, next_job: Callable[[], Job]) -> None:
        """Only full rounds of new prompts, unless nothing else is left to run."""
        free, size = np.flatnonzero(~self.busy), self.entry.batch
        if self.busy.any():
            free = free[: len(free) // size * size]
        jobs = [next_job() for _ in free]
        for first in range(0, len(free), size):
            self._start(free[first : first + size], jobs[first : first + size])

    def _start(self, rows: np.ndarray, jobs: list[Job]) -> None:
        entry = self.entry
        padding = [Job([0], 0)] * (entry.batch - len(jobs))
        prompts = [job.prompt for job in jobs + padding]
        assert max(map(len, prompts)) <= self.max_prompt
        assert max(job.max_new for job in jobs) <= self.max_new
        entry.sampling.temperature.copy_(torch.tensor([job.temperature for job in jobs + padding]))
        entry.sampling.min_p.copy_(torch.tensor([job.min_p for job in jobs + padding]))
        entry.sampling.sequences.copy_(torch.arange(entry.batch) + self.num_started)
        entry.begin(prompts, [len(job.prompt) + job.max_new - 1 for job in jobs + padding])
        self.state.adopt(torch.from_numpy(rows).to(self.device), entry)
        self.numbers[rows] = self.num_started + np.arange(len(jobs))
        self.num_started += len(jobs)
        for row, job in zip(rows, jobs, strict=True):
            self.jobs[row], self.limits[row] = job, job.max_new
        self.busy[rows], self.counts[rows] = True, 0

    def _collect(self, new: np.ndarray) -> list[Completion]:
        """Take in new tokens [B, STEPS]; what follows a stop token or passes the limit is dropped."""
        rows = np.flatnonzero(self.busy)
        columns = self.counts[rows, None] + np.arange(STEPS)
        within = columns < self.limits[rows, None]
        tokens = np.where(within, new[rows], 0)
        if (tokens < 0).any():
            raise NaNLogitsError("the target's logits are NaN or infinite: load it with dtype=bfloat16 or float32")
        self.texts[rows[:, None], columns] = tokens
        stops = self.is_stop[tokens] & within
        ended = stops.any(1)
        kept = np.where(ended, stops.argmax(1) + 1, within.sum(1))
        self.counts[rows] += kept
        done = ended | (self.counts[rows] >= self.limits[rows])
        self.busy[rows[done]] = False
        self.state.ends[torch.from_numpy(rows[done]).to(self.device)] = 0
        return [self._completion(row, bool(stop)) for row, stop in zip(rows[done], ended[done], strict=True)]

    def _completion(self, row: int, ended: bool) -> Completion:
        job = self.jobs[row]
        assert job is not None
        return Completion(job, int(self.numbers[row]), self.texts[row, : self.counts[row]].copy(), ended)
