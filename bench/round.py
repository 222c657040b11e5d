"""What one round costs at real model shapes, with random weights, against the bytes it must read.

    python bench/round.py llama-3.1-8b --context 512 --tree 60 7 10

A round's time does not depend on acceptance, so random weights tell it.

    round    a round on the device, as a CUDA graph; split into its phases, which are graphs of their own
    floor    the weights and the keys and values that a round must read, over the bandwidth measured in the same run
    loop     a round in `eagenerate`'s own loop, by the clock: what it takes longer than the round is lost to the host
    host     what the host takes to launch a round; hidden behind the device as long as it is less than a round
    plain    the same for one token of plain decoding, by the same engine
    prefill  of the whole context, by the clock: with the head, without, and by the stock model with SDPA

With --tau, prints the tokens per second that this acceptance would give (forced, not measured). With --upstream, a
checkout of SafeAILab/EAGLE decodes at the same shapes in the same run. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from lib.records import environment, git_commit, write
from lib.shapes import (
    DRAFT_VOCAB,
    SHAPES,
    build_cut_target,
    build_head,
    build_packed_target,
    build_spread_target,
    build_target,
    head_bytes,
    plan_target,
    target_bytes,
)
from lib.timing import bandwidth, milliseconds, synchronize, wall_milliseconds

from eagle_fast import EaModel, SamplingParams, TreeConfig
from eagle_fast.decoding.reports import ReportRing
from eagle_fast.decoding.round import Round
from eagle_fast.target.interface import attention_of
from eagle_fast.target.rank_files import cut_of

LOOP_ROUNDS = 128
UPSTREAM_NEEDS = (
    "SafeAILab/EAGLE at cb7e084 runs on transformers 4.53 only. Make it an environment of its own, say\n"
    "    python3 -m venv up && up/bin/pip install torch transformers==4.53.1 accelerate\n"
    "and pass --upstream-python up/bin/python"
)


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """Which round is looked at."""
    parser.add_argument("shape", choices=SHAPES, help="whose shapes the target has")
    parser.add_argument("--tree", nargs=3, type=int, default=[60, 7, 10], metavar=("NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--context", type=int, default=512, metavar="L", help="tokens before the round (default 512)")
    parser.add_argument("--batch", type=int, default=1, metavar="B")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_round_arguments(parser)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="with top-p 0.9 above 0")
    parser.add_argument("--tau", type=float, help="tokens per round to assume for tokens/s: forced, not measured")
    parser.add_argument("--repeats", type=int, default=50, metavar="N")
    parser.add_argument("--target-bits", type=int, choices=[4, 8], help="round the layers' weights to so many bits")
    parser.add_argument("--lm-head-bits", type=int, choices=[8], help="the same of lm_head and embedding")
    parser.add_argument("--device-map", default="0", help="a GPU count to spread over, or a strategy (default: GPU 0)")
    parser.add_argument(
        "--tensor-parallel", type=int, default=0, metavar="N", help="cut every layer over so many GPUs instead"
    )
    parser.add_argument(
        "--head-cut", action=argparse.BooleanOptionalAction, help="the draft head too, or not (default: where it pays)"
    )
    parser.add_argument("--upstream", type=Path, metavar="PATH", help="a checkout of SafeAILab/EAGLE, timed too")
    parser.add_argument(
        "--upstream-python", default=sys.executable, metavar="COMMAND", help="a Python that has its dependencies"
    )
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    if args.target_bits and args.device_map != "0":
        parser.error("--target-bits: packed weights are timed on one GPU or cut over several, leave --device-map out")
    if args.head_cut is not None and not args.tensor_parallel:
        parser.error("--head-cut: goes with --tensor-parallel")
    if args.lm_head_bits and not args.target_bits:
        parser.error("--lm-head-bits: goes with --target-bits")
    if args.upstream and not (args.upstream / "eagle" / "model" / "ea_model.py").is_file():
        parser.error(f"--upstream {args.upstream}: no checkout of SafeAILab/EAGLE there (eagle/model/ea_model.py)")
    return args


def prompt(model: EaModel, batch: int, context: int) -> torch.Tensor:
    """Random tokens [B, L], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.target.vocab_size, (batch, context), generator=generator)


def begin(state: Round, tokens: torch.Tensor, temperature: float) -> None:
    """Prefill [B, L] tokens."""
    top_p = 0.9 if temperature else 0.0
    state.sampling.load(SamplingParams(temperature=temperature, top_p=top_p, seed=0), shared_noise=True)
    state.begin(tokens.tolist(), [state.max_length - 1] * len(tokens))


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
    tree = state.draft()
    logits, features = state.verify(tree)
    path = state.accept(tree, logits)
    state.counts.zero_()  # an absorb of nothing, which can be repeated

    def commit() -> None:
        state.compact(path)
        state.absorb(path, features)

    parts = {
        "draft": state.draft,
        "draft_and_verify": lambda: state.verify(state.draft()),
        "commit": commit,
        "accept": lambda: state.accept(tree, logits),
    }
    links = state.target.links
    return {name: round(milliseconds(part, repeats, state.devices, links), 3) for name, part in parts.items()}


