"""Copies between devices.

A copy is ordered by the streams of both devices and waits for nothing on the host, so it can be captured. Small integer
tensors travel packed: what a copy of some hundred bytes costs is its latency.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def packed_to(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one dtype, all on one device, sent to `device` as one copy; themselves where they are there."""
    if tensors[0].device == device:
        return tensors
    packed = torch.cat([each.reshape(-1) for each in tensors]).to(device, non_blocking=True)
    parts = packed.split([each.numel() for each in tensors])
    return tuple(part.view(each.shape) for part, each in zip(parts, tensors, strict=True))


def distinct(devices: Iterable[torch.device]) -> list[torch.device]:
    """The devices without repeats, in the order in which they come first."""
    return list(dict.fromkeys(devices))


class Transfers:
    """What one forward has sent between devices: a tensor goes to a device at most once, whoever asks for it."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # the source is kept, and so is its id

    def to(self, tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on `device`."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self._sent:
            self._sent[key] = tensor, tensor.to(device, non_blocking=True)
        return self._sent[key][1]

    def provide(self, tensor: Tensor, local: Tensor) -> None:
        """Let `local`, computed on its own device, stand for `tensor` there: nothing need be sent."""
        self._sent[id(tensor), local.device] = tensor, local

    def forget(self) -> None:
        """The forward is over."""
        self._sent.clear()
