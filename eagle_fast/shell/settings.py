"""How answers are decoded: options of the commands, and names that a conversation can set."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from eagle_fast.config import SamplingParams, check_positive, whole_number

MEANINGS = {
    "temperature": "0 is greedy",
    "top_p": "the likeliest tokens of so much probability together; 0 for all",
    "top_k": "so many of the likeliest tokens; 0 for all",
    "min_p": "tokens of at least this share of the likeliest one's probability; 0 for all",
    "seed": "the same seed gives the same text, with the head and without",
    "max_new_tokens": "longest answer",
}
TYPES = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int, "max_new_tokens": int}


@dataclass(frozen=True)
class Settings:
    """Arguments of `eagenerate`. Raises ValueError for what cannot be meant."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        with warnings.catch_warnings():  # the call itself warns
            warnings.simplefilter("ignore")
            SamplingParams(self.temperature, self.top_p, self.top_k, self.min_p, self.seed)
        check_positive(max_new_tokens=self.max_new_tokens)

    def arguments(self, prompt_length: int) -> dict[str, Any]:
        """Those of a call whose prompt has so many tokens."""
        return asdict(self) | {"max_length": prompt_length + self.max_new_tokens}

    def changed(self, name: str, text: str) -> Settings:
        """With another value of one of them, as a user writes it."""
        if name not in TYPES:
            raise ValueError(f"there is no setting {name!r}: {', '.join(TYPES)}")
        if name == "seed" and text == "none":
            return replace(self, seed=None)
        try:
            return replace(self, **{name: TYPES[name](text)})
        except ValueError as error:
            number = "a whole number" if TYPES[name] is int else "a number"
            raise ValueError(str(error) if f"{name}=" in str(error) else f"{name} is {number}, not {text!r}") from error


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, seed: int | None) -> None:
    group = parser.add_argument_group("decoding")
    given = {"max_new_tokens": max_new_tokens, "seed": seed}
    for field in fields(Settings):
        default = given.get(field.name, field.default)
        known = "" if default is None else f" (default {default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}", type=TYPES[field.name], default=default,
            metavar="N" if whole_number(TYPES[field.name]()) is not None else "X", help=MEANINGS[field.name] + known,
        )  # fmt: skip


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat-template-kwargs", type=_object, default={}, metavar="JSON",
        help="""options of the model's chat template, as '{"enable_thinking": false}'""",
    )  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object, as {{"enable_thinking": false}}')
    return found
