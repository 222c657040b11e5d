"""Prompts: out of files, and as the token ids that a model reads.

A prompt is a user's text, or a list of messages [{"role": "user", "content": "..."}, ...].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle_fast.messages import shown

Prompt = str | list[dict[str, Any]]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file: `.jsonl` with an object per line (`messages`, `turns`, `prompt` or `text`), else a line each.

    Of `turns` the first is used, of `messages` all up to the last of the user. ValueError for a file that cannot be
    read, or holds none, and for `.json`, whose lines are no prompts.
    """
    path, prompts = Path(path), []
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ValueError(f"the file of prompts {path} is one JSON text: write an object a line, and name it .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028 and others, which JSON has in texts
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"the file of prompts {path} cannot be read: {reason}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}") if suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if isinstance(record, str):
        return _text(record, where)
    for key in ("messages", "turns", "prompt", "text"):
        value = record.get(key) if isinstance(record, dict) else None
        if key == "messages" and value:
            check_messages(value, f"{where}: messages")
            users = [index for index, message in enumerate(value) if message["role"] == "user"]
            if users:
                return value[: users[-1] + 1]
        elif key == "turns" and value:
            return _text(value[0] if isinstance(value, list) else value, f"{where}: turns")
        elif value:
            return _text(value, f"{where}: {key}")
    raise ValueError(f"{where}: needs a field messages, turns, prompt or text")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} is no text")
    return value


def check_messages(messages: Any, name: str = "messages") -> None:
    """ValueError for what is no list of messages."""
    whole = isinstance(messages, (list, tuple)) and len(messages) > 0
    for each in messages if whole else [None]:
        if not (isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each):
            raise ValueError(
                f'{name}={shown(messages)}: pass a text, or a list of {{"role": "user", "content": "..."}}'
            )


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids up to where the answer begins: in the chat template if there is one."""
    if tokenizer.chat_template is None:
        contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return token_ids(tokenizer, "\n".join(_text(each, "content") for each in contents))
    return encode(tokenizer, render(tokenizer, as_messages(prompt)))


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A text as the one message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(tokenizer: Any, messages: list[dict[str, Any]], /, **options: Any) -> str:
    """Messages in the chat template, up to where the answer begins. options: the template's own. ValueError for what
    the template does not take, such as a system message in some, or contents that are no text."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except Exception as error:  # templates are programs, and raise what they like
        given = "".join(f", {name}={shown(value)}" for name, value in options.items())
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template cannot use messages={shown(messages)}{given}: {reason}") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that has its special tokens already."""
    return token_ids(tokenizer, text, add_special_tokens=False)


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text. Raises ValueError, see `check_text`."""
    check_text(text)
    return tokenizer(text, **options).input_ids


def check_text(text: str, name: str = "the text") -> None:
    """ValueError for a text with half characters, as bytes that were no UTF-8 are read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 10, 0) : error.end + 10]
        raise ValueError(f"{name} is no UTF-8 around {around!r}: give it in that encoding") from error
