"""Tokens a second over batch sizes: plain decoding, trees held fixed, and the tree that the engine chooses.

    python bench/batch.py --model TARGET --head HEAD --prompts mt_bench.jsonl gsm8k.jsonl humaneval.jsonl

Two tables, each over the batch sizes of --batch:

    pair      the pair decodes the prompts, greedily: its own text, its own acceptance. At the smallest batch also at
              --temperature
    shapes    rounds at the shapes of --shape with random weights, timed, and with the pair's acceptance at that batch
              applied to them: tokens/s = batch * tokens per round / time. No such pair was run. "adaptive" is the tree
              that the engine's choice takes, given the times and how the pair's drafts did by depth and rank

Columns: plain, each tree as nodes/depth/top-k (60/7/10 is the default of adaptive=False), adaptive. "over plain" and
"over best" are adaptive's tokens/s over those of plain decoding and of the best tree that is held fixed. Trees are
captured, and adaptive is warmed up, before the clock; what adaptive learns in one prompt set it knows in the next, as
in use. Last, what a head that knows nothing costs at the shapes: 256 tokens with it, over the same without.

Without --model the shapes alone are timed, with the acceptance of the head that the package ships. Ends with one line
of JSON; --out also writes it to a file, row by row as they come, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from decode import read_prompts
from lib.plots import plot_batch
from lib.records import environment, write
from lib.shapes import SHAPES, build_head, build_target
from lib.timing import milliseconds, wall_milliseconds
from round import begin, prompt, repeatable
from transformers import AutoTokenizer

from eagle_fast import EaModel, Statistics, TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.choice import LADDER, best_tree, candidates
from eagle_fast.decoding.request import pad_left
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.worth import USUAL, Table, chances, expected_tokens, usual_chances
from eagle_fast.head.files import read_config
from eagle_fast.pairs import smollm2_head

FIXED = (*LADDER[:5], TreeConfig(8, 7, 1), *LADDER[5:8])
DEFAULT = LADDER[0]
LEANS = 8.0  # see `eagle_fast.decoding.worth.chances`
RANDOM_TOKENS = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target of the pair: folder or hub name")
    parser.add_argument("--head", help="its EAGLE head: folder or hub name")
    parser.add_argument("--prompts", nargs="*", type=Path, default=[], metavar="FILE", help="JSON lines with 'turns'")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="B")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="for the smallest batch (default 1)"
    )
    parser.add_argument(
        "--min-prompts",
        type=int,
        default=40,
        metavar="N",
        help="prompts of a file at least (default 40: a run of a few would take some tenths of a second)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--shape", choices=[*SHAPES, "none"], default="llama-3.1-8b", help="default %(default)s")
    parser.add_argument("--context", type=int, default=512, metavar="L", help="tokens before a round of the shapes")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="of each such round (default 20)")
    parser.add_argument("--device", default="auto", help="cpu, or the default: GPU 0 if there is one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record, as JSON; the plot is FILE with .png")
    args = parser.parse_args()
    given = [args.model is not None, args.head is not None, bool(args.prompts)]
    if any(given) and not all(given):
        parser.error("--model, --head and --prompts belong together")
    if min(args.batch) < 1:
        parser.error(f"--batch {min(args.batch)}: a batch has one sequence or more")
    args.batch = sorted(set(args.batch))
    if args.device == "auto":
        args.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return args


def name_of(tree: TreeConfig) -> str:
    return "plain" if tree == ROOT_ALONE else f"{tree.total_token}/{tree.depth}/{tree.top_k}"


# -- the pair ----------------------------------------------------------------------------------------------------------


@contextmanager
def held(model: EaModel, tree: TreeConfig) -> Iterator[None]:
    """The model as if it had been loaded with this tree and adaptive=False."""
    before = model.tree, model._adaptive
    model.tree, model._adaptive = tree, False
    try:
        yield
    finally:
        model.tree, model._adaptive = before
        model.states.clear()


def decoded(generate, sets: dict[str, list[list[int]]], batch: int, args, temperature: float) -> dict[str, Statistics]:
    """What the prompts of each set took, so many at a time; the very first batch once before, to capture."""
    found: dict[str, Statistics] = {}
    for name, prompts in sets.items():
        parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        total, before = Statistics(), [] if found else parts[:1]
        for number, part in enumerate([*before, *parts], start=1 - len(before)):
            out = generate(
                **pad_left(part), temperature=temperature, seed=list(range(len(part))), max_length=8192,
                max_new_tokens=args.max_new_tokens, return_dict_in_generate=True,
            )  # fmt: skip
            if number > 0:
                total += out.statistics
        found[name] = total
    return found


def measure_pair(model: EaModel, sets: dict[str, list[list[int]]], batch: int, args, temperature: float) -> dict:
    """A row of the table; speeds are means over the sets, as is what each set gave."""
    chosen = {name: (prompts * batch)[: max(batch, args.min_prompts)] for name, prompts in sets.items()}
    chosen = {name: prompts[: len(prompts) // batch * batch] for name, prompts in chosen.items()}
    runs = {"plain": decoded(model.naivegenerate, chosen, batch, args, temperature)}
    model.states.clear()
    for tree in FIXED:
        with held(model, tree):
            runs[name_of(tree)] = decoded(model.eagenerate, chosen, batch, args, temperature)
    longest = max(len(prompt) for prompts in chosen.values() for prompt in prompts) + args.max_new_tokens
    model.warmup(batch, max_length=longest)  # caches as long as those of the others
    runs["adaptive"] = adaptive = decoded(model.eagenerate, chosen, batch, args, temperature)
    model.states.clear()
    drafts = [done.drafts for done in runs[name_of(DEFAULT)].values()]
    counted = chances(sum(drafts[1:], drafts[0]), USUAL, LEANS)
    uses = sum(adaptive.values(), Statistics()).trees
    tokens, promised = sum(use.tokens for use in uses.values()), sum(use.promised for use in uses.values())
    return {
        "batch": batch, "temperature": temperature,
        "tokens_per_second": {
            name: mean(done.tokens_per_second for done in run.values()) for name, run in runs.items()
        },
        "tau": {name: mean(done.tau for done in run.values()) for name, run in runs.items()},
        "sets": {
            name: {each: round(run[name].tokens_per_second, 1) for each, run in runs.items()} for name in chosen
        },
        "adaptive_rounds": {name_of(tree): use.rounds for tree, use in uses.items()},
        "came_over_promised": round(tokens / promised, 3) if promised else None,
        "chances": counted[: DEFAULT.depth + 1, : DEFAULT.top_k].round(4).tolist(),
    }  # fmt: skip


def mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 3)


def run_pair(args: argparse.Namespace) -> Iterator[dict]:
    model = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, device_map=args.device, dtype=getattr(torch, args.dtype),
        adaptive=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sets = {path.stem: read_prompts(path, tokenizer, max(args.min_prompts, *args.batch)) for path in args.prompts}
    settings = [(batch, 0.0) for batch in args.batch]
    if args.temperature > 0:
        settings.append((args.batch[0], args.temperature))
    for batch, temperature in settings:
        yield with_ratios(measure_pair(model, sets, batch, args, temperature))


# -- the shapes --------------------------------------------------------------------------------------------------------


def round_milliseconds(state: Round, repeats: int) -> float:
    """Of a round, on a GPU as a graph, on a CPU by the clock."""
    work = repeatable(state)
    if state.devices[0].type == "cpu":
        return wall_milliseconds(work, repeats, devices=())
    return milliseconds(work, repeats, state.devices)


@torch.no_grad()
def times_of_shape(model: EaModel, batch: int, args: argparse.Namespace) -> dict[TreeConfig, float]:
    """Milliseconds of a round of plain decoding and under each tree."""
    tokens, found = prompt(model, batch, args.context), {}
    for head, trees in ((None, (ROOT_ALONE,)), (model.ea_layer, FIXED)):
        state = Round(model.target, head, trees[0], batch, args.context + 64, others=trees[1:])
        begin(state, tokens, temperature=0.0)
        for tree in trees:
            found[tree] = round(round_milliseconds(state.under(tree), args.repeats), 4)
    return found


def measure_shape(model: EaModel, batch: int, pair: dict | None, table: Table, args: argparse.Namespace) -> dict:
    """A row of the table. pair: the pair's row at this batch; without it tokens are those that `table` promises."""
    times = times_of_shape(model, batch, args)
    found = table if pair is None else usual_chances(pair["chances"])
    expected = {tree: expected_tokens(found, tree) for tree in times}
    tau = {name_of(tree): round(expected[tree], 3) if pair is None else pair["tau"][name_of(tree)] for tree in times}
    choices = [tree for tree in candidates(DEFAULT, batch, args.device == "cpu") if tree in times]
    chosen = best_tree({tree: times[tree] for tree in choices}, expected)
    speeds = {name_of(tree): round(1e3 * batch * tau[name_of(tree)] / took, 1) for tree, took in times.items()}
    return {
        "batch": batch, "milliseconds": {name_of(tree): took for tree, took in times.items()}, "tau": tau,
        "chosen": name_of(chosen), "tokens_per_second": {**speeds, "adaptive": speeds[name_of(chosen)]},
    }  # fmt: skip


