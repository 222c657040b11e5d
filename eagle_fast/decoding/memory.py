"""Whether the keys and values that a call asks for fit, before any work: they are allocated for its longest text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from eagle_fast.decoding.states import IdleStates
from eagle_fast.messages import shown

GIB = 2**30
FOR_SURE = 2**28  # bytes that are not worth asking a device about


def check_memory(states: IdleStates, speculative: bool, batch: int, max_length: int, asked: dict[str, int]) -> None:
    """Raise ValueError where `batch` texts of up to `max_length` tokens don't fit into what the devices have free, with
    what idle states hold counted as free.

    asked: the arguments that say how long the texts may become.
    """
    per_token = token_bytes(states, speculative)
    tokens = batch * max_length
    if tokens * sum(per_token.values()) <= FOR_SURE or _is_idle(states, speculative, batch, max_length):
        return
    held = Counter[torch.device]()
    for lease in list(states.idle):
        for slab in [*lease.state.cache.slab.slabs, *lease.state.drafter.slabs]:
            held[slab.device] += slab.nbytes
    for device, each in per_token.items():
        free = free_bytes(device)
        if free is not None and tokens * each > free + held[device]:
            names = ", ".join(f"{name}={shown(value)}" for name, value in asked.items())
            raise ValueError(
                f"{names}: the keys and values of {shown(batch)} sequence{'s' * (batch > 1)} of {shown(max_length)} "
                f"tokens take {_gib(tokens * each)} GiB, which are allocated at once, and {device} has "
                f"{_gib(free + held[device])} GiB free: about {(free + held[device]) // (each * batch)} tokens fit; "
                f"lower {' or '.join(asked)}"
            )


def token_bytes(states: IdleStates, speculative: bool) -> dict[torch.device, int]:
    """What a token of one sequence takes on each device, in the caches of the target and of the head."""
    found = Counter[torch.device]()
    for shape in states.target.layer_shapes:
        found[shape.device] += shape.token_bytes
    if speculative:
        for head in states.heads or [states.head]:
            widths = [layer.num_kv_heads * layer.head_dim for layer in head.draft_layers]
            found[head.device] += 2 * sum(widths) * head.dtype.itemsize
            found[head.device] += 16 * head.config.head_dim  # its rotary table, while it is computed
    return dict(found)


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated there, blocks that PyTorch keeps included; None where it is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _is_idle(states: IdleStates, speculative: bool, batch: int, max_length: int) -> bool:
    return any(
        lease.speculative == speculative and lease.state.batch == batch and lease.state.max_length >= max_length
        for lease in list(states.idle)
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes < 2**80 else f"more than {2**50}"
