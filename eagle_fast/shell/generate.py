"""`eagle-fast generate`: prompts to texts or JSON lines, and beside plain decoding."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from eagle_fast.config import check_positive
from eagle_fast.decoding.statistics import Statistics
from eagle_fast.loading_arguments import load_pair
from eagle_fast.model import EaModel
from eagle_fast.prompts import Prompt, read_prompts
from eagle_fast.shell.answer import decode, decode_batch, encode, figures, parted, summary
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import Settings, settings_of
from eagle_fast.stop_strings import stop_criterion
from eagle_fast.text import TextStream


class Text(NamedTuple):
    """One answer. statistics: of all that were decoded together, so many."""

    ids: list[int]
    text: str
    statistics: Statistics
    batch: int = 1

    @property
    def record(self) -> dict[str, Any]:
        return {"text": self.text, **figures(self.statistics), "tokens": len(self.ids), "batch": self.batch}


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if a text is not that of plain decoding."""
    screen, settings, prompts = Screen(args.colors), settings_of(args), gather(args)
    check_positive(batch=args.batch)
    if not all(args.stop):
        raise ValueError("--stop: a text is empty")
    model, same = load_pair(args), []
    more = {"stopping_criteria": [stop_criterion(model.tokenizer, args.stop, "--stop")]} if args.stop else {}
    encoded = [encode(model.tokenizer, prompt, args.raw, args.chat_template_kwargs) for prompt in prompts]
    for first in range(0, len(prompts), args.batch):
        some, ids = prompts[first : first + args.batch], encoded[first : first + args.batch]
        shown = not args.json
        titles = [f"--- {first + place} of {len(prompts)}" for place in range(1, len(some) + 1)]
        with_head = answers(model, ids, settings, more, screen, titles if shown and len(prompts) > 1 else [], shown)
        plain = answers(model, ids, settings, more, screen, with_head=False) if args.compare else None
        same += [] if plain is None else [ours.ids == other.ids for ours, other in zip(with_head, plain, strict=True)]
        if shown:
            tell(screen, with_head, plain, sum(map(len, ids)))
            continue
        for place, prompt in enumerate(some):
            line = record(prompt, with_head[place], None if plain is None else plain[place])
            screen.write(json.dumps(line, ensure_ascii=False) + "\n")
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


def answers(
    model: EaModel,
    ids: list[list[int]],
    settings: Settings,
    more: dict[str, Any],
    screen: Screen,
    titles: Sequence[str] = (),
    shown: bool = False,
    *,
    with_head: bool = True,
) -> list[Text]:
    """Decode prompts together; shown: write the texts below their titles, of a single one as it comes. more: options of
    `eagenerate`."""
    if len(ids) == 1:
        for title in titles:
            screen.note(title)
        return [answer(model, ids[0], settings, more, screen, shown, with_head=with_head)]
    found, statistics = decode_batch(model, ids, settings, with_head=with_head, **more)
    texts = [Text(each, model.tokenizer.decode(each, skip_special_tokens=True), statistics, len(ids)) for each in found]
    for title, text in zip(titles, texts, strict=False):
        screen.note(title)
        screen.write(text.text + "\n")
    return texts


def answer(
    model: EaModel,
    ids: list[int],
    settings: Settings,
    more: dict[str, Any],
    screen: Screen,
    shown: bool,
    *,
    with_head: bool = True,
) -> Text:
    """Decode a prompt; shown: write the text as it comes."""
    stream, statistics, found = TextStream(model.tokenizer), Statistics(), []
    for step in decode(model, ids, settings, with_head=with_head, **more):
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


def tell(screen: Screen, with_head: list[Text], plain: list[Text] | None, prompt_tokens: int) -> None:
    """How prompts that were decoded together went."""
    together = f"{len(with_head)} together: " * (len(with_head) > 1)
    screen.note(together + summary(with_head[0].statistics, prompt_tokens))
    if plain is not None:
        others = sum(ours.ids != other.ids for ours, other in zip(with_head, plain, strict=True))
        same = "the same text" + "s" * (len(plain) > 1) if not others else f"ANOTHER text, {others} of {len(plain)}"
        gain = speedup(with_head[0], plain[0])
        screen.note(f"plainly: {plain[0].statistics.tokens_per_second:.1f} tokens/s; {gain:.2f} x, {same}")
