"""Answer prompts with the draft head: given here, in files, or on stdin.

    eagle-fast generate "Name three uses of a brick."
    eagle-fast generate --model TARGET --head HEAD --temperature 0.7 --seed 1 "Write a haiku." "Write another."
    eagle-fast generate < question.txt                                # all of stdin is one prompt
    eagle-fast generate --file prompts.jsonl --json > answers.jsonl   # a line of JSON for each
    eagle-fast generate --compare "Why is the sky blue?"              # plainly too: same text? how much faster?
    eagle-fast generate --raw "Once upon a time"                      # goes on with the text, without a chat template

A file of prompts is .jsonl with an object a line (messages, turns, prompt or text), or has a prompt a line. Texts go to
stdout, how fast they came to stderr. With --compare the exit code is 1 if a text differs from plain decoding's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eagle_fast.decoding.statistics import Statistics
from eagle_fast.loading_arguments import add_loading_arguments, load_pair
from eagle_fast.model import EaModel
from eagle_fast.prompts import Prompt, read_prompts
from eagle_fast.shell.answer import decode, encode, figures, parted, summary
from eagle_fast.shell.chat import add_template_argument
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import Settings, add_sampling_arguments, settings_of
from eagle_fast.text import TextStream


class Text(NamedTuple):
    """One decoding of a prompt."""

    ids: list[int]
    text: str
    statistics: Statistics

    @property
    def record(self) -> dict[str, Any]:
        return {"text": self.text, **figures(self.statistics)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer; - or nothing: what stdin holds")
    parser.add_argument(
        "--file", nargs="+", type=Path, default=[], metavar="FILE", dest="files", help="files of prompts"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt, when it is answered")
    parser.add_argument("--compare", action="store_true", help="decode plainly as well, and compare texts and speed")
    parser.add_argument("--raw", action="store_true", help="continue prompts as they stand, without the chat template")
    parser.add_argument("--colors", action="store_true", help="show accepted drafts in green, on a terminal")
    add_template_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=512, seed=0)
    add_loading_arguments(parser)


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
