"""Decoding states that outlive a call: buffers and captured graphs are kept for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.graph import GraphedStep
from eagle_fast.decoding.records import Keeps
from eagle_fast.decoding.round import Round
from eagle_fast.head import DraftHead
from eagle_fast.target import Target

LENGTH_STEP = 1024


class Lease(NamedTuple):
    """What a call has for itself."""

    state: Round
    step: GraphedStep
    speculative: bool


class IdleStates:
    """The states that no call uses at the moment, in `idle`; two running calls never share one."""

    def __init__(self, target: Target, head: DraftHead, tree: TreeConfig):
        self.target, self.head, self.tree = target, head, tree
        self.idle: list[Lease] = []

    def clear(self) -> None:
        """Let go of all idle states: their memory is free then."""
        with self.target.turn():
            self._drop(self.idle.copy())

    @contextmanager
    def lease(self, speculative: bool, batch: int, max_length: int, keeps: Keeps = Keeps.NOTHING) -> Iterator[Lease]:
        """A state for `batch` sequences of up to `max_length` tokens: an idle one, or a new one in place of one too
        small. It is idle again after the block, even with a round under way: the next one comes behind it."""
        wanted = speculative, batch, max_length, keeps
        with self.target.turn():
            leased = self._take(*wanted) or self._new(*wanted)
        try:
            yield leased
        finally:
            self.idle.append(leased)

    def _take(self, speculative: bool, batch: int, max_length: int, keeps: Keeps) -> Lease | None:
        """An idle state that is large enough; those too small are dropped if there is none."""
        kind = speculative, batch, keeps
        alike = [each for each in self.idle if (each.speculative, each.state.batch, each.state.keeps) == kind]
        large = next((each for each in alike if each.state.max_length >= max_length), None)
        if large is None:
            self._drop(alike)
        else:
            self.idle.remove(large)
        return large

    def _drop(self, leases: list[Lease]) -> None:
        """Let go of idle states, their memory and their graphs."""
        for each in leases:
            self.idle.remove(each)
            each.step.close()

    def _new(self, speculative: bool, batch: int, max_length: int, keeps: Keeps) -> Lease:
        rounded = -(-max_length // LENGTH_STEP) * LENGTH_STEP
        arguments = self.target, self.head if speculative else None, self.tree, batch, rounded, keeps
        state = None
        try:
            state = Round(*arguments)
        except torch.OutOfMemoryError:
            if not self.idle:
                raise
        if state is None:  # idle states of other sizes held the memory
            self.clear()
            torch.cuda.empty_cache()
            state = Round(*arguments)
        return Lease(state, GraphedStep(state.step, state.devices), speculative)
