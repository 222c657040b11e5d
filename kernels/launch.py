"""Where an op runs, and how its kernel is launched.

Every op of this folder is a pair: a Triton kernel behind a wrapper, and a `_ref` twin in plain PyTorch. `use_triton`
picks one by the tensors' device; the environment variable EAGLE_FAST_KERNELS overrides it for debugging:

    auto    (default) CUDA tensors take the kernel, others the twin
    triton  always the kernel; on CPU tensors this needs TRITON_INTERPRET=1, set before triton is imported
    ref     always the twin
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import NamedTuple

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Resources(NamedTuple):
    """What a launch may use of a device."""

    num_sms: int
    shared_memory: int  # bytes per program


def use_triton(*tensors: torch.Tensor) -> bool:
    """True if an op over these tensors runs as a Triton kernel. Kernels have no backward: autograd takes the twin."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    choice = os.environ.get("EAGLE_FAST_KERNELS", "auto")
    if choice == "auto":
        return tensors[0].is_cuda
    if choice not in ("triton", "ref"):
        raise ValueError(f"EAGLE_FAST_KERNELS={choice!r}: use 'auto', 'triton' or 'ref'")
    return choice == "triton"


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def resources(device: torch.device) -> Resources:
    """Of a GPU; interpreted, those of an H100."""
    if device.type != "cuda":
        return Resources(132, 232448)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Resources(properties.multi_processor_count, shared_memory)


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter has no bfloat16 arithmetic: kernels that take this flag compute such inputs in fp32 there."""
    return INTERPRET and dtype == torch.bfloat16
