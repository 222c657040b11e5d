"""What a head's weights in int8 cost in acceptance, on a real pair: tau with the weights as they are, and quantized.

    python bench/int8_head.py --model TARGET --head HEAD --prompts mt_bench.jsonl gsm8k.jsonl

On a GPU both run through the kernels; on a CPU the quantized weights are computed with in the target's dtype, which
tells the same within noise. Tau is tokens per round, over the first turns of the prompts. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from decode import accepted_counts, add_pair_arguments, read_prompts
from lib.records import write
from transformers import AutoTokenizer

from eagle_fast import EaModel


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=80, metavar="N", help="prompts per file (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="prompts at once (default %(default)s)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--tree", nargs=3, type=int, default=[60, 7, 10], metavar=("NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.set_defaults(no_shared_noise=False)  # for accepted_counts
    return parser.parse_args()


def main() -> None:
    args = parse()
    tree = {**dict(zip(("total_token", "depth", "top_k"), args.tree, strict=True)), "adaptive": False}
    plain = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, device_map=args.device, dtype=getattr(torch, args.dtype),
        draft_int8=False, **tree,
    )  # fmt: skip
    quantized = EaModel.from_pretrained(
        base_model_path=plain.base_model, ea_model_path=args.head, draft_int8=False, **tree
    )
    quantized.ea_layer.quantize()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    print(f"{'prompts':<16}{'T':>5}{'tau':>8}{'in int8':>8}{'ratio':>9}")
    for path in args.prompts:
        prompts = read_prompts(path, tokenizer, args.limit)
        for temperature in args.temperature:
            tau, tau_int8 = (accepted_counts(each, prompts, args, temperature).tau for each in (plain, quantized))
            row = {
                "prompts": path.stem,
                "temperature": temperature,
                "tau": round(tau, 4),
                "tau_int8": round(tau_int8, 4),
            }
            rows.append({**row, "ratio": round(tau_int8 / tau, 4)})
            print(f"{path.stem:<16}{temperature:>5.1f}{tau:>8.3f}{tau_int8:>8.3f}{tau_int8 / tau:>9.4f}", flush=True)
    ratios = [row["ratio"] for row in rows]
    print(f"mean ratio {sum(ratios) / len(ratios):.4f}")
    record = {"bench": "int8_head", "model": args.model, "head": args.head, "tree": args.tree, "rows": rows}
    if args.out:
        write(record, args.out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
