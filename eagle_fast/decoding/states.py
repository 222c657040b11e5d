"""Decoding states that outlive a call: buffers and captured graphs are kept for the next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.graph import GraphedStep
from eagle_fast.decoding.round import Round
from eagle_fast.head import DraftHead
from eagle_fast.layers.transfers import distinct
from eagle_fast.target import Target

LENGTH_STEP = 1024
Lease = tuple[Round, GraphedStep]


class IdleStates(list[Lease]):
    """The states that no call uses at the moment; two running calls never share one.

    Calls may run interleaved or in several threads, one round at a time: whoever launches a round takes a `turn`,
    because the model's layers learn from one place which step they belong to.
    """

    def __init__(self, target: Target, head: DraftHead, tree: TreeConfig):
        super().__init__()
        self.target, self.head, self.tree = target, head, tree
        self.lock = threading.RLock()
        gpus = [device for device in distinct([*target.devices, head.device]) if device.type == "cuda"]
        self.launched = {device: torch.cuda.Event() for device in gpus}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock and launch. What was launched in earlier turns, on whatever streams, runs first."""
        with self.lock:
            streams = {device: torch.cuda.current_stream(device) for device in self.launched}
            for device, stream in streams.items():
                stream.wait_event(self.launched[device])
            try:
                yield
            finally:
                for device, stream in streams.items():
                    self.launched[device].record(stream)

    @contextmanager
    def lease(self, speculative: bool, batch: int, max_length: int) -> Iterator[Lease]:
        """A state for `batch` sequences of up to `max_length` tokens: an idle one, or a new one in place of one too
        small. It is idle again after the block, even with a round under way: the next one comes behind it."""
        with self.turn():
            leased = self._take(speculative, batch, max_length) or self._new(speculative, batch, max_length)
        try:
            yield leased
        finally:
            self.append(leased)

    def _take(self, speculative: bool, batch: int, max_length: int) -> Lease | None:
        """An idle state that is large enough; those too small are dropped if there is none."""
        alike = [each for each in self if each[0].batch == batch and (each[0].drafter is not None) == speculative]
        large = next((each for each in alike if each[0].max_length >= max_length), None)
        dropped = alike if large is None else [large]
        self[:] = [each for each in self if not any(each is other for other in dropped)]
        return large

    def _new(self, speculative: bool, batch: int, max_length: int) -> Lease:
        rounded = -(-max_length // LENGTH_STEP) * LENGTH_STEP
        arguments = self.target, self.head if speculative else None, self.tree, batch, rounded
        state = None
        try:
            state = Round(*arguments)
        except torch.OutOfMemoryError:
            if not self:
                raise
        if state is None:  # idle states of other sizes held the memory
            self.clear()
            torch.cuda.empty_cache()
            state = Round(*arguments)
        return state, GraphedStep(state.step, state.devices)
