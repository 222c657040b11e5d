"""What a conversation looks like to a model: the tokens around a user's turn, from its own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from eagle_fast.decoding.validate import id_list
from eagle_fast.target.anatomy import token_settings
from eagle_fast.target.ends import num_rows

PLACEHOLDER = "user-text-goes-here"


class ChatFormat(NamedTuple):
    """Tokens before and after the first user turn. A model without a chat template has no turns: `suffix` is None."""

    prefix: list[int]
    suffix: list[int] | None


def chat_format(tokenizer) -> ChatFormat:
    """The frame of a user's turn, up to where the answer begins."""
    if tokenizer.chat_template is None:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("the tokenizer has neither a chat template nor a token to begin with: pass prompts")
        return ChatFormat([start], None)
    rendered = _render(tokenizer, [{"role": "user", "content": PLACEHOLDER}])
    before, found, after = rendered.partition(PLACEHOLDER)
    if not found:
        raise ValueError("the tokenizer's chat template does not show the user's text: pass prompts")
    return ChatFormat(_encode(tokenizer, before), _encode(tokenizer, after))


def stop_ids(model, chat: ChatFormat) -> list[int]:
    """What ends a turn: the model's own end tokens, and the token that the template puts after a user's turn."""
    found: set[int] = set() if chat.suffix is None else {chat.suffix[0]}
    for setting in token_settings(model, "eos_token_id"):
        found |= set(id_list(setting))
    size = num_rows(model.get_output_embeddings())
    return sorted(token for token in found if 0 <= token < size)


def read_prompts(path: str | Path) -> list[Any]:
    """Prompts of a file: `.jsonl` with an object per line (`messages`, `turns`, `prompt` or `text`), else a line each.

    Returns what `encode_prompt` takes. Of `turns` the first is used, of `messages` all up to the last of the user.
    """
    path, prompts = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"the file of prompts {path} cannot be read: {reason}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompts.append(_prompt(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if isinstance(record, str):
        return record
    for key in ("messages", "turns", "prompt", "text"):
        value = record.get(key) if isinstance(record, dict) else None
        if key == "messages" and value:
            users = [index for index, message in enumerate(value) if message.get("role") == "user"]
            if users:
                return value[: users[-1] + 1]
        elif value:
            return value[0] if key == "turns" else value
    raise ValueError(f"{where}: needs a field messages, turns, prompt or text")


def encode_prompt(tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids up to where the answer begins: a user's text or a list of messages, in the chat template if any."""
    if tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        return tokenizer(text).input_ids
    return _encode(
        tokenizer, _render(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    )


def _render(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
