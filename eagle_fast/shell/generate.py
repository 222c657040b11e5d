"""`eagle-fast generate`: prompts to texts or JSON lines, and beside plain decoding."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

from eagle_fast.decoding.statistics import Statistics
from eagle_fast.loading_arguments import load_pair
from eagle_fast.model import EaModel
from eagle_fast.prompts import Prompt, read_prompts
from eagle_fast.shell.answer import decode, encode, figures, parted, summary
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import Settings, settings_of
from eagle_fast.text import TextStream


class Text(NamedTuple):
    """One decoding of a prompt."""

    ids: list[int]
    text: str
    statistics: Statistics

    @property
    def record(self) -> dict[str, Any]:
        return {"text": self.text, **figures(self.statistics)}


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if a text is not that of plain decoding."""
    screen, settings, prompts = Screen(args.colors), settings_of(args), gather(args)
    model, same = load_pair(args), []
    for number, prompt in enumerate(prompts, start=1):
        ids = encode(model.tokenizer, prompt, args.raw, args.chat_template_kwargs)
        if len(prompts) > 1 and not args.json:
            screen.note(f"--- {number} of {len(prompts)}")
        with_head = answer(model, ids, settings, screen, not args.json)
        plain = answer(model, ids, settings, screen, False, with_head=False) if args.compare else None
        same += [] if plain is None else [plain.ids == with_head.ids]
        if args.json:
            screen.write(json.dumps(record(prompt, with_head, plain), ensure_ascii=False) + "\n")
        else:
            tell(screen, with_head, plain, len(ids))
    if not all(same):
        screen.warn(parted(same.count(False), len(same), model))
    return 0 if all(same) else 1


def gather(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that were given, in order: arguments, then files, or else stdin. Raises ValueError."""
    found: list[Prompt] = [_stdin() if each == "-" else each for each in args.prompts]
    for file in args.files:
        found += read_prompts(file)
    if not found:
        if sys.stdin.isatty():
            raise ValueError('there is no prompt: eagle-fast generate "...", --file FILE, or text on stdin')
        found = [_stdin()]
    if not all(each.strip() if isinstance(each, str) else each for each in found):
        raise ValueError("a prompt is empty: there is nothing to answer")
    return found


def _stdin() -> str:
    return sys.stdin.read().removesuffix("\n")


def answer(
    model: EaModel, ids: list[int], settings: Settings, screen: Screen, shown: bool, *, with_head: bool = True
) -> Text:
    """Decode a prompt; shown: write the text as it comes."""
    stream, statistics, found = TextStream(model.tokenizer), Statistics(), []
    for step in decode(model, ids, settings, with_head=with_head):
        found += step.tokens
        statistics = step.statistics
        if shown:
            screen.round(stream, step)
    if shown:
        screen.write(stream.rest() + "\n")
    return Text(found, model.tokenizer.decode(found, skip_special_tokens=True), statistics)


def record(prompt: Prompt, with_head: Text, plain: Text | None) -> dict[str, Any]:
    """What a line of JSON says."""
    found = {"prompt": prompt, **with_head.record}
    if plain is not None:
        found |= {
            "plain": plain.record,
            "same": plain.ids == with_head.ids,
            "speedup": round(speedup(with_head, plain), 3),
        }
    return found


def speedup(with_head: Text, plain: Text) -> float:
    """Of decoding alone, without the prompt's prefill."""
    slow = plain.statistics.tokens_per_second
    return with_head.statistics.tokens_per_second / slow if slow else 0.0


def tell(screen: Screen, with_head: Text, plain: Text | None, prompt_tokens: int) -> None:
    screen.note(summary(with_head.statistics, prompt_tokens))
    if plain is not None:
        same = "the same text" if plain.ids == with_head.ids else "ANOTHER text"
        screen.note(
            f"plainly: {plain.statistics.tokens_per_second:.1f} tokens/s; {speedup(with_head, plain):.2f} x, {same}"
        )
