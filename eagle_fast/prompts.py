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
    read, or holds none.
    """
    path, prompts = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"the file of prompts {path} cannot be read: {reason}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if isinstance(record, str):
        return record
    for key in ("messages", "turns", "prompt", "text"):
        value = record.get(key) if isinstance(record, dict) else None
        if key == "messages" and value:
            check_messages(value, f"{where}: messages")
            users = [index for index, message in enumerate(value) if message["role"] == "user"]
            if users:
                return value[: users[-1] + 1]
        elif value:
            return value[0] if key == "turns" else value
    raise ValueError(f"{where}: needs a field messages, turns, prompt or text")


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
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        return tokenizer(text).input_ids
    return encode(tokenizer, render(tokenizer, as_messages(prompt)))


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A text as the one message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Messages in the chat template, up to where the answer begins. options: the template's own."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that has its special tokens already."""
    return tokenizer(text, add_special_tokens=False).input_ids
