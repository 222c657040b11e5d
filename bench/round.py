"""What one round costs at real model shapes, with random weights, against the bytes it must read.

    python bench/round.py llama-3.1-8b --context 512 --tree 60 7 10

A round's time does not depend on acceptance, so random weights tell it. Everything is timed as CUDA graphs. The floor
is the weights and the keys and values that a round must read, over the bandwidth measured on this GPU in the same run.
With --tau, prints the tokens per second that this acceptance would give (forced, not measured). Ends with one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import transformers
import triton
from shapes import SHAPES, build_head, build_spread_target, build_target, head_bytes, plan_target, target_bytes

from eagle_fast import EaModel, SamplingParams, TreeConfig
from eagle_fast.graph import WARMUP_STEPS, GraphedStep
from eagle_fast.round import Round


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="whose shapes the target has")
    parser.add_argument("--tree", nargs=3, type=int, default=[60, 7, 10], metavar=("NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--context", type=int, default=512, metavar="L", help="tokens before the round (default 512)")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="with top-p 0.9 above 0")
    parser.add_argument("--tau", type=float, help="tokens a round to assume for tokens/s: forced, not measured")
    parser.add_argument("--repeats", type=int, default=50, metavar="N")
    parser.add_argument("--device-map", default="0", help="a GPU count to spread over, or a strategy (default: GPU 0)")
    parser.add_argument("--commit", default="", help="to note in the record")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def bandwidth() -> float:
    """Bytes a second of a read-only stream on this GPU."""
    data = torch.ones(2**30, device="cuda")
    return data.numel() * 4 / milliseconds(data.sum, 10) * 1e3


def graphed(work: Callable[[], object], devices: list[torch.device]) -> GraphedStep:
    """`work` as a CUDA graph over its devices, captured."""
    step = GraphedStep(work, devices)
    for _ in range(WARMUP_STEPS + 1):
        step()
    assert step.graph is not None
    return step


def milliseconds(work: Callable[[], object], repeats: int, devices: list[torch.device] | None = None) -> float:
    """Median time of `work` as a CUDA graph."""
    devices = devices or [torch.device("cuda", 0)]
    step, times = graphed(work, devices), []
    with torch.cuda.device(devices[0]):
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def begin(state: Round, context: int, temperature: float) -> None:
    """Prefill random tokens."""
    vocab = state.target.vocab_size
    tokens = torch.randint(0, vocab, (state.batch, context), generator=torch.Generator().manual_seed(0))
    top_p = 0.9 if temperature else 0.0
    state.sampling.load(SamplingParams(temperature=temperature, top_p=top_p, seed=0), shared_noise=True)
    state.begin(tokens, torch.full((state.batch,), context), torch.full((state.batch,), state.max_length - 1))


def repeatable(state: Round) -> Callable[[], None]:
    """A whole round that ends where it began, so that every repeat does the same work."""
    lengths, roots = state.lengths.clone(), state.roots.clone()

    def work() -> None:
        state.step()
        state.lengths.copy_(lengths)
        state.roots.copy_(roots)

    return work


def phases(state: Round, repeats: int) -> dict[str, float]:
    """Milliseconds of the parts of a round; each part is a graph of its own, so they add up to a little more."""
    tree, logits, features = state.propose()
    accepted = state.accept(tree, logits)
    drafter = state.drafter
    assert drafter is not None
    nothing = accepted._replace(counts=accepted.counts * 0)
    return {
        "draft": milliseconds(state.draft, repeats, state.devices),
        "draft_and_verify": milliseconds(state.propose, repeats, state.devices),
        "accept": milliseconds(lambda: state.accept(tree, logits), repeats, state.devices),
        "commit": milliseconds(lambda: state.commit(nothing, features), repeats, state.devices),
    }


def memory(model: EaModel, state: Round) -> dict[str, dict[str, float]]:
    """Of each GPU, GiB: what weights, caches and head take, and the most that was allocated once they were there."""
    slabs = [*state.cache.slab.slabs, *(state.drafter.slab.slabs if state.drafter else [])]
    held = {}
    for tensor in [*model.base_model.parameters(), *model.ea_layer.parameters(), *model.ea_layer.buffers(), *slabs]:
        own = held.setdefault(tensor.device, {})
        own[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return {
        str(device): {
            "held": round(sum(own.values()) / 2**30, 2),
            "peak": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
        }
        for device, own in held.items()
    }


def host_milliseconds(graph: Callable[[], object], repeats: int = 20) -> float:
    """Host time to launch one round."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        graph()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    return launched / repeats * 1e3


