"""`eagle-fast demo`: a prompt with speculation, without it and by stock `generate`, and what `run` says of them."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from eagle_fast.loading_arguments import load_pair
from eagle_fast.model import EaModel
from eagle_fast.pairs import SMOLLM2
from eagle_fast.prompts import check_text
from eagle_fast.shell.settings import Settings
from eagle_fast.typewriter import DRAFTED, PLAIN, Typewriter, takes_colour

ON_A_CPU = 1.3  # speed-up below which the demo says why it is so little
EAGLE, WITHOUT, STOCK = "EAGLE", "plain", "transformers"  # columns of the table


class Run(NamedTuple):
    """One decoding of the prompt. ids: of the new tokens. seconds: from the first of them on, so without the prompt's;
    timed: how many tokens came in them, in so many rounds."""

    ids: list[int]
    rounds: int
    timed: int
    seconds: float

    @property
    def speed(self) -> float:
        return self.timed / self.seconds

    @property
    def tau(self) -> float:
        return self.timed / max(self.rounds, 1)


class Recorder:
    """Shows tokens as they come, and when: `take` gets all new ids so far, once a round."""

    def __init__(self, typewriter: Typewriter):
        self.typewriter, self.ids = typewriter, list[int]()
        self.rounds = self.first = 0
        self.started = 0.0

    def take(self, ids: list[int]) -> None:
        if not self.ids:
            self.first, self.started = len(ids), time.perf_counter()
        else:
            self.rounds += 1
        self.ids = ids
        self.typewriter.show(ids)

    def finish(self) -> Run:
        seconds = time.perf_counter() - self.started
        self.typewriter.end()
        return Run(self.ids, self.rounds, len(self.ids) - self.first, max(seconds, 1e-9))


class Streamer(BaseStreamer):
    """Takes the tokens of transformers' `generate` to a recorder; the prompt comes first."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.ids = recorder, list[int]()
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        if not self.begun:
            self.begun = True
        else:
            self.ids += value.tolist()
            self.recorder.take(list(self.ids))

    def end(self) -> None:
        pass


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads != 1)}"


def run(args: argparse.Namespace) -> int:
    """Returns 0 if the texts are the same, as far as that is promised."""
    started = time.perf_counter()
    logging.disable_progress_bar()  # of half a second
    check_text(args.prompt, "the prompt")
    settings = Settings(temperature=args.temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)
    model = load_pair(args)
    tokenizer = model.tokenizer
    chat = [{"role": "user", "content": args.prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    length = ids.shape[1] + args.max_new_tokens
    if model.target.device.type == "cuda":
        model.warmup(max_length=length)
        stock_generate(model, ids, max_new_tokens=2, do_sample=False)
    print(f"{SMOLLM2} on {hardware(model.target.device)}, ready after {time.perf_counter() - started:.1f} s")
    print(f"> {args.prompt}\n")
    runs = decode_all(model, tokenizer, ids, settings)
    show(runs, model.target.device)
    return judge(runs, model.target.dtype, args.temperature)


def stock_generate(model: EaModel, ids: torch.Tensor, **options: Any) -> None:
    """transformers' own generate of the target, which knows nothing of the head."""
    stock: Any = model.base_model
    ids = ids.to(model.target.device)
    stock.generate(ids, attention_mask=torch.ones_like(ids), **options)


def decode_all(model: EaModel, tokenizer: Any, ids: torch.Tensor, settings: Settings) -> dict[str, Run]:
    """The prompt ids [1, L] in three ways, each shown as it goes."""
    options, temperature = settings.arguments(ids.shape[1]), settings.temperature

    def ours(method: Callable[..., Iterator[torch.Tensor]], recorder: Recorder) -> None:
        for sequences in method(ids, **options):
            recorder.take(sequences[0, ids.shape[1] :].tolist())

    def stock(recorder: Recorder) -> None:
        greedy = {"do_sample": False}
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else greedy
        stock_generate(model, ids, max_new_tokens=settings.max_new_tokens, streamer=Streamer(recorder), **sampling)

    coloured = takes_colour(sys.stdout)
    legend = f" ({DRAFTED}green{PLAIN}: drafted by the head, accepted by the model)" if coloured else ""
    ways: dict[str, tuple[str, Callable[[Recorder], None]]] = {
        EAGLE: (f"with EAGLE{legend}", lambda recorder: ours(model.ea_generate, recorder)),
        WITHOUT: ("plain: the same engine without the head", lambda recorder: ours(model.naive_generate, recorder)),
        STOCK: ("transformers: stock generate of the same model", stock),
    }
    runs = {}
    for name, (title, decode) in ways.items():
        print(f"--- {title}\n")
        recorder = Recorder(Typewriter(tokenizer))
        decode(recorder)
        runs[name] = recorder.finish()
        print()
    return runs


def show(runs: dict[str, Run], device: torch.device) -> None:
    plain = runs[WITHOUT]
    rows = [
        ("", list(runs)),
        ("tokens per second", [f"{each.speed:.1f}" for each in runs.values()]),
        ("speed-up over plain", [f"{each.speed / plain.speed:.2f}x" for each in runs.values()]),
        ("tokens per round (tau)", [f"{each.tau:.2f}" for each in runs.values()]),
    ]
    for label, cells in rows:
        print(f"{label:<24}" + "".join(f"{cell:>14}" for cell in cells))
    if device.type == "cpu" and runs[EAGLE].speed < ON_A_CPU * plain.speed:
        print("  a CPU takes longer for each token that it checks; a GPU checks a round's for the price of about one")
    print()


def judge(runs: dict[str, Run], dtype: torch.dtype, temperature: float) -> int:
    """Compare the texts, and say how; 0 where what has to be the same is."""
    fast, plain, stock = (runs[name].ids for name in (EAGLE, WITHOUT, STOCK))
    exact = fast == plain
    print(f"{'same text':<24}{'yes' if exact and (temperature or stock == plain) else 'see below':>14}")
    print(f"  with EAGLE and plain: {difference(fast, plain)}")
    if temperature:
        print("  transformers draws with other random numbers, so only its speed can be compared")
    else:
        print(f"  plain and transformers: {difference(plain, stock)}")
        if stock != plain:
            print(f"  in {dtype} stock code rounds its own way, and one of two nearly equal tokens may win (exactness)")
    if not exact:
        print(
            f"The texts with and without the head differ. In {dtype} on this device a tree of rows and a single row "
            "may round differently (model.exactness says where); in float32 the texts are the same.",
            file=sys.stderr,
        )
    return 0 if exact and (temperature or stock == plain or dtype != torch.float32) else 1


def difference(first: list[int], second: list[int]) -> str:
    """How two lists of token ids compare, in words."""
    if first == second:
        return f"all {len(first)} token ids compared, one by one: equal"
    same = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return f"the token ids differ from number {(min(len(first), len(second)) if same is None else same) + 1} on"
