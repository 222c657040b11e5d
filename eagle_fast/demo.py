"""`eagle-fast demo`: one prompt with and without speculation, on a small real model."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from eagle_fast.loading_arguments import load_pair
from eagle_fast.pairs import SMOLLM2
from eagle_fast.text import TextStream


class Run(NamedTuple):
    """One decoding of the prompt. seconds: from the first token on, so without the prefill."""

    ids: torch.Tensor
    rounds: int
    new_tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        return self.new_tokens / self.seconds


def decode(rounds: Iterator[torch.Tensor], prompt_length: int, tokenizer: Any) -> Run:
    """Print the text of `rounds`, which yields the ids so far, as it grows."""
    stream, count, first, ids = TextStream(tokenizer), 0, 0, torch.empty(1, 0)
    started = time.perf_counter()
    for ids in rounds:
        if not count:
            first, started = ids.shape[1] - prompt_length, time.perf_counter()
        count += 1
        for token in ids[0, prompt_length + len(stream.ids) :].tolist():
            print(stream.take(token), end="", flush=True)
    seconds = time.perf_counter() - started
    print(stream.rest() + "\n", flush=True)
    return Run(ids, count, ids.shape[1] - prompt_length - first, max(seconds, 1e-9))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def run(args: argparse.Namespace) -> int:
    """Returns 0 if both texts are the same."""
    started = time.perf_counter()
    model = load_pair(args)
    tokenizer = model.tokenizer
    chat = [{"role": "user", "content": args.prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    options = {"temperature": args.temperature, "seed": args.seed, "max_new_tokens": args.max_new_tokens}
    options["max_length"] = length = ids.shape[1] + args.max_new_tokens
    if model.target.device.type == "cuda":
        model.warmup(max_length=length)
    print(f"{SMOLLM2} on {hardware(model.target.device)}, ready after {time.perf_counter() - started:.1f} s\n")
    print("--- with EAGLE\n")
    fast = decode(model.ea_generate(ids, **options), ids.shape[1], tokenizer)
    print("--- without\n")
    plain = decode(model.naive_generate(ids, **options), ids.shape[1], tokenizer)
    same = torch.equal(fast.ids, plain.ids)
    show(fast, plain, same)
    return 0 if same else explain(model.target.dtype)


def show(fast: Run, plain: Run, same: bool) -> None:
    rows = [
        ("", "with EAGLE", "without"),
        ("tokens per round (tau)", f"{fast.new_tokens / max(fast.rounds - 1, 1):.2f}", "1.00"),
        ("tokens per second", f"{fast.speed:.1f}", f"{plain.speed:.1f}"),
        ("speed-up", f"{fast.speed / plain.speed:.2f}x", "1.00x"),
        ("same text", "yes" if same else "NO", ""),
    ]
    for label, left, right in rows:
        print(f"{label:<22}{left:>12}{right:>12}")


def explain(dtype: torch.dtype) -> int:
    print(
        f"\nThe texts differ. In {dtype} a tree of rows and a single row round differently, so the choice between two "
        "nearly equal logits may flip; in float32 the texts are the same.",
        file=sys.stderr,
    )
    return 1
