"""One prompt decoded, round by round, and what is said of it afterwards."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import torch

from eagle_fast.decoding.statistics import Statistics
from eagle_fast.model import EaModel
from eagle_fast.prompts import Prompt, encode_prompt, token_ids
from eagle_fast.shell.settings import Settings
from eagle_fast.text import encode_chat


class Step(NamedTuple):
    """What a round brought: its tokens, the last of them the target's own, and how it went so far."""

    tokens: list[int]
    statistics: Statistics


def decode(
    model: EaModel, prompt: list[int], settings: Settings, *, with_head: bool = True, **more: Any
) -> Generator[Step, None, None]:
    """Decode prompt, with the head or plainly. May be closed, or interrupted, at any moment. more: options of
    `eagenerate`."""
    generate = model.ea_generate if with_head else model.naive_generate
    options = settings.arguments(len(prompt)) | more
    count = len(prompt)
    rounds: Any = generate(torch.tensor([prompt]), return_dict_in_generate=True, **options)
    with closing(rounds):
        for out in rounds:
            yield Step(out.sequences[0, count:].tolist(), out.statistics)
            count = out.sequences.shape[1]


def decode_batch(
    model: EaModel, prompts: list[list[int]], settings: Settings, *, with_head: bool = True, **more: Any
) -> tuple[list[list[int]], Statistics]:
    """(tokens of each answer, how it went) of prompts decoded together, each with the text that it would have alone."""
    generate: Any = model.eagenerate if with_head else model.naivegenerate
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = settings.arguments(width) | more
    if settings.seed is not None:
        options["seed"] = [settings.seed] * len(prompts)
    out = generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    rows = zip(out.sequences[:, width:].tolist(), out.statistics.new_tokens, strict=True)
    return [row[:count] for row, count in rows], out.statistics


def encode(tokenizer: Any, prompt: Prompt, raw: bool, template: dict[str, Any]) -> list[int]:
    """Token ids of a prompt, in the chat template if there is one; raw: as it stands. template: options of it."""
    if not raw and getattr(tokenizer, "chat_template", None) is not None:
        return encode_chat(tokenizer, prompt, **template)
    if template:
        why = "--raw leaves the chat template out" if raw else "the tokenizer has no chat template"
        raise ValueError(f"--chat-template-kwargs would change nothing, since {why}: leave it out")
    if not raw:
        ids = encode_prompt(tokenizer, prompt)
    elif isinstance(prompt, str):
        ids = token_ids(tokenizer, prompt)
    else:
        raise ValueError("--raw continues texts as they stand, and this prompt is a list of messages")
    if not ids:
        raise ValueError("the prompt has no tokens: there is nothing to continue from")
    return ids


def figures(statistics: Statistics) -> dict[str, Any]:
    """Of one decoding, for JSON. acceptance: by depth, the share of drafts that were right; [] without the head."""
    return {
        "tokens": sum(statistics.new_tokens),
        "tau": round(statistics.tau, 3),
        "acceptance": [round(share, 3) for share in statistics.acceptance],
        "tokens_per_second": round(statistics.tokens_per_second, 1),
        "prefill_seconds": round(statistics.prefill_seconds, 4),
        "decode_seconds": round(statistics.decode_seconds, 4),
        "reused_tokens": sum(statistics.reused_tokens),
    }


def parted(count: int, total: int, model: EaModel) -> str:
    """That so many texts are not those of plain decoding, and what is known of it."""
    known = model.exactness
    return f'{count} of {total} texts are not those of plain decoding; exactness "{known}": {known.reason}'


def summary(statistics: Statistics, prompt_tokens: int) -> str:
    """The same in a line."""
    parts = [f"{sum(statistics.new_tokens)} tokens", f"{statistics.tokens_per_second:.1f} tokens/s"]
    if statistics.acceptance:
        shares = " ".join(f"{100 * share:.0f}" for share in statistics.acceptance)
        parts += [f"tau {statistics.tau:.2f}", f"drafts right by depth {shares} %"]
    reused = sum(statistics.reused_tokens)
    parts += [f"{reused} of {prompt_tokens} prompt tokens from the cache"] if reused else []
    return ", ".join(parts)
