"""Times on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median device time of `work` as a CUDA graph: the host queues all repeats while the device is kept busy."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(10_000_000)  # some milliseconds
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def wall_milliseconds(work: Callable[[], object], repeats: int = 2) -> float:
    """Median time until `work` is done, of the host and the device together; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1e3


def bandwidth() -> float:
    """Bytes a second of a read-only stream on this GPU."""
    data = torch.ones(2**30, device="cuda")
    return data.numel() * 4 / milliseconds(data.sum, 10) * 1e3