@torch.no_grad()
def main() -> None:
    args = parse()
    nodes, depth, top_k = args.tree
    tree = TreeConfig(nodes, depth, top_k)
    placement = plan_target(args.shape, args.device_map)
    one = set(placement) == {""}
    target = build_target(args.shape, placement[""]) if one else build_spread_target(args.shape, placement)
    model = EaModel(target, build_head(target), tree=tree)
    devices = model.target.devices
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    rate = bandwidth()
    state = Round(model.target, model.ea_layer, tree, args.batch, args.context + tree.max_path)
    plain = Round(model.target, None, tree, args.batch, args.context + 1)
    for each in (state, plain):
        begin(each, args.context, args.temperature)
    kv_bytes = sum(slab[..., : args.context, :].numel() * slab.element_size() for slab in state.cache.slab.slabs)
    floor = (target_bytes(target) + head_bytes(model.ea_layer, depth) + kv_bytes) / rate * 1e3
    plain_floor = (target_bytes(target) + kv_bytes) / rate * 1e3
    round_ms = milliseconds(repeatable(state), args.repeats, devices)
    gibibytes = memory(model, state)
    plain_ms = milliseconds(repeatable(plain), args.repeats, devices)
    split = phases(state, args.repeats)
    step = graphed(repeatable(state), devices)
    record = {
        "bench": "round", "shape": args.shape, "tree": args.tree, "context": args.context, "batch": args.batch,
        "temperature": args.temperature, "round_ms": round(round_ms, 3), "floor_ms": round(floor, 3),
        "plain_ms": round(plain_ms, 3), "plain_floor_ms": round(plain_floor, 3),
        "round_over_plain": round(round_ms / plain_ms, 3), "phases_ms": {k: round(v, 3) for k, v in split.items()},
        "host_ms": round(host_milliseconds(step), 3), "terabytes_per_second": round(rate / 1e12, 3),
        "devices": len(devices), "boundaries": sum(a.device != b.device for a, b in pairwise(model.target.shards)),
        "memory_gib": gibibytes, "hardware": torch.cuda.get_device_name(),
        "commit": args.commit,
        "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    if args.tau:
        record["forced_tau"] = args.tau
        record["forced_tokens_per_second"] = round(args.tau * args.batch / round_ms * 1e3, 1)
    show(record)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def show(record: dict) -> None:
    print(f"{record['shape']}, tree {record['tree']}, context {record['context']}, batch {record['batch']}, "
          f"T={record['temperature']:g}, {record['hardware']}, {record['terabytes_per_second']:.2f} TB/s")  # fmt: skip
    for name, key, floor in (("round", "round_ms", "floor_ms"), ("plain token", "plain_ms", "plain_floor_ms")):
        share = record[floor] / record[key]
        print(f"  {name:<14}{record[key]:>9.3f} ms   floor {record[floor]:.3f} ms, {share:.0%} of the bandwidth")
    split = record["phases_ms"]
    print(
        f"    {'draft':<12}{split['draft']:>9.3f}\n    {'verify':<12}{split['draft_and_verify'] - split['draft']:>9.3f}"
    )
    print(f"    {'accept':<12}{split['accept']:>9.3f}\n    {'commit':<12}{split['commit']:>9.3f}")
    for device, used in record["memory_gib"].items():
        print(f"  {device}: weights, cache and head {used['held']:.2f} GiB, peak {used['peak']:.2f} GiB")
    print(f"  round / plain {record['round_over_plain']:.2f}, host {record['host_ms']:.3f} ms a round")
    if "forced_tau" in record:
        print(f"  forced tau {record['forced_tau']}: {record['forced_tokens_per_second']} tokens/s")


if __name__ == "__main__":
    main()
