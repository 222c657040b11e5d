"""Devices and memory as users write them: device_map, max_memory, draft_device, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from eagle_fast.messages import warn_user

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device(device_map, name: str = "device_map") -> torch.device:
    """The one device that a device_map names: None, "cpu", "cuda", "cuda:N", an index, a device or {"": device}.

    "auto" is the first GPU, or the CPU where there is none. name: the argument, for the ValueError.
    """
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return present_device(device_map, f"{name}={device_map!r}")


def present_device(value: Any, name: str) -> torch.device:
    """The device that `value` stands for, which has to be there. name: how to call it in the ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"cuda:{value}"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: use 'auto', 'cpu', 'cuda' or 'cuda:N', 'balanced' and its like for GPUs") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"{name}: {str(device)!r}, but torch sees no GPU: pass 'cpu', or install a CUDA build")
        if (device.index or 0) >= count:
            raise ValueError(f"{name}: {str(device)!r}, but torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ValueError(f"{name}: eagle_fast runs on CUDA GPUs and on the CPU")
    return device


MOST_RANKS = 2  # that have ever run


def resolve_ranks(value: Any) -> list[torch.device] | None:
    """The devices that tensor_parallel names: None or False for none, True for all GPUs, their number, or a list.

    ValueError for others, and for more than have ever run, which is a warning where their number was given.
    """
    name = f"tensor_parallel={value!r}"
    if value is None or value is False:
        return None
    if value is True:
        count = torch.cuda.device_count()
        if count > MOST_RANKS:
            raise ValueError(
                f"{name} is all {count} GPUs, and more than {MOST_RANKS} have not yet run: pass "
                f"tensor_parallel={MOST_RANKS}, or {count} to try it"
            )
        if count < 2:
            raise ValueError(f"{name}: it takes two GPUs, and torch sees {count}: leave it out")
        value = count
    if isinstance(value, int):
        if value < 2:
            raise ValueError(f"{name}: give the number of GPUs, 2 or more, or leave it out")
        value = list(range(value))
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise ValueError(f"{name}: use True, a number of GPUs, or a list of two devices or more")
    devices = [present_device(each, name) for each in value]
    kinds = {device.type for device in devices}
    if len(kinds) > 1:
        raise ValueError(f"{name}: give GPUs alone; a CPU beside them would hold each round up")
    if kinds == {"cuda"} and len(set(devices)) < len(devices):
        raise ValueError(f"{name} names a GPU twice: its ranks would wait for each other; give each GPU once")
    if kinds == {"cuda"} and len(devices) > MOST_RANKS:
        warn_user(f"{name}: more than {MOST_RANKS} GPUs have not yet run; compare texts with tensor_parallel=2 first")
    return devices


def check_device_map(device_map: Any) -> None:
    """ValueError for a device_map that is no dict of module names; what other maps name is checked where it is used."""
    if not isinstance(device_map, dict):
        return
    if not device_map:
        raise ValueError("device_map={}: it names no module; leave it out, or give each module a device")
    odd = [name for name in device_map if not isinstance(name, str)]
    if odd:
        raise ValueError(
            f"device_map has the key {odd[0]!r}: keys are names of modules, as 'model.layers.0' or '' for the whole "
            "model, and devices are the values"
        )


def check_max_memory(max_memory: Any) -> None:
    """ValueError for a max_memory that accelerate would not understand."""
    if max_memory is None:
        return
    if not isinstance(max_memory, dict):
        raise ValueError(f"max_memory={max_memory!r}: use a dict of GPU indices and 'cpu', as {{0: '70GiB', 'cpu': 0}}")
    for device, size in max_memory.items():
        index = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if not index and device not in ("cpu", "disk"):
            raise ValueError(f"max_memory has the key {device!r}: use indices of GPUs, 'cpu' or 'disk'")
        if isinstance(device, int):
            present_device(device, f"max_memory[{device}]")
        try:
            count = convert_file_size_to_int(size) if isinstance(size, str) else size
        except ValueError:
            count = -1
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"max_memory[{device!r}]={size!r}: use bytes, or a size like '70GiB'")
