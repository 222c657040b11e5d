"""A real pair over several GPUs: does every placement give the text of one GPU, and at what speed?

    python bench/placements.py --model TARGET --head HEAD --prompts mt_bench.jsonl

The same kernels run on the same numbers wherever a layer lies, so texts must be the same in every dtype, token for
token, greedy and sampled; the exit status says so. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from decode import accepted_counts, add_pair_arguments, read_prompts, speed
from lib.records import environment, write
from transformers import AutoConfig, AutoTokenizer

from eagle_fast import EaModel
from eagle_fast.decoding.request import pad_left


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="prompts per file (default %(default)s)")
    parser.add_argument("--timed", type=int, default=4, metavar="N", help="of these, timed one by one (4; 0: none)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.set_defaults(batch=8, no_shared_noise=False)  # for accepted_counts
    return parser.parse_args()


def placements(model: str) -> dict[str, object]:
    """Device maps by name: everything on one GPU first, then several ways over all that are there."""
    count, layers = torch.cuda.device_count(), AutoConfig.from_pretrained(model).num_hidden_layers

    def by_layer(devices: list[int]) -> dict[str, int]:
        ends = {"model.embed_tokens": devices[0], "model.norm": devices[-1], "lm_head": devices[-1]}
        return ends | {f"model.layers.{n}": device for n, device in enumerate(devices)}

    shards = [n * count // layers for n in range(layers)]
    return {
        "one GPU": 0,
        "balanced": "balanced",
        "in reverse": by_layer(shards[::-1]),
        "layers in turns": by_layer([n % count for n in range(layers)]),
    }


def texts(model: EaModel, prompts: list[list[int]], args: argparse.Namespace, temperature: float) -> list[list[int]]:
    """Of each prompt alone, and of all prompts as one batch."""
    options = {"temperature": temperature, "max_new_tokens": args.max_new_tokens, "max_length": 8192}
    alone = [model.eagenerate(torch.tensor([each]), seed=n, **options) for n, each in enumerate(prompts)]
    together = model.eagenerate(**pad_left(prompts), seed=list(range(len(prompts))), **options)
    return [*(each[0].tolist() for each in alone), *together.tolist()]


def main() -> int:
    args = parse()
    if torch.cuda.device_count() < 2:
        print("placements: this bench needs two GPUs or more", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [prompt for path in args.prompts for prompt in read_prompts(path, tokenizer, args.limit)]
    rows: list[dict] = []
    expected: dict[float, list[list[int]]] = {}
    print(f"{'placement':<18}{'T':>5}{'GPUs':>6}{'texts':>7}{'same':>6}{'tau':>7}{'tokens/s':>10}")
    for name, device_map in placements(args.model).items():
        model = EaModel.from_pretrained(
            base_model_path=args.model,
            ea_model_path=args.head,
            device_map=device_map,
            dtype=getattr(torch, args.dtype),
            adaptive=False,
        )
        for temperature in args.temperature:
            own = texts(model, prompts, args, temperature)
            same = sum(a == b for a, b in zip(own, expected.setdefault(temperature, own), strict=True))
            tau = accepted_counts(model, prompts, args, temperature).tau
            row = {"placement": name, "temperature": temperature, "devices": len(model.target.devices)}
            row |= {"texts": len(own), "same": same, "tau": round(tau, 3)}
            if args.timed:
                row["tokens_per_second"] = round(speed(model.eagenerate, prompts[: args.timed], args, temperature), 1)
            rows.append(row)
            print(f"{name:<18}{temperature:>5.1f}{row['devices']:>6}{row['texts']:>7}{same:>6}{tau:>7.2f}"
                  f"{row.get('tokens_per_second', math.nan):>10.1f}", flush=True)  # fmt: skip
    record = {"bench": "placements", "dtype": args.dtype, "rows": rows, **environment(args.commit)}
    if args.out:
        write(record, args.out)
    print(json.dumps(record))
    return 0 if all(row["same"] == row["texts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
