"""Is the text of a real pair the target's own, to the bit? Every prompt with the head, in batches of several sizes,
against plain decoding of that prompt alone, for the same seed.

    python bench/lossless.py --model TARGET --head HEAD --prompts mt_bench.jsonl gsm8k.jsonl --dtype bfloat16 --chat

The reference of a prompt is `naivegenerate` of it by itself, batch 1, with a seed of its own. It is computed once for
each temperature; then every batch size decodes all prompts with the head, and the texts are compared token for token.
With --target-bits the texts are those of the rounded model, with the head and without.
With --chat, two turns of a conversation follow, batch 1: the second goes on from the rows that the first left
(`reuse_cache=True`), plain decoding's from its own, and both turns must be the same.

    T        temperature; 0 is greedy
    batch    prompts decoded at once with the head
    same     texts that are the reference, of so many

The exit status is 0 only if all are the same, where that is promised: in float32, and in 16 bits of a model whose
`exactness` is "bitwise". Where texts part, the table says after how many tokens, and how far apart the two best scores
(logits, over the temperature, with the position's noise) were there: as a number, and in roundings of the best token's
logit to the precision. A gap of more than some roundings is a fault, whatever the precision.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from decode import add_pair_arguments, hardware, read_turns, templated
from eagle_fast_kernels.noise import gumbel_row_ref
from lib.records import environment, write
from tqdm import tqdm
from transformers import AutoTokenizer

from eagle_fast import EaModel
from eagle_fast.decoding.request import pad_left

FOLLOW_UP = "Say that again in other words."  # the second turn of prompts that have one only
Texts = list[list[int]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--limit", type=int, default=67, metavar="N", help="prompts per file (default %(default)s)")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8, 67], metavar="B",
        help="prompts at once with the head, one or several sizes (default 1 8 67)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each text (128)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0], metavar="T", help="(0 and 1)")
    parser.add_argument("--chat", action="store_true", help="also two turns of every conversation, with reuse_cache")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(default %(default)s)"
    )
    parser.add_argument("--target-bits", type=int, choices=[4, 8], help="round the model's layers to so many bits")
    parser.add_argument("--lm-head-bits", type=int, choices=[8], help="the same of lm_head and embedding")
    parser.add_argument("--device", default="auto", help="device_map of the model (default %(default)s)")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="cut every layer over so many GPUs")
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the record, as JSON")
    args = parser.parse_args()
    if min(args.batch) < 1:
        parser.error(f"--batch {min(args.batch)}: a batch has one prompt or more")
    return args


class Parting(NamedTuple):
    """Where a text with the head leaves the one without."""

    prompt: int
    token: int  # of the answer, from 0
    gap: float  # between the two best scores there
    roundings: float  # the same over the spacing of the dtype's numbers at the best token's logit


@torch.no_grad()
def top_two_gap(model: EaModel, text: list[int], temperature: float, seed: int) -> tuple[float, float]:
    """Distance of the two best scores for the token after `text`: (as it is, in roundings)."""
    if model.target.links is None:
        logits = model.base_model(torch.tensor([text], device=model.target.input_device)).logits[0, -1]
    else:  # over ranks there is no other model than the engine's
        options = {"max_new_tokens": 1, "max_length": len(text) + 1, "eos_token_id": []}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        logits = model.naivegenerate(torch.tensor([text]), **options).logits[0][0]
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


def answers(
    generate: Callable, prompts: Texts, seeds: list[int], args, temperature: float, **more
) -> tuple[Texts, list[int]]:
    """Of prompts that are decoded as one batch: (new tokens, how many of the prompt's were in the cache)."""
    out = generate(
        **pad_left(prompts), temperature=temperature, seed=seeds, max_new_tokens=args.max_new_tokens, max_length=8192,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    first, done = max(map(len, prompts)), out.statistics
    rows = zip(out.sequences.tolist(), done.new_tokens, strict=True)
    return [row[first : first + count] for row, count in rows], done.reused_tokens


def in_batches(generate: Callable, prompts: Texts, size: int, args, temperature: float, bar: tqdm) -> Texts:
    """The new tokens of all prompts, so many at a time; each prompt's seed is its number."""
    texts: Texts = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        texts += answers(generate, part, list(range(start, start + len(part))), args, temperature)[0]
        bar.update(len(part))
    return texts


class Turn(NamedTuple):
    """One turn of a conversation."""

    prompt: list[int]  # all of the chat before the answer
    new: list[int]
    reused: int  # tokens of the prompt that were in the cache


def conversation(generate: Callable, said: list[str], tokenizer, args, temperature: float, seed: int) -> list[Turn]:
    """Two turns, the second of which goes on from what the first left."""
    chat: list[dict[str, str]] = []
    turns = []
    for text in (*said, FOLLOW_UP)[:2]:
        chat.append({"role": "user", "content": text})
        prompt = templated(tokenizer, chat)
        (new,), (reused,) = answers(generate, [prompt], [seed], args, temperature, reuse_cache=True)
        chat.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
        turns.append(Turn(prompt, new, reused))
    return turns


def partings(model: EaModel, prompts: Texts, plain: Texts, fast: Texts, temperature: float) -> list[Parting]:
    """Where texts of these prompts part; the number of a prompt is its seed."""
    found = []
    for seed, (prompt, mine, theirs) in enumerate(zip(prompts, plain, fast, strict=True)):
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            token = next((n for n, (one, other) in pairs if one != other), min(len(mine), len(theirs)))
            gap = top_two_gap(model, [*prompt, *mine[:token]], temperature, seed)
            found.append(Parting(seed, token, *gap))
    return found


def measure(model: EaModel, prompts: Texts, args, temperature: float, bar: tqdm) -> list[dict]:
    """A row for every batch size."""
    plain = in_batches(model.naivegenerate, prompts, 1, args, temperature, bar)
    rows = []
    for batch in args.batch:
        fast = in_batches(model.eagenerate, prompts, batch, args, temperature, bar)
        found = partings(model, prompts, plain, fast, temperature)
        rows.append({"temperature": temperature, "batch": batch, **summary(len(prompts), found)})
    return rows


def measure_chat(model: EaModel, chats: list[list[str]], tokenizer, args, temperature: float, bar: tqdm) -> dict:
    """The row of two turns. Both ways of decoding go on from their own states: none at first, then the last one."""
    plain: list[list[Turn]] = []
    fast: list[list[Turn]] = []
    for generate, done in ((model.naivegenerate, plain), (model.eagenerate, fast)):
        model.states.clear()
        for seed, said in enumerate(chats):
            done.append(conversation(generate, said, tokenizer, args, temperature, seed))
            bar.update(len(done[-1]))
    parts = [where_they_part(*pair) for pair in zip(plain, fast, strict=True)]
    mine, theirs = zip(*parts, strict=True)
    found = partings(model, [each.prompt for each in mine], [each.new for each in mine],
                     [each.new for each in theirs], temperature)  # fmt: skip
    again = [turns[-1] for turns in fast]
    reused = sum(each.reused for each in again) / sum(len(each.prompt) for each in again)
    return {"temperature": temperature, "batch": 1, "reused": round(reused, 3), **summary(len(chats), found)}


def where_they_part(plain: list[Turn], fast: list[Turn]) -> tuple[Turn, Turn]:
    """The first turn in which two conversations differ, from which on they are different ones; else the last."""
    pairs = zip(plain, fast, strict=True)
    return next((pair for pair in pairs if pair[0].new != pair[1].new), (plain[-1], fast[-1]))


def summary(count: int, found: list[Parting]) -> dict:
    """How many texts are the same; of all partings medians and largest values, how many are within a rounding, and the
    widest five."""
    row: dict = {"prompts": count, "same": count - len(found)}
    for name in ("token", "gap", "roundings"):
        values = [getattr(parting, name) for parting in found]
        row[f"median_{name}"] = round(statistics.median(values), 4) if values else None
        row[f"largest_{name}"] = round(max(values), 4) if values else None
    row["within_a_rounding"] = sum(parting.roundings <= 1 for parting in found)
    widest = sorted(found, key=lambda parting: -parting.gap)[:5]
    row["widest"] = [{name: round(value, 4) for name, value in parting._asdict().items()} for parting in widest]
    return row


def show(record: dict) -> None:
    bits = f", {record['target_bits']} bits" if record["target_bits"] else ""
    print(f"{record['dtype']}{bits}, {record['exactness']}, {record['max_new_tokens']} tokens; "
          "where texts part: median / largest")  # fmt: skip
    print(f"{'T':>5}{'batch':>7}{'texts':>7}{'same':>6}{'after tokens':>16}{'top-2 gap':>20}{'in roundings':>18}"
          f"{'within 1':>10}")  # fmt: skip
    for row in [*record["rows"], *record["chat"]]:
        cells = [f"{row[f'median_{name}']} / {row[f'largest_{name}']}" for name in ("token", "gap", "roundings")]
        if row["same"] == row["prompts"]:
            cells = [""] * 3
        texts = f"{row['temperature']:>5.1f}{row['batch']:>7}{row['prompts']:>7}{row['same']:>6}"
        print(f"{texts}{cells[0]:>16}{cells[1]:>20}{cells[2]:>18}{row['within_a_rounding']:>10}"
              + (f"   two turns, {row['reused']:.0%} reused" if "reused" in row else ""))  # fmt: skip


def main() -> int:
    args = parse()
    model = EaModel.from_pretrained(
        base_model_path=args.model, ea_model_path=args.head, device_map=args.device, dtype=getattr(torch, args.dtype),
        target_bits=args.target_bits, lm_head_bits=args.lm_head_bits, tensor_parallel=args.tensor_parallel,
    )  # fmt: skip
    model.states.max_count = 1  # what a conversation finds in it is the same for both ways of decoding
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chats = [each for path in args.prompts for each in read_turns(path, args.limit)]
    prompts = [templated(tokenizer, [{"role": "user", "content": said[0]}]) for said in chats]
    total = len(args.temperature) * len(chats) * (1 + len(args.batch) + 4 * args.chat)
    rows: list[dict] = []
    chat: list[dict] = []
    with tqdm(total=total, unit="text", disable=None) as bar:
        for temperature in args.temperature:
            bar.set_description(f"T={temperature:g}")
            rows += measure(model, prompts, args, temperature, bar)
            if args.chat:
                chat.append(measure_chat(model, chats, tokenizer, args, temperature, bar))
    record = {
        "bench": "lossless", "dtype": args.dtype, "target_bits": args.target_bits, "lm_head_bits": args.lm_head_bits,
        "exactness": model.exactness, "max_new_tokens": args.max_new_tokens,
        **({"tensor_parallel": args.tensor_parallel} if args.tensor_parallel else {}),
        "rows": rows, "chat": chat, **environment(args.commit), "hardware": hardware(model.target.device),
    }  # fmt: skip
    show(record)
    if args.out:
        write(record, args.out)
    print(json.dumps(record))
    promised = args.dtype == "float32" or model.exactness == "bitwise"
    return int(promised and any(row["same"] != row["prompts"] for row in [*rows, *chat]))


if __name__ == "__main__":
    sys.exit(main())