def loop_milliseconds(generate: Callable, tokens: torch.Tensor, temperature: float) -> float:
    """A round of the real loop: launching, waiting and reading included, the prefill not."""
    options = {
        "temperature": temperature, "top_p": 0.9 if temperature else 0.0, "seed": 0, "eos_token_id": [],
        "max_length": tokens.shape[1] + 2 * LOOP_ROUNDS, "return_dict_in_generate": True,
    }  # fmt: skip
    generate(tokens, max_new_tokens=LOOP_ROUNDS, **options)  # captures
    statistics = generate(tokens, max_new_tokens=LOOP_ROUNDS, **options).statistics
    return statistics.decode_seconds / statistics.rounds * 1e3


def host_milliseconds(state: Round, step: Callable[[], None], rounds: int = 16) -> float:
    """Host time to launch one round and the copy of its report."""
    reports = ReportRing(state.report, rounds)
    synchronize(state.devices)
    started = time.perf_counter()
    for _ in range(rounds):
        step()
        reports.send()
    launched = time.perf_counter() - started
    synchronize(state.devices)
    return launched / rounds * 1e3


def measure(model: EaModel, speculative: bool, args: argparse.Namespace) -> dict:
    """Milliseconds of a round, with the head or without, in the state that a call of this size would use."""
    tokens = prompt(model, args.batch, args.context)
    loop = loop_milliseconds(model.eagenerate if speculative else model.naivegenerate, tokens, args.temperature)
    with model.states.lease(speculative, args.batch, args.context + LOOP_ROUNDS) as (state, step, _):
        prefill = wall_milliseconds(lambda: begin(state, tokens, args.temperature), devices=state.devices)
        device = milliseconds(repeatable(state), args.repeats, state.devices, state.target.links)
        split = {"phases_ms": phases(state, args.repeats)} if speculative else {}
        host = host_milliseconds(state, step)
    figures = {"round_ms": device, "loop_ms": loop, "host_ms": host, "prefill_ms": prefill}
    return {**{name: round(value, 3) for name, value in figures.items()}, **split}


def stock_prefill_milliseconds(model: EaModel, args: argparse.Namespace) -> float:
    """The stock model over the same prompt, with a cache and the logits of the last token."""
    tokens = prompt(model, args.batch, args.context).cuda()
    assert attention_of(model.base_model) == "sdpa"
    return round(wall_milliseconds(lambda: model.base_model(tokens, use_cache=True, logits_to_keep=1)), 3)


def memory(model: EaModel) -> dict[str, dict[str, float]]:
    """Of each GPU, GiB: what weights and caches take, and the most that was allocated since they are there."""
    slabs = [slab for state, _, _ in model.states.idle for slab in state.cache.slab.slabs]
    slabs += [slab for state, _, _ in model.states.idle for slab in state.drafter.slabs]
    held: dict[torch.device, dict[int, int]] = {}
    cut = cut_of(model.base_model)
    weights = [*model.base_model.parameters(), *model.base_model.buffers()]
    if cut is not None:
        weights = [each for rank in cut.ranks for each in rank.weights]
    for head in [model.ea_layer, *(model.states.heads or [])]:
        weights += [*head.parameters(), *head.buffers()]
    for tensor in [*weights, *slabs]:
        storage = tensor.untyped_storage()
        held.setdefault(tensor.device, {})[storage.data_ptr()] = storage.nbytes()
    return {
        str(device): {
            "held": round(sum(own.values()) / 2**30, 2),
            "peak": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
        }
        for device, own in held.items()
    }


