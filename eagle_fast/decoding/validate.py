"""Checks of a call's arguments, before any work starts. Every message says what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Cache

from eagle_fast.config import TreeConfig, check_positive, whole_number
from eagle_fast.messages import shown
from eagle_fast.target import Target

_ID_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


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
    _check_layout("input_ids", input_ids, "pad the prompts and pass attention_mask=")
    if input_ids.dtype not in _ID_DTYPES:
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
            f"input_ids[{row}, {column}] = {int(ids[row, column])} is outside of the model's vocabulary of "
            f"{vocab_size}: use the model's own tokenizer"
        )
    rows = list(zip(ids, mask, strict=True))
    return Prompts(ids, [row[seen].tolist() for row, seen in rows], [row[~seen].tolist() for row, seen in rows])


def check_forward(input_ids, attention_mask, past_key_values, position_ids, target: Target) -> None:
    """What a forward of the target alone is given: input_ids [B, L], a mask [B, past + L] of any kind, a cache."""
    ids = check_prompts(input_ids, None, target.vocab_size).ids
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise ValueError(f"past_key_values is a {type(past_key_values).__name__}: pass a Cache of transformers")
    length = ids.shape[1] + (0 if past_key_values is None else past_key_values.get_seq_length())
    if target.max_positions is not None and length > target.max_positions:
        raise ValueError(
            f"the text has {length} tokens, the model has positions for {target.max_positions}: shorten it"
        )
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask)
        whole = attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
        if attention_mask.dim() == 4 and not (whole and attention_mask.shape[2:] == (ids.shape[1], length)):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} of {attention_mask.dtype}: pass four dimensions "
                f"as [{len(ids)}, 1, {ids.shape[1]}, {length}] of bool or floats, or [{len(ids)}, {length}]"
            )
        if attention_mask.dim() != 4 and attention_mask.shape != (len(ids), length):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}: pass [{len(ids)}, {length}], a 1 for every token "
                "that is seen, those of past_key_values included"
            )
    if position_ids is not None:
        _check_tensor("position_ids", position_ids)
        if position_ids.dtype not in _ID_DTYPES or position_ids.shape not in (ids.shape, (1, ids.shape[1])):
            raise ValueError(
                f"position_ids is {list(position_ids.shape)} of {position_ids.dtype}: pass {list(ids.shape)} of "
                "torch.long"
            )
        least, most = int(position_ids.min()), int(position_ids.max())
        if least < 0 or (target.max_positions is not None and most >= target.max_positions):
            raise ValueError(f"position_ids go from {least} to {most}: pass the positions that the tokens stand at")


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a tensor")
    _check_layout(name, value, "pass a plain one")


def _check_layout(name: str, tensor: torch.Tensor, unnested: str) -> None:
    """Plain rows of values: not nested, sparse, or without any."""
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor: {unnested}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}): pass {name}.to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values: create it on the CPU or a GPU")


def _check_mask(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """[B, L] bool of the real tokens: one run in each row, padding on either side."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}: pass a tensor of input_ids' shape")
    _check_layout("attention_mask", attention_mask, "pass a tensor of input_ids' shape")
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, input_ids {list(ids.shape)}: they must have the same "
            "shape"
        )
    values = attention_mask.detach().cpu()
    if values.is_complex() or values.is_quantized or not ((values == 0) | (values == 1)).all():
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
    prompts: list[list[int]], max_new_tokens: Any, max_length: Any, max_positions: int | None
) -> list[int]:
    """How many tokens each sequence may get. A prompt that leaves no room is an error with both numbers.

    max_positions: positions that the model has learned, if it has. The last token of a text needs none.
    """
    max_new_tokens, max_length = check_positive(max_new_tokens=max_new_tokens, max_length=max_length)
    longest = max(len(prompt) for prompt in prompts)
    if max_positions is not None and longest > max_positions:
        raise ValueError(f"the prompt has {longest} tokens, the model has positions for {max_positions}: shorten it")
    if longest >= max_length:
        raise ValueError(
            f"the prompt has {longest} tokens, max_length={shown(max_length)} leaves no room to generate: raise "
            "max_length"
        )
    limit = max_length if max_positions is None else min(max_length, max_positions + 1)
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def check_flags(**flags) -> list[bool]:
    """Switches, by the name of their argument: truth values, or 0 and 1; None is False."""
    found = []
    for name, value in flags.items():
        if getattr(value, "ndim", None) == 0 and getattr(value, "is_meta", False) is False:
            value = value.item()
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise ValueError(f"{name}={shown(value)}: use True or False")
        found.append(bool(value))
    return found


def check_adaptive(adaptive: Any, tree: TreeConfig | None) -> bool | None:
    """The argument `adaptive`: None leaves it to the model's exactness. Raises ValueError."""
    asked = None if adaptive is None else check_flags(adaptive=adaptive)[0]
    if tree is None or tree.total_token != -1:
        return asked
    if asked is False:
        raise ValueError("total_token=-1 leaves the tree to the engine, and adaptive=False holds it fixed: pass one")
    return True


def check_seeds(seed, batch: int):
    """None, an integer, or a tuple of one for each sequence."""
    if getattr(seed, "ndim", None) == 1:
        seed = seed.tolist()
    seed = tuple(seed) if isinstance(seed, (list, tuple, range)) else seed
    if isinstance(seed, tuple) and len(seed) != batch:
        raise ValueError(f"{len(seed)} seeds for {batch} sequences: pass one integer or one for each")
    return seed


def id_list(ids) -> list[int]:
    """Token ids as transformers' configs hold them: None, one id, a sequence, an array or a tensor."""
    if ids is None:
        return []
    if hasattr(ids, "tolist") and not getattr(ids, "is_meta", False):
        ids = ids.flatten().tolist()
    ids = list(ids) if isinstance(ids, (list, tuple, set, frozenset, range)) else [ids]
    found = [whole_number(each) for each in ids]
    if None in found:
        raise ValueError(f"stop token {shown(ids[found.index(None)])}: pass token ids, as in eos_token_id=[2, 7]")
    return found  # type: ignore[return-value]


def check_stop_ids(stop_ids, vocab_size: int) -> frozenset[int]:
    """Stop ids that the model can emit; others can never be sampled and are dropped."""
    ids = frozenset(id_list(stop_ids))
    if any(each < 0 for each in ids):
        raise ValueError(f"eos_token_id={shown(sorted(ids))}: a token id cannot be negative")
    return frozenset(each for each in ids if each < vocab_size)


def check_hooks(name: str, hooks) -> list:
    """Logits processors or stopping criteria: a list of what can be called with (ids, scores), empty for None."""
    if hooks is None:
        return []
    if not isinstance(hooks, (list, tuple)):
        raise ValueError(f"{name} is a {type(hooks).__name__}: pass a list, as in {name}=[...]")
    for each in hooks:
        if isinstance(each, type):
            raise ValueError(f"{name} holds the class {each.__name__}: pass an object of it, {each.__name__}(...)")
        if not callable(each):
            raise ValueError(f"{name} holds a {type(each).__name__}, which cannot be called: pass objects or functions")
        check_takes_two(name, each, "(input_ids, scores)")
    return list(hooks)


def check_takes_two(name: str, hook: Callable, arguments: str) -> None:
    """A function of the user that is called with two arguments, as far as can be known before."""
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        what = getattr(hook, "__name__", type(hook).__name__)
        raise ValueError(f"{name}: {what}{signature} is called with {arguments}: {error}") from error
