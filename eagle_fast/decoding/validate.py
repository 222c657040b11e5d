"""Checks of a call's arguments, before any work starts. Every message says what to do instead."""

from __future__ import annotations

from typing import NamedTuple

import torch

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Prompts(NamedTuple):
    """input_ids after their checks."""

    ids: torch.Tensor  # [B, L] on the CPU, as given
    texts: list[list[int]]  # without padding
    padding: list[list[int]]  # the ids that the mask hides


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> Prompts:
    """The prompts of input_ids [B, L], with padding on either side where attention_mask [B, L] is 0."""
    if not isinstance(input_ids, torch.Tensor):
        hint = 'pass encoding["input_ids"]' if hasattr(input_ids, "keys") else "pass a LongTensor of shape [B, L]"
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: {hint}")
    if input_ids.dtype not in _ID_DTYPES:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}: token ids are integers, pass torch.long")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: pass [B, L], for one prompt input_ids[None]")
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: there is no token to continue from")
    if input_ids.is_meta:
        raise ValueError("input_ids is on the meta device, which holds no values: create it on the CPU or a GPU")
    ids = input_ids.detach().cpu().long()
    mask = _check_mask(attention_mask, ids)
    bad = ((ids < 0) | (ids >= vocab_size)) & mask
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] = {int(ids[row, column])} is outside of the model's vocabulary of "
            f"{vocab_size}: use the model's own tokenizer"
        )
    rows = list(zip(ids, mask, strict=True))
    return Prompts(ids, [row[seen].tolist() for row, seen in rows], [row[~seen].tolist() for row, seen in rows])


def _check_mask(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """[B, L] bool of the real tokens: one run in each row, padding on either side."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}: pass a tensor of input_ids' shape")
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, input_ids {list(ids.shape)}: they must have the same "
            "shape"
        )
    values = attention_mask.detach().cpu()
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("attention_mask has values other than 0 and 1: pass 1 for tokens, 0 for padding")
    mask = values.bool()
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
    """How many tokens each sequence may get. A prompt that leaves no room is an error with both numbers.

    max_positions: positions that the model has learned, if it has. The last token of a text needs none.
    """
    check_positive(max_new_tokens=max_new_tokens, max_length=max_length)
    longest = max(len(prompt) for prompt in prompts)
    if max_positions is not None and longest > max_positions:
        raise ValueError(f"the prompt has {longest} tokens, the model has positions for {max_positions}: shorten it")
    if longest >= max_length:
        raise ValueError(
            f"the prompt has {longest} tokens, max_length={max_length} leaves no room to generate: raise max_length"
        )
    limit = max_length if max_positions is None else min(max_length, max_positions + 1)
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def check_positive(**numbers) -> None:
    """Counts and lengths, by the name of their argument."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: use a positive integer")


def check_flag(name: str, value) -> bool:
    """True or False, numpy's included."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name}={value!r}: use True or False")
    return bool(value)


def check_seeds(seed, batch: int):
    """None, an integer, or a tuple of one for each sequence."""
    seed = tuple(seed) if isinstance(seed, (list, tuple)) else seed
    if isinstance(seed, tuple) and len(seed) != batch:
        raise ValueError(f"{len(seed)} seeds for {batch} sequences: pass one integer or one for each")
    return seed


def id_list(ids) -> list[int]:
    """Token ids as transformers' configs hold them: None, one id, a sequence or a tensor."""
    if ids is None:
        return []
    if isinstance(ids, torch.Tensor):
        ids = ids.flatten().tolist()
    ids = list(ids) if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int):
            raise ValueError(f"stop token {each!r}: pass token ids, as in eos_token_id=[2, 7]")
    return ids


def check_stop_ids(stop_ids, vocab_size: int) -> frozenset[int]:
    """Stop ids that the model can emit; others can never be sampled and are dropped."""
    ids = frozenset(id_list(stop_ids))
    if any(each < 0 for each in ids):
        raise ValueError(f"stop token ids {sorted(ids)}: a token id cannot be negative")
    return frozenset(each for each in ids if each < vocab_size)


def check_hooks(name: str, hooks) -> list:
    """Logits processors or stopping criteria: a list of callables, empty for None."""
    if hooks is None:
        return []
    if not isinstance(hooks, (list, tuple)):
        raise ValueError(f"{name} is a {type(hooks).__name__}: pass a list, as in {name}=[...]")
    for each in hooks:
        if not callable(each):
            raise ValueError(f"{name} holds a {type(each).__name__}, which cannot be called: pass objects or functions")
    return list(hooks)
