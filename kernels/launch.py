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

from . import check

NO_GUARD = contextlib.nullcontext()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Resources(NamedTuple):
    """What a launch may use of a device."""

    num_sms: int
    shared_memory: int  # bytes per program


def use_triton(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """True if an op over these tensors, all on one device, runs as a Triton kernel.

    Kernels have no backward, compute in fp32 and need data: autograd, float64 and meta tensors take the twin.
    ValueError where the environment asks for a kernel and none can run.
    """
    grad = torch.is_grad_enabled()
    for x in (first, *others):
        if x is not None and ((grad and x.requires_grad) or x.dtype is torch.float64):
            return False
    if "EAGLE_FAST_KERNELS" not in os.environ:  # get() would take as long as a small op on a CPU
        return first.is_cuda
    choice = os.environ["EAGLE_FAST_KERNELS"]
    if choice == "auto":
        return first.is_cuda
    if choice not in ("triton", "ref"):
        raise ValueError(f"EAGLE_FAST_KERNELS={choice!r}: use 'auto', 'triton' or 'ref'")
    if choice == "ref" or first.is_meta:
        return False
    if not runs_triton(first.device):
        raise ValueError(
            f"EAGLE_FAST_KERNELS='triton' and tensors on {first.device}: kernels run on CUDA, and on the CPU with "
            f"TRITON_INTERPRET=1, set before triton is imported; use 'auto'"
        )
    return True


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run there: on CUDA, and interpreted."""
    return device.type == "cuda" or (INTERPRET and device.type == "cpu")


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's, which it mostly is."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return NO_GUARD


def resources(device: torch.device) -> Resources:
    """Of a GPU; interpreted, those of an H100."""
    return _resources(check.device("device", device))


@functools.cache
def _resources(device: torch.device) -> Resources:
    if device.type != "cuda":
        return Resources(132, 232448)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Resources(properties.multi_processor_count, shared_memory)


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter has no bfloat16 arithmetic: kernels that take this flag compute such inputs in fp32 there."""
    return INTERPRET and dtype == torch.bfloat16
