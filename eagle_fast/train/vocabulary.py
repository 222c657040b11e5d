"""The draft vocabulary: the tokens that the target's answers are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from eagle_fast.train.writer import Text


def choose_tokens(
    texts: Sequence[Text], vocab_size: int, size: int, always: Iterable[int] = ()
) -> tuple[torch.Tensor | None, float]:
    """(ids [size] in ascending order, the share of the answers' tokens that they cover); (None, 1) if all tokens fit.

    The `size` most frequent tokens of the answers. `always` (end tokens and other special ones) are in; of tokens that
    never occur the lower ids, which byte-pair vocabularies give to the more common pieces.
    """
    if size >= vocab_size:
        return None, 1.0
    counts = np.zeros(vocab_size, dtype=np.int64)
    for text in texts:
        counts += np.bincount(text.tokens[text.start :], minlength=vocab_size)
    wanted = np.zeros(vocab_size, dtype=bool)
    wanted[[token for token in always if 0 <= token < vocab_size]] = True
    if wanted.sum() > size:
        raise ValueError(
            f"a draft vocabulary of {size} has no room for {int(wanted.sum())} special tokens: make it larger"
        )
    rank = np.argsort(-np.where(wanted, np.iinfo(np.int64).max, counts), kind="stable")
    chosen = np.sort(rank[:size])
    return torch.from_numpy(chosen), float(counts[chosen].sum() / max(counts.sum(), 1))
