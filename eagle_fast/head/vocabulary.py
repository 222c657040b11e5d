"""The draft vocabulary: which of the target's tokens a head can propose, where the two may differ in length.

V the target's vocabulary, Vh the one that the head was made for, Vd the head's own. Stored as `d2t` [Vd], offsets to
add to the draft id, as `t2d` [Vh], a mask, or both; vLLM's converted EAGLE-1 stores the ids themselves as `token_map`.
Without them draft ids are the target's.

Targets grow (added tokens, rows of padding) and shrink (padding cut off). Ids that both have mean the same token as
long as the tokenizer is the same, so a head for a shorter vocabulary drafts what it knows, and of a longer one the few
rows that the target lacks are dropped. A wrong draft costs speed, never text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.messages import warn_user

_MOST_PADDING = 1024  # rows that a padded vocabulary has too many, and no more than an eighth of it


class DraftVocabulary(NamedTuple):
    """token_ids [Vd]: the target's id of each draft id, None where they are the same; fitted: whether V and Vh differ
    and the user was told."""

    size: int  # Vd
    token_ids: Tensor | None
    fitted: bool


def fit_vocabulary(tensors: dict[str, Tensor], stated: int | None, vocab_size: int) -> DraftVocabulary:
    """The head's vocabulary on a target of vocab_size tokens; lm_head is cut to the rows that it has.

    stated: config.json's vocab_size. Raises ValueError if the maps are out of range, repeat a token or contradict each
    other or lm_head, or if the head is for another vocabulary. Warns where the two differ.
    """
    sizes = {"t2d": _rows(tensors, "t2d"), "embed_tokens": _rows(tensors, "embed_tokens.weight"), "config.json": stated}
    known = {name: size for name, size in sizes.items() if size is not None}
    ids = _stored_ids(tensors, vocab_size, max(vocab_size, *known.values(), 0))
    rows = _rows(tensors, "lm_head.weight")
    if ids is None and rows is None:  # the target's lm_head: all that can be wrong is the vocabulary as a whole
        own = next(iter(known.values()), vocab_size)
        fitted = vocab_size not in (own, *known.values())
        if fitted:
            remedy = f"; or, if the tokens are the same, write vocab_size {vocab_size} into the head's config.json"
            _refuse_if_many_lack(own - vocab_size, own, vocab_size, remedy)
        _warn_if(fitted, own, vocab_size, 0)
        return DraftVocabulary(vocab_size, None, fitted)
    if ids is None:
        assert rows is not None
        _refuse_lost_map(rows, known, vocab_size)
        own, ids = rows, torch.arange(rows)
        fitted = rows != vocab_size
    else:
        own = next(iter(known.values()), vocab_size)
        fitted = vocab_size not in (own, *known.values())
        _take_rows(tensors, ids, rows, {*known.values(), vocab_size})
    there = ids < vocab_size
    lacking = len(ids) - int(there.sum())
    _refuse_if_many_lack(lacking, len(ids), vocab_size)
    if lacking:
        ids = ids[there]
        _cut_lm_head(tensors, there)
    _warn_if(fitted or bool(lacking), own, vocab_size, lacking)
    same = len(ids) == vocab_size and torch.equal(ids, torch.arange(vocab_size))
    return DraftVocabulary(len(ids), None if same else ids, fitted or bool(lacking))


def _rows(tensors: dict[str, Tensor], name: str) -> int | None:
    return None if name not in tensors else tensors[name].numel() if name == "t2d" else len(tensors[name])


def _is_padding(count: int, size: int) -> bool:
    return count <= min(_MOST_PADDING, size // 8)


def _warn_if(differ: bool, own: int, vocab_size: int, lacking: int) -> None:
    if not differ:
        return
    dropped = f"; {lacking} tokens that the target lacks are not drafted" if lacking else ""
    warn_user(
        f"the head is for a vocabulary of {own} tokens, the target has {vocab_size}, and their ids are taken to mean "
        f"the same{dropped}. With another tokenizer hardly a draft would be accepted: then use a head that was trained "
        "for this target"
    )


def _refuse_if_many_lack(lacking: int, size: int, vocab_size: int, remedy: str = "") -> None:
    if lacking > 0 and not _is_padding(lacking, size):
        raise ValueError(
            f"the target, of {vocab_size} tokens, lacks {lacking} of the {size} that the head can draft, more than "
            f"padding: use the head that was trained for this target{remedy}"
        )


def _refuse_lost_map(rows: int, known: dict[str, int], vocab_size: int) -> None:
    """An lm_head of fewer rows than there are tokens has those of an older vocabulary, or has lost its map."""
    if rows >= vocab_size or rows in known.values() or _is_padding(vocab_size - rows, vocab_size):
        return
    raise ValueError(
        f"lm_head.weight has {rows} rows, the target {vocab_size} tokens, and there is no d2t or t2d to map one to the "
        f"other: take the file that has them; or, if the rows are the target's first {rows} tokens, write vocab_size "
        f"{rows} into the head's config.json"
    )


def _take_rows(tensors: dict[str, Tensor], ids: Tensor, rows: int | None, whole: set[int]) -> None:
    """Cut an lm_head that has a row for every token of the vocabulary to the draft's."""
    if rows is None or rows == len(ids):
        return
    if rows not in whole or rows <= int(ids.max()):
        raise ValueError(
            f"lm_head.weight has {rows} rows, but the draft vocabulary has {len(ids)} tokens: the checkpoint is "
            "damaged, download the head again"
        )
    _cut_lm_head(tensors, ids)


def _cut_lm_head(tensors: dict[str, Tensor], index: Tensor) -> None:
    for name in ("lm_head.weight", "lm_head.bias"):
        if name in tensors:
            tensors[name] = tensors[name][index]


def _stored_ids(tensors: dict[str, Tensor], vocab_size: int, longest: int) -> Tensor | None:
    """The maps as ids below `longest`, the larger of V and Vh; None without one."""
    d2t, t2d, marked = tensors.get("d2t"), tensors.get("t2d"), None
    if t2d is not None:
        marked = t2d.flatten().bool().nonzero().flatten()
    if "token_map" in tensors:
        return _checked(tensors["token_map"].flatten().long(), "token_map", vocab_size, longest)
    if d2t is None:
        return marked if marked is None else _checked(marked, "t2d", vocab_size, longest)
    stored = d2t.flatten().long()
    ids = stored + torch.arange(len(stored))
    if marked is not None and not torch.equal(ids.sort().values, marked):
        if not torch.equal(stored.sort().values, marked):
            raise ValueError(
                f"d2t and t2d contradict each other: d2t has {len(stored)} draft tokens, t2d marks {len(marked)}, and "
                "they are not the same; the checkpoint is damaged, download the head again"
            )
        ids = stored  # the ids themselves instead of offsets
    return _checked(ids, "d2t", vocab_size, longest)


def _checked(ids: Tensor, name: str, vocab_size: int, longest: int) -> Tensor:
    if not len(ids):
        raise ValueError(f"{name} names no token, so nothing could be drafted: download the head again")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= longest:
        raise ValueError(
            f"{name} leads to token ids {low}..{high}, the target has {vocab_size} tokens: the head is for another "
            "vocabulary (or d2t holds ids: subtract arange, or add t2d)"
        )
    repeated = len(ids) - len(ids.unique())
    if repeated:
        raise ValueError(
            f"{name} leads to the same target token {repeated} times: the map is damaged, download the head again"
        )
    return ids
