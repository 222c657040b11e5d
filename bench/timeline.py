"""Where the time of a round goes: what each kernel adds to it, from a profile of the round as one CUDA graph.

    python bench/timeline.py llama-3.1-8b --context 512 --tree 60 7 10

Kernels overlap where one starts before the one before it has ended, so durations do not add up. What a kernel adds is
the time from the end of all earlier kernels to its own end: that adds up to the round, waits included.
"""

from __future__ import annotations

import argparse
import collections
import json
from typing import NamedTuple

import torch
from lib.shapes import build_head, build_target
from lib.timing import graphed
from round import add_round_arguments, begin, prompt, repeatable
from torch.profiler import ProfilerActivity, profile

from eagle_fast import EaModel, TreeConfig
from eagle_fast.decoding.graph import GraphedStep
from eagle_fast.decoding.round import Round

REPLAYS = 5


class Span(NamedTuple):
    """One kernel of a profile, in us."""

    name: str
    start: float
    end: float


def spans(step: GraphedStep) -> list[Span]:
    """The kernels of several replays, in the order in which they ended."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPLAYS):
            step()
        torch.cuda.synchronize()
    device_events = (e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    found = [Span(e.name, e.time_range.start, e.time_range.end) for e in device_events]
    return sorted(found, key=lambda span: span.end)


def short(name: str) -> str:
    """A kernel's name without its template arguments and namespaces."""
    plain = name.removeprefix("void ").split("<")[0].split("(")[0]
    return plain.rpartition("::")[2] or name[:40]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_round_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="a token of plain decoding instead")
    parser.add_argument("--no-int8", action="store_true", help="the head's weights stay in bf16")
    return parser.parse_args()


def prefilled(args: argparse.Namespace) -> Round:
    """A round after a prompt of random tokens."""
    target, tree = build_target(args.shape, "cuda"), TreeConfig(*args.tree)
    model = EaModel(target, build_head(target, int8=False if args.no_int8 else None), tree=tree, adaptive=False)
    state = Round(model.target, None if args.plain else model.ea_layer, tree, args.batch, args.context + tree.max_path)
    begin(state, prompt(model, args), temperature=0.0)
    return state


@torch.no_grad()
def main() -> None:
    args = parse()
    state = prefilled(args)
    step = graphed(repeatable(state), state.devices)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    recorded = spans(step)
    added: dict[str, list[float]] = collections.defaultdict(list)
    durations: dict[str, float] = collections.defaultdict(float)
    reached = recorded[0].start
    for span in recorded:
        added[short(span.name)].append(max(span.end - reached, 0.0))
        durations[short(span.name)] += span.end - span.start
        reached = max(reached, span.end)
    total = reached - min(span.start for span in recorded)
    print(f"{args.shape}, {'plain token' if args.plain else 'round'}: {total / REPLAYS:.0f} us in "
          f"{len(recorded) // REPLAYS} kernels")  # fmt: skip
    print(f"{'kernel':<44}{'launches':>9}{'adds, us':>10}{'share':>7}{'each, us':>10}{'duration':>10}")
    table = sorted(added.items(), key=lambda item: -sum(item[1]))
    for name, parts in table[:30]:
        print(f"{name[:43]:<44}{len(parts) / REPLAYS:>9.0f}{sum(parts) / REPLAYS:>10.1f}{sum(parts) / total:>7.1%}"
              f"{sum(parts) / len(parts):>10.2f}{durations[name] / len(parts):>10.2f}")  # fmt: skip
    print(json.dumps({name: round(sum(parts) / REPLAYS, 1) for name, parts in table}))


if __name__ == "__main__":
    main()
