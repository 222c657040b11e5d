"""`eagle-fast bench`: with the draft head, plainly by the same engine, and by stock generate, one after the other."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from rich.progress import track

from eagle_fast.config import check_positive
from eagle_fast.decoding.statistics import Statistics
from eagle_fast.demo import hardware
from eagle_fast.loading_arguments import load_pair, name_of
from eagle_fast.model import EaModel
from eagle_fast.prompts import Prompt, read_prompts
from eagle_fast.shell.answer import encode, parted
from eagle_fast.shell.figures import WAYS, plot, table
from eagle_fast.shell.own_prompts import PROMPTS
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import Settings

PLOTS = (".png", ".pdf", ".svg")
WARM_TOKENS = 24  # of the first prompt, in every way, before the clock


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if a text is not that of plain decoding."""
    _check(args)
    prompts: list[Prompt] = read_prompts(args.prompts) if args.prompts else list(PROMPTS)
    prompts, screen = prompts[: args.limit], Screen()
    model = load_pair(args)
    ids = [encode(model.tokenizer, prompt, False, args.chat_template_kwargs) for prompt in prompts]
    record = describe(args, model)
    record["rows"] = measure(model, prompts, ids, args, screen)
    text = json.dumps(record, ensure_ascii=False)
    if args.json:
        screen.write(text + "\n")
    else:
        for temperature in args.temperature:
            rows = [row for row in record["rows"] if row["temperature"] == temperature]
            screen.show(table(rows, temperature, screen.answers.width))
        screen.note(f"{record['model']} in {record['dtype']} on {record['hardware']}; tokens/s of whole calls")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.plot:
        plot(record, args.plot)
    different = sum(not row["same"] for row in record["rows"])
    if different:
        screen.warn(parted(different, len(record["rows"]), model))
    return 1 if different else 0


def _check(args: argparse.Namespace) -> None:
    """Before anything is loaded."""
    if args.plot and args.plot.suffix.lower() not in PLOTS:
        raise ValueError(f"--plot {args.plot}: name a file that ends in {', '.join(PLOTS[:-1])} or {PLOTS[-1]}")
    if args.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install 'matplotlib>=3.9'")
    for name, path in (("--out", args.out), ("--plot", args.plot)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise ValueError(f"{name} {path} is a folder: name a file")
    check_positive(limit=1 if args.limit is None else args.limit)
    if args.stock is not None and args.stock < 0:
        raise ValueError(f"--stock {args.stock}: use a number of prompts, 0 for none")
    for temperature in args.temperature:
        Settings(temperature=temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)


def describe(args: argparse.Namespace, model: EaModel) -> dict[str, Any]:
    return {
        "bench": "eagle-fast bench", "model": name_of(args), "head": args.head or "shipped", "tree": args.tree,
        "adaptive": model.adaptive, "dtype": str(model.target.dtype).removeprefix("torch."),
        "exactness": str(model.exactness), "max_new_tokens": args.max_new_tokens,
        "tensor_parallel": model.target.links and len(model.target.links.devices),
        "hardware": hardware(model.target.device), "eagle_fast": version("eagle-fast"), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def measure(model: EaModel, prompts: list[Prompt], ids: list[list[int]], args, screen: Screen) -> list[dict[str, Any]]:
    """A row for every prompt and temperature."""
    num_stock = len(prompts) if args.stock is None else args.stock
    if num_stock and model.target.links is not None:
        screen.note("no stock generate: base_model's layers are cut over several GPUs, and only this engine runs them")
        num_stock = 0
    if model.target.device.type == "cuda":
        with screen.busy("compiling, and timing the trees"):
            model.warmup(max_length=max(map(len, ids)) + args.max_new_tokens)
    rows = []
    for temperature in args.temperature:
        settings = Settings(temperature=temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)
        ways = _ways(model, settings)
        warm = _ways(model, Settings(temperature, seed=args.seed, max_new_tokens=min(WARM_TOKENS, args.max_new_tokens)))
        for name in WAYS if num_stock else WAYS[:2]:
            warm[name](ids[0])
        label = f"T={temperature:g}"
        hidden = not (screen.notes.is_terminal and screen.answers.is_terminal)
        for index in track(range(len(prompts)), label, console=screen.notes, transient=True, disable=hidden):
            texts, row = {}, {"prompt": prompts[index], "temperature": temperature}
            for name in WAYS if index < num_stock else WAYS[:2]:
                started = time.perf_counter()
                texts[name], statistics = ways[name](ids[index])
                seconds = time.perf_counter() - started
                row[name] = {"tokens": len(texts[name]), "seconds": round(seconds, 4)}
                if name == "head":
                    row["tau"] = round(statistics.tau, 3)
                    row["acceptance"] = [round(share, 3) for share in statistics.acceptance]
            rows.append(row | {"same": texts["head"] == texts["plain"]})
    return rows


def _ways(model: EaModel, settings: Settings) -> dict[str, Callable[[list[int]], tuple[list[int], Statistics]]]:
    """name of `WAYS` -> a function from a prompt to its new tokens, and what is known of how they came."""

    def ours(generate: Callable) -> Callable:
        def call(ids: list[int]):
            out = generate(torch.tensor([ids]), return_dict_in_generate=True, **settings.arguments(len(ids)))
            return out.sequences[0, len(ids) :].tolist(), out.statistics

        return call

    def stock(ids: list[int]):
        given = torch.tensor([ids], device=model.target.input_device)
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if settings.temperature > 0:
            sampling |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generate: Any = model.base_model.generate
            out = generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=settings.max_new_tokens, **sampling
            )
        return out[0, len(ids) :].tolist(), Statistics()

    return {"head": ours(model.eagenerate), "plain": ours(model.naivegenerate), "stock": stock}
