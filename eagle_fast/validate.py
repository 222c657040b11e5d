"""Checks of a call's arguments, before any work starts. Every message says what to do instead."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def check_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int
) -> tuple[list[list[int]], torch.Tensor]:
    """The prompts as lists of ids without padding, and input_ids as a [B, L] tensor on the CPU."""
    if not isinstance(input_ids, torch.Tensor):
        hint = 'pass encoding["input_ids"]' if hasattr(input_ids, "keys") else "pass a LongTensor of shape [B, L]"
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: {hint}")
    if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"input_ids has dtype {input_ids.dtype}: token ids are integers, pass torch.long")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: pass [B, L], for one prompt input_ids[None]")
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: there is no token to continue from")
    ids = input_ids.detach().cpu().long()
    mask = _check_mask(attention_mask, ids)
    bad = ((ids < 0) | (ids >= vocab_size)) & mask
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] = {int(ids[row, column])} is outside of the model's vocabulary of {vocab_size}: "
            "use the model's own tokenizer"
        )
    return [ids[row][mask[row]].tolist() for row in range(len(ids))], ids


def _check_mask(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """[B, L] bool of the real tokens: one run in each row, padding on either side."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != ids.shape:
        shape = (
            list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise ValueError(f"attention_mask is {shape}, input_ids {list(ids.shape)}: they must have the same shape")
    values = attention_mask.detach().cpu()
    mask = values.bool()
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1")
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask hides all of row {row}: there is no token to continue from")
    runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if (runs > 1).any():
        row = int((runs > 1).nonzero()[0])
        raise ValueError(f"attention_mask has a hole in row {row}: padding may stand before or after a prompt only")
    return mask


def token_budgets(
    prompts: list[list[int]], max_new_tokens: int, max_length: int, max_positions: int | None
) -> list[int]:
    """How many tokens each sequence may get. A prompt that leaves no room is an error with both numbers."""
    for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: use a positive integer")
    longest = max(len(prompt) for prompt in prompts)
    if max_positions is not None and longest >= max_positions:
        raise ValueError(f"the prompt has {longest} tokens, the model has positions for {max_positions}: shorten it")
    if longest >= max_length:
        raise ValueError(
            f"the prompt has {longest} tokens, max_length={max_length} leaves no room to generate: raise max_length"
        )
    limit = max_length if max_positions is None else min(max_length, max_positions)
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def check_stop_ids(stop_ids: Iterable[int], vocab_size: int) -> frozenset[int]:
    """Stop ids that the model can emit; others can never be sampled and are dropped."""
    ids = frozenset(int(each) for each in stop_ids)
    if any(each < 0 for each in ids):
        raise ValueError(f"stop token ids {sorted(ids)}: a token id cannot be negative")
    return frozenset(each for each in ids if each < vocab_size)
