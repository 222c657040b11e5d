"""The draft vocabulary: which of the target's tokens a head can propose, and whether it is the target's vocabulary.

V the target's vocabulary, Vd the head's. Stored as `d2t` [Vd], offsets to add to the draft id, as `t2d` [V], a mask, or
both; vLLM's converted EAGLE-1 stores the ids themselves as `token_map`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read_token_ids(tensors: dict[str, Tensor], vocab_size: int) -> Tensor | None:
    """Target id of every draft id [Vd], or None where they are the same; lm_head is cut to those rows if it has all.

    Raises ValueError if the maps are out of range, repeat a token or contradict each other or lm_head.
    """
    ids = _stored_ids(tensors, vocab_size)
    head = tensors.get("lm_head.weight")
    if ids is None:
        if head is not None and len(head) != vocab_size:
            raise ValueError(
                f"lm_head.weight has {len(head)} rows, the target {vocab_size} tokens, and there is no d2t or t2d to "
                "map one to the other: is the head for another vocabulary?"
            )
        return None
    if head is not None and len(head) != len(ids):
        if len(head) != vocab_size:
            raise ValueError(f"lm_head.weight has {len(head)} rows, but the draft vocabulary has {len(ids)} tokens")
        for name in ("lm_head.weight", "lm_head.bias"):
            if name in tensors:
                tensors[name] = tensors[name][ids]
    if len(ids) == vocab_size and torch.equal(ids, torch.arange(vocab_size)):
        return None
    return ids


def _stored_ids(tensors: dict[str, Tensor], vocab_size: int) -> Tensor | None:
    d2t, t2d, marked = tensors.get("d2t"), tensors.get("t2d"), None
    if t2d is not None:
        if t2d.numel() != vocab_size:
            raise ValueError(
                f"t2d covers {t2d.numel()} tokens, the target has {vocab_size}: the head is for another vocabulary"
            )
        marked = t2d.flatten().bool().nonzero().flatten()
    if "token_map" in tensors:
        return _checked(tensors["token_map"].flatten().long(), "token_map", vocab_size)
    if d2t is None:
        return marked
    stored = d2t.flatten().long()
    ids = stored + torch.arange(len(stored))
    if marked is not None and not torch.equal(ids.sort().values, marked):
        if not torch.equal(stored.sort().values, marked):
            raise ValueError(
                f"d2t and t2d contradict each other: d2t has {len(stored)} draft tokens, t2d marks {len(marked)}, and "
                "they are not the same; the checkpoint is damaged"
            )
        ids = stored  # the ids themselves instead of offsets
    return _checked(ids, "d2t", vocab_size)


def _checked(ids: Tensor, name: str, vocab_size: int) -> Tensor:
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} leads to token ids {low}..{high}, the target has {vocab_size} tokens: the head is for another "
            "vocabulary (or d2t holds ids: subtract arange, or add t2d)"
        )
    repeated = len(ids) - len(ids.unique())
    if repeated:
        raise ValueError(f"{name} leads to the same target token {repeated} times: the map is damaged")
    return ids


def check_vocabulary(tensors: dict[str, Tensor], settings: dict[str, Any], vocab_size: int) -> None:
    """ValueError if nothing in the checkpoint agrees with the target's vocabulary and something contradicts it."""
    rows = len(tensors["embed_tokens.weight"]) if "embed_tokens.weight" in tensors else None
    stated = settings.get("vocab_size")
    confirmed = "t2d" in tensors or vocab_size in (rows, stated)
    other = rows if stated is None else stated
    if not confirmed and other is not None:
        raise ValueError(
            f"the head is for a vocabulary of {other} tokens, the target has {vocab_size}: use the head that was "
            "trained for this target (or, if the tokens are the same, correct vocab_size in the head's config.json)"
        )
