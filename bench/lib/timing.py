"""Times on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from eagle_fast.decoding.graph import WARMUP_STEPS, GraphedStep
from eagle_fast.decoding.rank_graphs import RankGraphs
from eagle_fast.layers.links import Links

FIRST_GPU = (torch.device("cuda", 0),)


def graphed(work: Callable[[], object], devices: Sequence[torch.device], links: Links | None = None) -> GraphedStep:
    """`work` as one CUDA graph over its devices, or over ranks one for each, captured."""
    step = GraphedStep(work, devices) if links is None else RankGraphs(work, links, devices)
    for _ in range(WARMUP_STEPS + 1):
        step()
    assert step.graph is not None, "the work could not be captured"
    return step


def milliseconds(
    work: Callable[[], object], repeats: int, devices: Sequence[torch.device] = FIRST_GPU, links: Links | None = None
) -> float:
    """Median device time of `work` as a CUDA graph: the host queues all repeats while the first device is kept busy.

    links: between ranks, where it is over some.
    """
    step = graphed(work, devices, links)
    with torch.cuda.device(devices[0]):
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda._sleep(10_000_000)  # some milliseconds
        for start, end in marks:
            start.record()
            step()
            end.record()
        synchronize(devices)
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def wall_milliseconds(
    work: Callable[[], object], repeats: int = 2, devices: Sequence[torch.device] = FIRST_GPU
) -> float:
    """Median time until `work` is done, of the host and the devices together; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(devices)
        started = time.perf_counter()
        work()
        synchronize(devices)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1e3


def synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def bandwidth() -> float:
    """Bytes a second of a read-only stream on this GPU."""
    data = torch.ones(2**30, device="cuda")
    return data.numel() * 4 / milliseconds(data.sum, 10) * 1e3
