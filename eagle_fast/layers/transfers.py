"""Copies between devices.

A copy is ordered by the streams of both devices and waits for nothing on the host, so it can be captured. It runs on
a side stream of its source, which goes on with its own work meanwhile. Small integer tensors travel packed: a copy of
some hundred bytes costs its latency.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def distinct(devices: Iterable[torch.device]) -> list[torch.device]:
    """The devices without repeats, in the order in which they come first."""
    return list(dict.fromkeys(devices))


class Transfers:
    """Sends tensors for one target. Within a forward, `to` sends a tensor to a device at most once, whoever asks."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # the source is kept, and so is its id
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of `tensor` on another device, whose stream waits for it; that of the tensor does not."""
        source = tensor.device
        if source.type != "cuda":
            return tensor.to(device, non_blocking=True)
        if source not in self._sides:
            self._sides[source] = torch.cuda.Stream(source)
        side = self._sides[source]
        side.wait_stream(torch.cuda.current_stream(source))
        with torch.cuda.stream(side):
            copy = tensor.to(device, non_blocking=True)
        tensor.record_stream(side)
        return copy

    def packed(self, device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors of one dtype, all on one device, sent to `device` as one copy; themselves where they are there."""
        if tensors[0].device == device:
            return tensors
        packed = self.send(torch.cat([each.reshape(-1) for each in tensors]), device)
        parts = packed.split([each.numel() for each in tensors])
        return tuple(part.view(each.shape) for part, each in zip(parts, tensors, strict=True))

    def to(self, tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on `device`."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self._sent:
            self._sent[key] = tensor, self.send(tensor, device)
        return self._sent[key][1]

    def provide(self, tensor: Tensor, local: Tensor) -> None:
        """Let `local`, computed on its own device, stand for `tensor` there: nothing need be sent."""
        self._sent[id(tensor), local.device] = tensor, local

    def forget(self) -> None:
        """The forward is over."""
        self._sent.clear()
