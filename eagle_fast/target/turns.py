"""Whose turn it is to launch: one thread at a time, and on the devices one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from eagle_fast.layers.transfers import distinct


class Turns:
    """Calls may run interleaved or in several threads, one round at a time: whoever launches takes a turn.

    The layers of a target learn from one place which forward they belong to, so two can never be launched at once.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self.lock = threading.RLock()
        self.launched = {device: torch.cuda.Event() for device in distinct(devices) if device.type == "cuda"}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the lock and launch. What was launched in earlier turns, on whatever streams, runs first."""
        with self.lock, own_precision():
            streams = {device: torch.cuda.current_stream(device) for device in self.launched}
            for device, stream in streams.items():
                stream.wait_event(self.launched[device])
            try:
                yield
            finally:
                for device, stream in streams.items():
                    self.launched[device].record(stream)


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
