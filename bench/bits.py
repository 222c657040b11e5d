"""Are the logits of a tree's nodes those of plain decoding, to the bit? Random trees at the shapes of a real model.

    python bench/bits.py --out bench/results/bits-llama-3.1-8b.json
    python bench/bits.py --shape qwen3-8b --layers 36 --dtype float16 --rounds 200

Weights are random, widths are the model's own, and a few layers will do. In every round 1, 2 or 5 sequences have a
random tree of 2 to 64 nodes each, from a chain to a star, behind contexts of random lengths, those at the edges of
blocks among them. One forward gives the logits of all nodes. One path of one of the trees, from its root to a leaf, is
then decoded token by token, alone in a cache of another length, by trees of the root alone. A row counts as different
if any bit of its logits is.

The table has a line for every size of the batch, and for every context that was asked for; "others" are lengths in
between. On a GPU the exit status is 1 if any row differs. On a CPU, where nothing of the kind is promised, the count is
reported only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from lib.records import environment, write
from lib.shapes import SHAPES, build_target
from lib.tree_bits import Compared, MadeUpContexts, random_leaf, random_parents
from tqdm import tqdm

from eagle_fast.target import Target

CONTEXTS = (63, 64, 65, 127, 2047, 4095, 32000)
BATCHES = (1, 2, 5)
MOST_NODES = 64
OTHERS = "others"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="llama-3.1-8b", choices=SHAPES, help="whose widths the target has (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="decoder layers (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=1000, metavar="N", help="trees (default %(default)s)")
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=CONTEXTS, metavar="N",
        help=f"lengths of which every other sequence has one (default {' '.join(map(str, CONTEXTS))})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of trees and contexts (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the record, as JSON")
    args = parser.parse_args()
    if min(*args.contexts, args.rounds, args.layers) < 1:
        parser.error("take contexts of a token or more, a round or more and a layer or more")
    return args


def run(target: Target, args: argparse.Namespace) -> list[dict]:
    """Of every round: its batch, the context of the sequence that was compared, its nodes, and what came out."""
    rng, longest = random.Random(args.seed), max(args.contexts)
    contexts = {batch: MadeUpContexts(target, batch, longest, MOST_NODES) for batch in BATCHES}
    rounds, different = [], 0
    with tqdm(total=args.rounds, unit="tree", disable=None) as bar:
        for _ in range(args.rounds):
            batch, num_nodes = rng.choice(BATCHES), rng.randint(2, MOST_NODES)
            asked = [rng.random() < 0.5 for _ in range(batch)]
            lengths = [rng.choice(args.contexts) if each else rng.randint(1, longest) for each in asked]
            parents, row = [random_parents(num_nodes, rng) for _ in range(batch)], rng.randrange(batch)
            leaf = random_leaf(parents[row], rng)
            found = contexts[batch].compare(lengths, parents, row, leaf, rng)
            place = {"batch": batch, "nodes": num_nodes, "length": lengths[row]}
            rounds.append({**place, "context": lengths[row] if asked[row] else OTHERS, **found._asdict()})
            different += found.differ
            bar.set_postfix_str(f"{different} rows differ")
            bar.update()
    return rounds


def total(rounds: list[dict]) -> Compared:
    largest = max((each["largest"] for each in rounds), default=0.0)
    return Compared(sum(each["rows"] for each in rounds), sum(each["differ"] for each in rounds), largest)


def table(rounds: list[dict]) -> list[dict]:
    """A row for every size of the batch and every context."""
    found = []
    for name in ("batch", "context"):
        values = sorted({each[name] for each in rounds}, key=lambda value: (value == OTHERS, value))
        for value in values:
            part = [each for each in rounds if each[name] == value]
            found.append({name: value, "rounds": len(part), **total(part)._asdict()})
    return found


def show(record: dict) -> None:
    print(f"{'':<16}{'rounds':>8}{'rows':>8}{'differ':>8}{'by at most':>13}")
    for row in [*record["table"], {"all": "", **record}]:
        name, value = next(iter(row.items()))
        print(f"{f'{name} {value}':<16}{row['rounds']:>8,}{row['rows']:>8,}{row['differ']:>8,}{row['largest']:>13.3g}")


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    target = Target(build_target(args.shape, device, getattr(torch, args.dtype), layers=args.layers))
    rounds = run(target, args)
    worst = sorted((each for each in rounds if each["differ"]), key=lambda each: -each["largest"])[:5]
    record = {
        "bench": "bits", "shape": args.shape, "layers": args.layers, "dtype": args.dtype, "seed": args.seed,
        "rounds": len(rounds), **total(rounds)._asdict(), "table": table(rounds), "worst": worst,
        **environment(args.commit),
    }  # fmt: skip
    if device.type == "cpu":
        record["hardware"] = "cpu"
    show(record)
    if args.out:
        write(record, args.out)
    print(json.dumps(record))
    return int(device.type != "cpu" and record["differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
