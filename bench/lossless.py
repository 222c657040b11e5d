"""Is the text of a real pair the target's own? Every prompt with and without the head, for the same seed.

    python bench/lossless.py --model TARGET --head HEAD --prompts *.jsonl --dtype float32

In float32 the two texts must be the same, token for token, greedy and sampled; the exit status says so. In half
precision a tree of rows and a single row round differently: there the table says how often texts part, and how far
apart the two best scores (logits, over the temperature, with the position's noise) were at the token where they did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from decode import add_pair_arguments, pad_left, read_prompts
from eagle_fast_kernels.noise import gumbel_row_ref
from transformers import AutoTokenizer

from eagle_fast import EaModel


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=67, metavar="N", help="prompts a file (default %(default)s)")
    parser.add_argument("--batch", type=int, default=40, metavar="B")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


@torch.no_grad()
def top_two_gap(model: EaModel, text: torch.Tensor, temperature: float, seed: int) -> float:
    """Distance of the two best scores for the token after `text` [L]."""
    scores = model.base_model(text[None]).logits[0, -1].double()
    if temperature > 0:
        zero, position = torch.zeros(1, dtype=torch.long), torch.tensor([len(text) - 1])
        noise = gumbel_row_ref(torch.tensor([seed]), zero, position, len(scores))
        scores = scores / temperature + noise[0].to(scores.device)
    best = scores.topk(2).values
    return float(best[0] - best[1])


def compare(model: EaModel, prompts: list[list[int]], args: argparse.Namespace, temperature: float) -> dict:
    """How many of the texts are the same, and the gaps where they part."""
    same, gaps = 0, []
    for start in range(0, len(prompts), args.batch):
        part = prompts[start : start + args.batch]
        seeds = list(range(start, start + len(part)))
        batch = pad_left(part, model.target.device)
        options = {"temperature": temperature, "seed": seeds, "max_new_tokens": args.max_new_tokens, "max_length": 8192}
        pair = [generate(**batch, **options) for generate in (model.eagenerate, model.naivegenerate)]
        width = min(each.shape[1] for each in pair)
        for row, seed in enumerate(seeds):
            fast, plain = (each[row, :width] for each in pair)
            differs = (fast != plain).nonzero()
            if not len(differs):
                same += 1
                continue
            prefix = plain[: int(differs[0])][batch["attention_mask"].shape[1] - len(part[row]) :]
            gaps.append(top_two_gap(model, prefix, temperature, seed))
    return {
        "temperature": temperature, "prompts": len(prompts), "same": same,
        "median_gap": round(statistics.median(gaps), 5) if gaps else None,
        "largest_gap": round(max(gaps), 5) if gaps else None,
    }  # fmt: skip


def main() -> int:
    args = parse()
    model = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, device_map=args.device, dtype=getattr(torch, args.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [prompt for path in args.prompts for prompt in read_prompts(path, tokenizer, args.limit)]
    rows = [compare(model, prompts, args, temperature) for temperature in args.temperature]
    print(
        f"{args.dtype}, {args.max_new_tokens} tokens\n{'T':>5}{'prompts':>9}{'same':>7}{'median gap':>12}{'most':>10}"
    )
    for row in rows:
        gaps = f"{row['median_gap']!s:>12}{row['largest_gap']!s:>10}"
        print(f"{row['temperature']:>5.1f}{row['prompts']:>9}{row['same']:>7}{gaps}")
    record = {"bench": "lossless", "dtype": args.dtype, "max_new_tokens": args.max_new_tokens, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0 if args.dtype != "float32" or all(row["same"] == row["prompts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