def random_head_over_plain(model: EaModel, args: argparse.Namespace) -> float:
    """Time of 256 tokens with a head that knows nothing, over that of plain decoding."""
    ids = torch.randint(0, model.target.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": RANDOM_TOKENS, "eos_token_id": [], "return_dict_in_generate": True}
    seconds = {}
    model.warmup(1, max_length=64 + RANDOM_TOKENS)
    for generate in (model.naivegenerate, model.eagenerate):
        took = [generate(ids, **options).statistics.decode_seconds for _ in range(3)]
        seconds[generate.__name__] = sorted(took)[1]
    return round(seconds["eagenerate"] / seconds["naivegenerate"], 4)


def run_shape(args: argparse.Namespace, pair: list[dict], record: dict) -> Iterator[dict]:
    """Rows; what a head that knows nothing costs goes into the record."""
    target = build_target(args.shape, args.device, getattr(torch, args.dtype))
    model = EaModel(target, build_head(target), adaptive=True)
    acceptance = read_config(smollm2_head()).get("acceptance", {})
    table = usual_chances(acceptance["0"]) if acceptance else USUAL
    greedy = {row["batch"]: row for row in pair if row["temperature"] == 0}
    record["random_head_over_plain"] = random_head_over_plain(model, args)
    model.states.clear()
    for batch in args.batch:
        yield with_ratios(measure_shape(model, batch, greedy.get(batch), table, args))


# -- what comes out ----------------------------------------------------------------------------------------------------


def with_ratios(row: dict) -> dict:
    """What adaptive gives over plain decoding and over the best tree that is held fixed."""
    speeds = row["tokens_per_second"]
    best = max(speeds[name_of(tree)] for tree in FIXED)
    over = {name: round(speeds["adaptive"] / base, 3) for name, base in (("plain", speeds["plain"]), ("best", best))}
    return row | {"over_plain": over["plain"], "over_best_fixed": over["best"],
                  "over_default": round(speeds["adaptive"] / speeds[name_of(DEFAULT)], 3)}  # fmt: skip


def show(row: dict, header: bool) -> None:
    names = ["plain", *map(name_of, FIXED), "adaptive"]
    if header:
        print(
            f"\n{'batch':>5}{'T':>4}"
            + "".join(f"{name:>10}" for name in names)
            + f"{'over plain':>12}{'over best':>11}"
        )
    speeds = "".join(f"{row['tokens_per_second'][name]:>10,.0f}" for name in names)
    print(f"{row['batch']:>5}{row.get('temperature', 0):>4g}{speeds}{row['over_plain']:>11.2f}x"
          f"{row['over_best_fixed']:>10.2f}x", flush=True)  # fmt: skip


def plot(record: dict, path: Path) -> None:
    """Tokens a second over those of plain decoding, by batch; a word where the library is not installed."""
    try:
        plot_batch(record, path, [*map(name_of, FIXED)])
    except ModuleNotFoundError:
        print(f"no plot: {path.name} needs matplotlib", file=sys.stderr)


def main() -> None:
    args = parse()
    pair: list[dict] = []
    shapes: dict[str, Any] = {"shape": args.shape, "context": args.context, "rows": []} if args.shape != "none" else {}
    record = {
        "bench": "batch", "model": args.model, "head": args.head, "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens, "pair": pair, "shapes": shapes, **environment(args.commit),
    }  # fmt: skip

    def keep(rows: list[dict], new: Iterable[dict]) -> None:
        for row in new:
            rows.append(row)
            show(row, header=len(rows) == 1)
            if args.out:
                write(record, args.out)

    if args.model:
        keep(pair, run_pair(args))
    if shapes:
        keep(shapes["rows"], run_shape(args, pair, shapes))
        print(f"a head that knows nothing: {shapes['random_head_over_plain']:.3f} x the time of plain decoding")
    if args.out:
        plot(record, args.out.with_suffix(".png"))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
