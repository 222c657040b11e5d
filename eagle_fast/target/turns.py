"""Whose turn it is to launch: one thread at a time, and on the devices one after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from eagle_fast.layers.transfers import distinct


class ForkedProcessError(RuntimeError):
    """A model on a GPU was called in a process forked from the one that loaded it: CUDA does not work there."""


class Turns:
    """Calls may run interleaved or in several threads, one round at a time: whoever launches takes a turn,

        with turns.lock, turns():

    The layers of a target learn from one place which forward they belong to, so two can never be launched at once.
    The lock is entered by the statement itself, so that an interrupt at any moment leaves it free.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self.launched = {device: torch.cuda.Event() for device in distinct(devices) if device.type == "cuda"}
        self._locks = {os.getpid(): threading.RLock()}
        self._ended = True  # whether the last turn came to its end

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """This process's own: after a fork it is nobody's turn, whoever's it was in the parent.

        A fork does not take OpenMP's threads along, and waits for them for ever in the first loop that is spread over
        them: as in workers of a DataLoader, torch is set to one thread there. Raises ForkedProcessError.
        """
        process = os.getpid()
        if process in self._locks:
            return self._locks[process]
        if self.launched:
            raise ForkedProcessError(
                f"the model is on {', '.join(map(str, self.launched))}, and CUDA does not work in a process forked "
                "from the one that initialized it: start processes by spawn, as in "
                "multiprocessing.get_context('spawn'), and load the model there"
            )
        torch.set_num_threads(1)
        return self._locks.setdefault(process, threading.RLock())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Launch, with the lock held. What was launched in earlier turns, on whatever streams, runs first."""
        if not self._ended:  # an interrupt came before its end was marked
            for device in self.launched:
                torch.cuda.synchronize(device)
        streams = {device: torch.cuda.current_stream(device) for device in self.launched}
        for device, stream in streams.items():
            stream.wait_event(self.launched[device])
        self._ended = False
        try:
            with own_precision():
                yield
        finally:
            for device, stream in streams.items():
                self.launched[device].record(stream)
            self._ended = True


@contextmanager
def own_precision() -> Iterator[None]:
    """Without `torch.autocast`: a model decodes in its own precision, and a captured round cannot have two."""
    with ExitStack() as stack:
        for device_type in autocast_on():
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def autocast_on() -> list[str]:
    """The types of devices that `torch.autocast` is on for."""
    return [device_type for device_type in ("cpu", "cuda") if torch.is_autocast_enabled(device_type)]
