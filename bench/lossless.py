"""Is the text of a real pair the target's own? Every prompt with and without the head, for the same seed.

    python bench/lossless.py --model TARGET --head HEAD --prompts *.jsonl --dtype float32

In float32 the two texts must be the same, token for token, greedy and sampled; the exit status says so. In half
precision a tree of rows and a single row round differently: there the table says how often texts part, after how many
tokens, and how far apart the two best scores (logits, over the temperature, with the position's noise) were at the
token where they did: as a number, and in roundings of the best token's logit to that precision.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from decode import add_pair_arguments, hardware, read_prompts
from eagle_fast_kernels.noise import gumbel_row_ref
from transformers import AutoTokenizer

from eagle_fast import EaModel
from eagle_fast.decoding.request import pad_left


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=67, metavar="N", help="prompts per file (default %(default)s)")
    parser.add_argument("--batch", type=int, default=67, metavar="B", help="prompts at once (67)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


class Parting(NamedTuple):
    """Where a text with the head leaves the one without."""

    prompt: int
    token: int  # of the answer, from 0
    gap: float  # between the two best scores there
    roundings: float  # the same over the spacing of the dtype's numbers at the best token's logit


@torch.no_grad()
def top_two_gap(model: EaModel, text: torch.Tensor, temperature: float, seed: int) -> tuple[float, float]:
    """Distance of the two best scores for the token after `text` [L]: (as it is, in roundings)."""
    logits = model.base_model(text[None]).logits[0, -1]
    scores = logits.double()
    if temperature > 0:
        zero, position = torch.zeros(1, dtype=torch.long), torch.tensor([len(text) - 1])
        noise = gumbel_row_ref(torch.tensor([seed]), zero, position, len(scores))
        scores = scores / temperature + noise[0].to(scores.device)
    best = scores.topk(2)
    gap = float(best.values[0] - best.values[1])
    exponent = math.frexp(float(logits[best.indices[0]]))[1] - 1
    spacing = 2.0**exponent * torch.finfo(logits.dtype).eps
    return gap, gap * (temperature or 1.0) / spacing


def compare(model: EaModel, prompts: list[list[int]], args: argparse.Namespace, temperature: float) -> dict:
    """How many of the texts are the same, and the gaps where they part."""
    partings: list[Parting] = []
    for start in range(0, len(prompts), args.batch):
        part = prompts[start : start + args.batch]
        seeds = list(range(start, start + len(part)))
        batch = {name: each.to(model.target.device) for name, each in pad_left(part).items()}
        options = {"temperature": temperature, "seed": seeds, "max_new_tokens": args.max_new_tokens, "max_length": 8192}
        pair = [generate(**batch, **options) for generate in (model.eagenerate, model.naivegenerate)]
        width = min(each.shape[1] for each in pair)
        for row, seed in enumerate(seeds):
            fast, plain = (each[row, :width] for each in pair)
            differs = (fast != plain).nonzero()
            if len(differs):
                before = batch["input_ids"].shape[1]
                prefix = plain[before - len(part[row]) : int(differs[0])]
                partings.append(Parting(seed, int(differs[0]) - before, *top_two_gap(model, prefix, temperature, seed)))
    return {"temperature": temperature, "prompts": len(prompts), "same": len(prompts) - len(partings)} | spread(
        partings
    )


def spread(partings: list[Parting]) -> dict:
    """Of all partings: medians and largest values, how many are within a rounding, and the widest five."""
    row: dict = {}
    for name in ("token", "gap", "roundings"):
        values = [getattr(parting, name) for parting in partings]
        row[f"median_{name}"] = round(statistics.median(values), 4) if values else None
        row[f"largest_{name}"] = round(max(values), 4) if values else None
    row["within_a_rounding"] = sum(parting.roundings <= 1 for parting in partings)
    widest = sorted(partings, key=lambda parting: -parting.gap)[:5]
    row["widest"] = [{name: round(value, 4) for name, value in parting._asdict().items()} for parting in widest]
    return row


def show(rows: list[dict], args: argparse.Namespace) -> None:
    print(f"{args.dtype}, {args.max_new_tokens} tokens; where texts part: median / largest")
    print(f"{'T':>5}{'prompts':>9}{'same':>7}{'after tokens':>16}{'top-2 gap':>20}{'in roundings':>18}{'within 1':>10}")
    for row in rows:
        cells = [f"{row[f'median_{name}']} / {row[f'largest_{name}']}" for name in ("token", "gap", "roundings")]
        texts = f"{row['temperature']:>5.1f}{row['prompts']:>9}{row['same']:>7}"
        print(f"{texts}{cells[0]:>16}{cells[1]:>20}{cells[2]:>18}{row['within_a_rounding']:>10}")


def main() -> int:
    args = parse()
    model = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, device_map=args.device, dtype=getattr(torch, args.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [prompt for path in args.prompts for prompt in read_prompts(path, tokenizer, args.limit)]
    rows = [compare(model, prompts, args, temperature) for temperature in args.temperature]
    show(rows, args)
    record = {"bench": "lossless", "dtype": args.dtype, "max_new_tokens": args.max_new_tokens, "rows": rows}
    record |= {"hardware": hardware(model.target.device), "torch": torch.__version__}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0 if args.dtype != "float32" or all(row["same"] == row["prompts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
