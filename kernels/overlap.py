"""Programmatic dependent launch (Hopper on): a kernel starts while the one before it still runs.

Each kernel says so to the next with gdc_launch_dependents, and every program of it passes gdc_wait before it writes
anything, or reads what kernels write: earlier it may only read weights, or ask for them to be fetched into L2. The wait
is what orders it after all earlier kernels, so a kernel launched this way that left it out would break the chain.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import check


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keywords to launch a kernel that takes PDL."""
    return _dependent_launch(check.device("device", device))


@functools.cache
def _dependent_launch(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the results of all earlier ones."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
