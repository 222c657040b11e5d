"""Bandwidth, copies between GPUs, and one kernel, measured on the spot. Medians; times by CUDA events.

What cannot be measured is None with a reason, never a data sheet's number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eagle_fast_kernels.launch import use_triton
from eagle_fast_kernels.rms_norm import rms_norm

STREAM_BYTES = 4 * 2**30  # far more than a cache holds
COPY_BYTES = 256 * 2**20
SMALL_BYTES = 2**20
WARMUPS, REPEATS, SMALL_COPIES = 8, 20, 20  # a GPU that idled takes some milliseconds to reach its clocks
QUEUE_CYCLES = 3_000_000  # about 2 ms: the host queues small copies meanwhile, so that its own pace is not measured
KERNEL_TOLERANCE = 1e-5  # float32 values of size 1


@dataclass(frozen=True)
class GpuFigures:
    """Bytes a second of a read-only stream and of a copy from pinned host memory; None: see problem."""

    read: float | None = None
    from_host: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Link:
    """Copies from GPU `source` to GPU `target`.

    peer: whether the driver lets them read each other's memory; without it a copy goes through the host.
    small_seconds: one copy of small_bytes; rate: bytes per second of a large one.
    intact: whether what arrived is what was sent.
    """

    source: int
    target: int
    kind: str | None  # nvidia-smi's word for the connection
    peer: bool
    small_bytes: int
    small_seconds: float | None = None
    rate: float | None = None
    intact: bool | None = None
    problem: str = ""


@dataclass(frozen=True)
class KernelCheck:
    """A Triton kernel compiled, run and compared with its twin in PyTorch. seconds: for the first run."""

    runs: bool
    seconds: float = 0.0
    problem: str = ""


def gpu_figures(index: int) -> GpuFigures:
    """Bandwidths of GPU `index`; takes up to 4 GiB of what is free there for a moment."""
    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(STREAM_BYTES, free // 2)
    if size < COPY_BYTES:
        return GpuFigures(problem=f"only {free / 2**20:.0f} MiB are free, too little to measure")
    try:
        return GpuFigures(_read_rate(device, size), _host_rate(device))
    except RuntimeError as error:  # out of memory, a device fault
        return GpuFigures(problem=_first_line(error))
    finally:
        torch.cuda.empty_cache()


def _read_rate(device: torch.device, size: int) -> float:
    data = torch.ones(size // 4, device=device)
    return data.numel() * 4 / _seconds(device, data.sum)


def _host_rate(device: torch.device) -> float:
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return COPY_BYTES / _seconds(device, lambda: there.copy_(host, non_blocking=True))


def link(source: int, target: int, kind: str | None = None, small_bytes: int = SMALL_BYTES) -> Link:
    """Copies from GPU `source` to GPU `target`, as the engine makes them."""
    peer = torch.cuda.can_device_access_peer(target, source)
    try:
        seconds, rate, intact = _copies(torch.device("cuda", source), torch.device("cuda", target), small_bytes)
        return Link(source, target, kind, peer, small_bytes, seconds, rate, intact)
    except RuntimeError as error:
        return Link(source, target, kind, peer, small_bytes, problem=_first_line(error))
    finally:
        torch.cuda.empty_cache()


def _copies(here: torch.device, there: torch.device, small_bytes: int) -> tuple[float, float, bool]:
    """Seconds of a small copy, bytes per second of a large one, and whether both arrived as they were."""
    data, expected = (torch.arange(COPY_BYTES // 8, device=device) for device in (here, there))
    count = -(-small_bytes // 8)
    little, copy, small = data[:count], torch.zeros_like(expected), torch.zeros_like(expected[:count])
    rate = COPY_BYTES / _seconds(here, lambda: copy.copy_(data, non_blocking=True))
    seconds = _seconds(here, lambda: small.copy_(little, non_blocking=True), inner=SMALL_COPIES)
    return seconds, rate, torch.equal(copy, expected) and torch.equal(small, expected[:count])


def kernel_check(device: torch.device) -> KernelCheck:
    """Compile and run `rms_norm` on a GPU, or its PyTorch twin on the CPU, against the formula written out."""
    x = torch.randn(7, 320, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 1.5, 320)
    wide = x.double()
    expected = (weight * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).float()
    if device.type == "cuda" and not use_triton(x.to(device)):
        return KernelCheck(False, problem="EAGLE_FAST_KERNELS=ref turns the kernels off")
    started = time.perf_counter()
    try:
        out = rms_norm(x.to(device), weight.to(device)).cpu()
    except Exception as error:  # a compiler, a driver or a launch may fail in many ways: the report says how
        return KernelCheck(False, time.perf_counter() - started, f"{type(error).__name__}: {_first_line(error)}")
    seconds, worst = time.perf_counter() - started, float((out - expected).abs().max())
    if not worst <= KERNEL_TOLERANCE:  # also a NaN
        return KernelCheck(False, seconds, f"its result is wrong by {worst:.1e}")
    return KernelCheck(True, seconds)


def _seconds(device: torch.device, work: Callable[[], object], inner: int = 1) -> float:
    """Median time of `work` on a GPU, of `inner` runs in a row each time."""
    with torch.cuda.device(device):
        for _ in range(WARMUPS):
            work()
        torch.cuda.synchronize(device)
        times = []
        for _ in range(REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if inner > 1:
                torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            for _ in range(inner):
                work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / inner)
    return statistics.median(times) / 1e3


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
