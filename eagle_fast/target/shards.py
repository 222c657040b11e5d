"""A model over several devices: what runs where, and what is sent between.

A shard is a run of consecutive decoder layers on one device. The stock forward runs as it is on the twin; in front of
every module that lies on one device as a whole, a hook brings its inputs there. Hidden states thus cross a boundary
once, and what every device can compute by itself (positions, rotary cos and sin) is not sent at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from eagle_fast.layers.transfers import Transfers, distinct
from eagle_fast.target.anatomy import is_rotary


class Shard(NamedTuple):
    """Consecutive decoder layers on one device."""

    device: torch.device
    layers: range


def devices_of(module: nn.Module) -> list[torch.device]:
    """The devices of a module's parameters and buffers."""
    return distinct(tensor.device for tensor in [*module.parameters(), *module.buffers()])


def shards_of(layers: nn.ModuleList) -> list[Shard]:
    """The runs of consecutive layers that share a device. A layer on several devices is a ValueError."""
    shards: list[Shard] = []
    for index, layer in enumerate(layers):
        device, *more = devices_of(layer)
        if more:
            names = ", ".join(str(each) for each in [device, *more])
            raise ValueError(f"decoder layer {index} lies on {names}: give every layer one device in the device_map")
        if shards and shards[-1].device == device:
            shards[-1] = Shard(device, range(shards[-1].layers.start, index + 1))
        else:
            shards.append(Shard(device, range(index, index + 1)))
    return shards


def whole_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, torch.device]]:
    """(name, module, device) of the largest modules that lie on one device, in the model's own order. A list of modules
    is none: nobody calls it."""
    for name, child in model.named_children():
        devices = devices_of(child)
        if len(devices) == 1 and not isinstance(child, nn.ModuleList):
            yield prefix + name, child, devices[0]
        elif devices:
            yield from whole_modules(child, f"{prefix}{name}.")


def connect(model: nn.Module, transfers: Transfers, local: list[torch.device]) -> list[torch.device]:
    """Let a model over several devices run as if on one; returns its devices. `model` is a twin, and is changed.

    local: the devices of the embedding and the decoder layers, each of which computes its own rotary cos and sin.
    """
    devices = devices_of(model)
    if len(devices) > 1:
        for name, module, device in list(whole_modules(model)):
            parent, _, leaf = name.rpartition(".")
            if is_rotary(name, module):
                model.get_submodule(parent)._modules[leaf] = Replicas(module, local, transfers)
            else:
                module.register_forward_pre_hook(_Arrival(device, transfers), with_kwargs=True)
    return devices


class _Arrival:
    """A hook that brings a module's inputs to its device."""

    def __init__(self, device: torch.device, transfers: Transfers):
        self.device, self.transfers = device, transfers

    def __call__(self, module: nn.Module, args, kwargs):
        return tree_map(self._arrive, (args, kwargs))

    def _arrive(self, value: Any) -> Any:
        return self.transfers.to(value, self.device) if isinstance(value, torch.Tensor) else value


class Replicas(nn.Module):
    """A rotary embedding on every device. The hidden states that it is called with lend their dtype and device only."""

    def __init__(self, stock: nn.Module, devices: list[torch.device], transfers: Transfers):
        super().__init__()
        self.devices, self.transfers = devices, transfers
        self.copies = nn.ModuleList(copy.deepcopy(stock).to(device) for device in devices)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """What the stock module returns, on the device of `hidden_states`; layers elsewhere find theirs there."""
        outputs = {}
        for device, module in zip(self.devices, self.copies, strict=True):

            def local(value: Any, device: torch.device = device) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                return (
                    torch.empty_like(value, device=device)
                    if value.is_floating_point()
                    else self.transfers.to(value, device)
                )

            outputs[device] = module(*tree_map(local, (hidden_states, *args)), **tree_map(local, kwargs))
        here = outputs[hidden_states.device]
        for output in outputs.values():
            for mine, theirs in zip(tree_leaves(here), tree_leaves(output), strict=True):
                self.transfers.provide(mine, theirs)
        return here
