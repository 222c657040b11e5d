"""How kernels that follow each other keep the memory busy in between: overlapping launches, and fetching ahead into L2.

Programmatic dependent launch (Hopper on): a kernel starts while the one before it still runs. Each says so to the next
with gdc_launch_dependents, and every program of it passes gdc_wait before it reads or writes anything: earlier it may
only ask for weights to be fetched into L2. The wait is what orders it after all earlier kernels, so a kernel launched
this way that left it out would break the chain.

Fetching ahead: what runs between two large products is short but leaves the memory idle. One of these kernels may get
a few more programs that ask for the first bytes of each row of the next weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import resources

LINE = tl.constexpr(128)  # bytes that one instruction fetches
AHEAD = 16 * 2**20  # bytes to fetch: a third of an H100's L2, 5 us of its memory


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keywords to launch a kernel that takes PDL."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def fetch_ahead(weight: Tensor | None) -> dict[str, Any]:
    """Keywords for a kernel that takes NEXT_LINES, fetch_programs and what `fetch` takes; weight [N, K] or None."""
    if weight is None or not AHEAD or not dependent_launch(weight.device)["PDL"]:
        return {"next_ptr": None, "next_rows": 0, "next_stride": 0, "fetch_programs": 0, "NEXT_LINES": 1}
    assert weight.stride(1) == 1
    lines = min(weight.shape[1] * weight.element_size(), AHEAD // len(weight)) // 128
    return {
        "next_ptr": weight, "next_rows": len(weight), "next_stride": weight.stride(0),
        "fetch_programs": 2 * resources(weight.device).num_sms, "NEXT_LINES": 1 << max(lines, 1).bit_length() - 1,
    }  # fmt: skip


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the results of all earlier ones."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch(next_ptr, next_rows, next_stride, program, num_programs, NEXT_LINES: tl.constexpr):
    """Ask for this program's share of the first NEXT_LINES lines of each row. Eight rows a step."""
    share = tl.cdiv(next_rows, num_programs)
    line = tl.arange(0, NEXT_LINES)[None, :] * LINE
    end = tl.minimum((program + 1) * share, next_rows)
    for first in range(program * share, end, 8):
        row = tl.minimum(first + tl.arange(0, 8), end - 1)
        addresses = (next_ptr + row.to(tl.int64) * next_stride).to(tl.int64)[:, None] + line
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
        )
