"""Acceptance and speed of a real pair over prompt files.

    python bench/decode.py --model TARGET --head HEAD --prompts mt_bench.jsonl gsm8k.jsonl --out results/

For every file and temperature: tau (tokens per round), the share of rounds that accept at least 1, 2, ... drafted
tokens, and tokens per second one prompt at a time, against plain decoding by the same engine and stock `generate`.
Prompts are the first turns of JSON lines with "turns", under the model's chat template. Prints a table and one line of
JSON; with --out also writes the JSON and a plot of speed-up and acceptance.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from lib.plots import plot_decode
from transformers import AutoTokenizer

from eagle_fast import EaModel, Statistics
from eagle_fast.decoding.request import pad_left


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """What every bench of a real pair is told."""
    parser.add_argument("--model", required=True, help="target: folder or hub name")
    parser.add_argument("--head", required=True, help="EAGLE head: folder or hub name")
    parser.add_argument(
        "--prompts", nargs="+", type=Path, required=True, metavar="FILE", help="JSON lines with 'turns'"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=80, metavar="N", help="prompts per file (default %(default)s)")
    parser.add_argument("--timed", type=int, default=8, metavar="N", help="prompts per file timed alone (default 8)")
    parser.add_argument("--stock", type=int, default=2, metavar="N", help="of these, also run by stock generate (2)")
    parser.add_argument("--stock-tokens", type=int, default=64, metavar="N", help="new tokens of each (default 64)")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="prompts at once where tau is counted (16)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--tree", nargs=3, type=int, default=[60, 7, 10], metavar=("NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--no-shared-noise", action="store_true", help="the draft ranks by its own probabilities")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="folder for decode.json and decode.png")
    return parser.parse_args()


def read_turns(path: Path, limit: int) -> list[list[str]]:
    """What the user says, turn after turn, in each of the first lines."""
    return [json.loads(line)["turns"] for line in path.read_text().splitlines()[:limit]]


def templated(tokenizer, chat: list[dict[str, str]]) -> list[int]:
    """The prompt of a chat whose next turn is the assistant's."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def read_prompts(path: Path, tokenizer, limit: int) -> list[list[int]]:
    """The first turns."""
    return [templated(tokenizer, [{"role": "user", "content": turns[0]}]) for turns in read_turns(path, limit)]


def accepted_counts(model: EaModel, prompts: list[list[int]], args, temperature: float) -> Statistics:
    """Rounds and accepted tokens over all prompts, in batches."""
    total = Statistics()
    for start in range(0, len(prompts), args.batch):
        part = prompts[start : start + args.batch]
        seeds = list(range(start, start + len(part)))
        out = model.eagenerate(
            **pad_left(part), temperature=temperature, seed=seeds,
            max_new_tokens=args.max_new_tokens, max_length=8192, shared_noise=not args.no_shared_noise,
            return_dict_in_generate=True,
        )  # fmt: skip
        total += out.statistics
    return total


def speed(generate, prompts: list[list[int]], args, temperature: float) -> float:
    """Tokens a second of decoding, one prompt at a time, the first not counted."""
    tokens = seconds = 0.0
    for index, prompt in enumerate([prompts[0], *prompts]):
        out = generate(
            torch.tensor([prompt]), temperature=temperature, seed=index, max_new_tokens=args.max_new_tokens,
            max_length=8192, return_dict_in_generate=True,
        )  # fmt: skip
        if index:
            tokens += sum(out.statistics.new_tokens)
            seconds += out.statistics.decode_seconds
    return tokens / seconds


def stock_speed(model: EaModel, prompts: list[list[int]], args, temperature: float) -> float:
    sampling = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature else {})}
    tokens = seconds = 0.0
    for index, prompt in enumerate([prompts[0], *prompts]):
        ids = torch.tensor([prompt], device=model.target.device)
        started = time.perf_counter()
        out = model.base_model.generate(ids, max_new_tokens=args.stock_tokens, **sampling)
        out.tolist()
        if index:
            seconds += time.perf_counter() - started
            tokens += out.shape[1] - len(prompt)
    return tokens / seconds


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(model: EaModel, name: str, prompts: list[list[int]], args, temperature: float) -> dict:
    counted = accepted_counts(model, prompts, args, temperature)
    rounds = sum(counted.accepted)
    row = {
        "prompts": name, "num_prompts": len(prompts), "temperature": temperature, "tau": round(counted.tau, 3),
        "accepted_at_least": [round(sum(counted.accepted[n:]) / rounds, 4) for n in range(1, len(counted.accepted))],
    }  # fmt: skip
    if args.timed:
        timed = prompts[: args.timed]
        row["tokens_per_second"] = round(speed(model.eagenerate, timed, args, temperature), 1)
        row["plain_tokens_per_second"] = round(speed(model.naivegenerate, timed, args, temperature), 1)
        row["speedup"] = round(row["tokens_per_second"] / row["plain_tokens_per_second"], 3)
        if args.stock:
            stock = stock_speed(model, timed[: args.stock], args, temperature)
            row["stock_generate_tokens_per_second"] = round(stock, 1)
    return row


def show(rows: list[dict]) -> None:
    print(
        f"\n{'prompts':<14}{'T':>5}{'tau':>7}{'tokens/s':>10}{'plain':>9}{'stock':>9}{'speed-up':>10}   accepted 1, 2.."
    )
    for row in rows:
        depths = " ".join(f"{share:.2f}" for share in row["accepted_at_least"])
        figures = [row.get(key, float("nan")) for key in ("tokens_per_second", "plain_tokens_per_second")]
        stock, speedup = row.get("stock_generate_tokens_per_second", float("nan")), row.get("speedup", float("nan"))
        print(
            f"{row['prompts']:<14}{row['temperature']:>5.1f}{row['tau']:>7.2f}{figures[0]:>10.1f}{figures[1]:>9.1f}"
            f"{stock:>9.1f}{speedup:>9.2f}x   {depths}"
        )


def main() -> None:
    args = parse()
    nodes, depth, top_k = args.tree
    model = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, total_token=nodes, depth=depth, top_k=top_k,
        adaptive=False, device_map=args.device, dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for path in args.prompts:
        prompts = read_prompts(path, tokenizer, args.limit)
        for temperature in args.temperature:
            rows.append(measure(model, path.stem, prompts, args, temperature))
            show(rows[-1:])
    for temperature in args.temperature:
        taus = [row["tau"] for row in rows if row["temperature"] == temperature]
        print(f"mean tau at T={temperature:g}: {sum(taus) / len(taus):.3f}")
    show(rows)
    record = {
        "bench": "decode", "model": args.model, "head": args.head, "tree": args.tree, "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens, "shared_noise": not args.no_shared_noise, "rows": rows,
        "hardware": hardware(model.target.device), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
        plot_decode(record, args.out / "decode.png")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
