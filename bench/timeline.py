"""Where the time of a round goes: what each kernel adds to it, from a profile of the round as one CUDA graph.

    python bench/timeline.py llama-3.1-8b --context 512 --tree 60 7 10 [--plain]

Kernels overlap where one starts before the one before it has ended, so durations do not add up. What a kernel adds is
the time from the end of all earlier kernels to its own end: that adds up to the round, waits included. Arguments are
those of bench/round.py.
"""

from __future__ import annotations

import collections
import json
import sys
from typing import NamedTuple

import torch
from round import build_model, parse, repeatable, rounds
from shapes import build_target
from torch.profiler import ProfilerActivity, profile

from eagle_fast import TreeConfig

REPLAYS = 5


class Span(NamedTuple):
    """One kernel of a profile, in us."""

    name: str
    start: float
    end: float


def spans(graph: torch.cuda.CUDAGraph) -> list[Span]:
    """The kernels of several replays, in the order in which they ended."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    device_events = (e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    found = [Span(e.name, e.time_range.start, e.time_range.end) for e in device_events]
    return sorted(found, key=lambda span: span.end)


def short(name: str) -> str:
    """A kernel's name without its template arguments and namespaces."""
    plain = name.removeprefix("void ").split("<")[0].split("(")[0]
    return plain.rpartition("::")[2] or name[:40]


@torch.no_grad()
def main() -> None:
    plain = "--plain" in sys.argv
    if plain:
        sys.argv.remove("--plain")
    args = parse()
    target = build_target(args.shape, "cuda")
    model = build_model(target, TreeConfig(*args.tree), fp8=not args.no_fp8)
    work = repeatable(rounds(model, args)[plain])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    recorded = spans(graph)
    added: dict[str, list[float]] = collections.defaultdict(list)
    durations: dict[str, float] = collections.defaultdict(float)
    reached = recorded[0].start
    for span in recorded:
        added[short(span.name)].append(max(span.end - reached, 0.0))
        durations[short(span.name)] += span.end - span.start
        reached = max(reached, span.end)
    total = reached - min(span.start for span in recorded)
    print(f"{args.shape}, {'plain token' if plain else 'round'}: {total / REPLAYS:.0f} us in "
          f"{len(recorded) // REPLAYS} kernels")  # fmt: skip
    print(f"{'kernel':<44}{'launches':>9}{'adds, us':>10}{'share':>7}{'each, us':>10}{'duration':>10}")
    table = sorted(added.items(), key=lambda item: -sum(item[1]))
    for name, parts in table[:30]:
        print(f"{name[:43]:<44}{len(parts) / REPLAYS:>9.0f}{sum(parts) / REPLAYS:>10.1f}{sum(parts) / total:>7.1%}"
              f"{sum(parts) / len(parts):>10.2f}{durations[name] / len(parts):>10.2f}")  # fmt: skip
    print(json.dumps({name: round(sum(parts) / REPLAYS, 1) for name, parts in table}))


if __name__ == "__main__":
    main()