def upstream(args: argparse.Namespace) -> dict:
    """The checkout's own round and plain token; where it does not run, the last line of why."""
    settings = {
        "shape": SHAPES[args.shape], "draft_vocab": min(DRAFT_VOCAB, SHAPES[args.shape]["vocab_size"]),
        "tree": args.tree, "context": args.context, "temperature": args.temperature, "dtype": "bfloat16",
        "device": "cuda",
    }  # fmt: skip
    script = Path(__file__).with_name("upstream.py")
    command = [*shlex.split(args.upstream_python), str(script), str(args.upstream), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    record = {"checkout": git_commit(args.upstream) or args.upstream.name}
    if done.returncode == 0:
        return record | json.loads(done.stdout.splitlines()[-1])
    return record | {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


@torch.no_grad()
def main() -> None:
    args = parse()
    nodes, depth, top_k = args.tree
    ranks = args.tensor_parallel
    placement = {} if ranks else plan_target(args.shape, args.device_map)
    one = set(placement) == {""}
    if ranks:
        devices = [torch.device("cuda", index) for index in range(ranks)]
        target = build_cut_target(args.shape, devices, args.target_bits, args.lm_head_bits)
    elif args.target_bits:
        target = build_packed_target(args.shape, placement[""], args.target_bits, args.lm_head_bits)
    else:
        target = build_target(args.shape, placement[""]) if one else build_spread_target(args.shape, placement)
    model = EaModel(target, build_head(target), tree=TreeConfig(nodes, depth, top_k), adaptive=False)
    model.states.head_cut = args.head_cut
    rate = bandwidth()
    gc.collect()
    for device in model.target.devices:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    figures, plain = measure(model, True, args), measure(model, False, args)
    gibibytes = memory(model)
    kv_bytes = sum(each.token_bytes for each in model.target.layer_shapes)
    weights, kv_bytes = target_bytes(target), kv_bytes * args.context * args.batch
    if ranks:  # read at the same time
        weights, kv_bytes = weights / ranks, kv_bytes / ranks
    record = {
        "bench": "round", "shape": args.shape, "tree": args.tree, "context": args.context, "batch": args.batch,
        "temperature": args.temperature, "target_bits": args.target_bits, "lm_head_bits": args.lm_head_bits, **figures,
        "floor_ms": round((weights + head_bytes(model.ea_layer, depth) + kv_bytes) / rate * 1e3, 3),
        **{f"plain_{name.removeprefix('round_')}": value for name, value in plain.items()},
        "plain_floor_ms": round((weights + kv_bytes) / rate * 1e3, 3),
        **({"stock_prefill_ms": stock_prefill_milliseconds(model, args)} if one else {}),
        "round_over_plain": round(figures["round_ms"] / plain["round_ms"], 3),
        "terabytes_per_second": round(rate / 1e12, 3),
        "devices": len(model.target.devices),
        "boundaries": 0 if ranks else sum(a.device != b.device for a, b in pairwise(model.target.shards)),
        **({"tensor_parallel": ranks, "head_cut": model.states.heads is not None} if ranks else {}),
        "memory_gib": gibibytes, **environment(args.commit),
    }  # fmt: skip
    if args.tau:
        record["forced_tau"] = args.tau
        record["forced_tokens_per_second"] = round(args.tau * args.batch / record["loop_ms"] * 1e3, 1)
    if args.upstream:
        record["upstream"] = upstream(args)
    show(record)
    if args.out:
        write(record, args.out)
    print(json.dumps(record))


def show(record: dict) -> None:
    print(f"{record['shape']}, tree {record['tree']}, context {record['context']}, batch {record['batch']}, "
          f"T={record['temperature']:g}, weights of {record['target_bits'] or 16} bits, "
          f"{record['hardware']}, {record['terabytes_per_second']:.2f} TB/s")  # fmt: skip
    for name, key in (("round", ""), ("plain token", "plain_")):
        took = record["plain_ms" if key else "round_ms"]
        floor, loop, host = (record[f"{key}{each}_ms"] for each in ("floor", "loop", "host"))
        print(f"  {name:<13}{took:>9.3f} ms   floor {floor:.3f} ms, {floor / took:.0%} of the bandwidth")
        print(f"    in the loop{loop:>9.3f} ms   {loop - took:+.3f} ms; the host launches it in {host:.3f} ms")
    split = record["phases_ms"]
    verify = {"draft": split["draft"], "verify": split["draft_and_verify"] - split["draft"]}
    for name, took in {**verify, "accept": split["accept"], "commit": split["commit"]}.items():
        print(f"    {name:<11}{took:>9.3f} ms")
    print(f"  round / plain {record['round_over_plain']:.2f}")
    print(f"  prefill {record['prefill_ms']:.2f} ms with the head, {record['plain_prefill_ms']:.2f} without"
          + (f", {record['stock_prefill_ms']:.2f} stock" if "stock_prefill_ms" in record else ""))  # fmt: skip
    for device, used in record["memory_gib"].items():
        print(f"  {device}: weights and caches {used['held']:.2f} GiB, peak {used['peak']:.2f} GiB")
    if "forced_tau" in record:
        print(f"  forced tau {record['forced_tau']}: {record['forced_tokens_per_second']} tokens/s")
    if "upstream" in record:
        show_upstream(record["upstream"])


def show_upstream(record: dict) -> None:
    if "error" in record:
        print(f"  SafeAILab/EAGLE ({record['checkout']}) did not run: {record['error']}\n{UPSTREAM_NEEDS}")
    else:
        print(f"  SafeAILab/EAGLE ({record['checkout']}), by the clock: round {record['round_ms']:.2f} ms, "
              f"plain token {record['plain_ms']:.2f} ms, over {record['rounds']} rounds")  # fmt: skip


if __name__ == "__main__":
    main()
