"""Where the time of a round goes: what each kernel adds to it, from a profile of the round as one CUDA graph.

    python bench/timeline.py llama-3.1-8b --context 512 --tree 60 7 10
    python bench/timeline.py llama-3.1-8b --rounds 2:24/6/6 8:16/5/4 32:4/3/1

With --rounds, of several sequences:tree one after the other, in place of --batch and --tree. With --tensor-parallel, of
a model over so many GPUs: what the first of them does.

Kernels overlap where one starts before the one before it has ended, so durations do not add up. What a kernel adds is
the time from the end of all earlier kernels to its own end: that adds up to the round, waits included.
"""

from __future__ import annotations

import argparse
import collections
import json
from typing import NamedTuple

import torch
from lib.shapes import build_cut_target, build_head, build_target
from lib.timing import graphed
from round import add_round_arguments, begin, prompt, repeatable
from torch.profiler import ProfilerActivity, profile

from eagle_fast import EaModel, TreeConfig
from eagle_fast.decoding.graph import GraphedStep

REPLAYS = 5


class Span(NamedTuple):
    """One kernel of a profile, in us."""

    name: str
    start: float
    end: float


def spans(step: GraphedStep) -> list[Span]:
    """The first GPU's kernels of several replays, in the order in which they ended."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPLAYS):
            step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    device_events = (e for e in recorded.events() if e.device_type == on_device and e.device_index == 0)
    found = [Span(e.name, e.time_range.start, e.time_range.end) for e in device_events]
    return sorted(found, key=lambda span: span.end)


def short(name: str) -> str:
    """A kernel's name without its template arguments and namespaces."""
    plain = name.removeprefix("void ").split("<")[0].split("(")[0]
    return plain.rpartition("::")[2] or name[:40]


def round_of(text: str) -> tuple[int, TreeConfig]:
    """(sequences, tree) of 8:16/5/4."""
    try:
        batch, tree = text.split(":")
        nodes, depth, top_k = map(int, tree.split("/"))
        return int(batch), TreeConfig(nodes, depth, top_k)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no round, as 8:16/5/4: {error}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_round_arguments(parser)
    parser.add_argument("--rounds", nargs="+", type=round_of, metavar="B:NODES/DEPTH/TOP_K", help="see above")
    parser.add_argument("--plain", action="store_true", help="tokens of plain decoding instead")
    parser.add_argument("--no-int8", action="store_true", help="the head's weights stay in bf16")
    parser.add_argument("--tensor-parallel", type=int, default=0, metavar="N", help="every layer over so many GPUs")
    args = parser.parse_args()
    args.rounds = args.rounds or [(args.batch, TreeConfig(*args.tree))]
    return args


def build(args: argparse.Namespace) -> EaModel:
    devices = [torch.device("cuda", rank) for rank in range(args.tensor_parallel)]
    target = build_cut_target(args.shape, devices) if devices else build_target(args.shape, "cuda")
    return EaModel(target, build_head(target, int8=False if args.no_int8 else None), adaptive=False)


def graphed_round(model: EaModel, batch: int, tree: TreeConfig, args: argparse.Namespace) -> GraphedStep:
    """After a prompt of random tokens."""
    model.states.tree = tree
    tokens = prompt(model, batch, args.context)
    with model.states.lease(not args.plain, batch, args.context + tree.max_path) as (state, _, _):
        begin(state, tokens, temperature=0.0)
        return graphed(repeatable(state), state.devices, state.target.links)


def show(called: str, recorded: list[Span]) -> dict[str, float]:
    """Print what each kernel adds; returns it in us."""
    added: dict[str, list[float]] = collections.defaultdict(list)
    durations: dict[str, float] = collections.defaultdict(float)
    reached = recorded[0].start
    for span in recorded:
        added[short(span.name)].append(max(span.end - reached, 0.0))
        durations[short(span.name)] += span.end - span.start
        reached = max(reached, span.end)
    total = reached - min(span.start for span in recorded)
    print(f"\n{called}: {total / REPLAYS:.0f} us in {len(recorded) // REPLAYS} kernels")
    print(f"{'kernel':<44}{'launches':>9}{'adds, us':>10}{'share':>7}{'each, us':>10}{'duration':>10}")
    table = sorted(added.items(), key=lambda item: -sum(item[1]))
    for name, parts in table[:30]:
        print(f"{name[:43]:<44}{len(parts) / REPLAYS:>9.0f}{sum(parts) / REPLAYS:>10.1f}{sum(parts) / total:>7.1%}"
              f"{sum(parts) / len(parts):>10.2f}{durations[name] / len(parts):>10.2f}")  # fmt: skip
    return {name: round(sum(parts) / REPLAYS, 1) for name, parts in table}


@torch.no_grad()
def main() -> None:
    args = parse()
    model, found = build(args), {}
    for batch, tree in args.rounds:
        what = "plain tokens" if args.plain else f"tree {tree.total_token}/{tree.depth}/{tree.top_k}"
        step = graphed_round(model, batch, tree, args)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        called = f"{args.shape}, {batch} sequence{'s' * (batch != 1)}, {what}"
        found[called] = show(called, spans(step))
        step.close()
        model.states.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
