"""Work that overlaps (Hopper on): kernels that start early, and weights that are fetched ahead.

Programmatic dependent launch: a kernel starts while the one before it still runs.

Each kernel says so to the next with gdc_launch_dependents, and every program of it passes gdc_wait before it reads or
writes anything: earlier it may only ask for weights to be fetched into L2. The wait is what orders it after all earlier
kernels, so a kernel launched this way that left it out would break the chain.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keywords to launch a kernel that takes PDL."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the results of all earlier ones."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def can_fetch(tensor: torch.Tensor) -> bool:
    """Whether `fetch_ahead` may be given this tensor: whole 16 bytes of memory, 4 KB at least."""
    return tensor.is_contiguous() and tensor.nbytes >= 4096 and tensor.nbytes % 16 == tensor.data_ptr() % 16 == 0


@triton.jit
def fetch_ahead(ptr, num_bytes, index, THREADS: tl.constexpr):
    """Ask for part `index` of what lies at ptr to be brought into L2: 4 KB a thread, and wait for none of it."""
    first = (index.to(tl.int64) * THREADS + tl.arange(0, THREADS)) * 4096
    addresses = ptr.to(tl.int64) + tl.minimum(first, num_bytes - 4096)  # past the end: the last again
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 4096; // $0", "=r,l", [addresses],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
