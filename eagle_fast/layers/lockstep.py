"""Work that ranks do in step: generators that stop where all of them have to hear of each other.

R rows, H hidden size.

    normed, total = yield Sum(product, residual, weight, eps)    what all ranks' products add up to
    scores, tokens = yield Proposed(...)                          the best of all ranks' proposals

On one device a product is whole, and `alone` answers at once by the op itself.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from eagle_fast_kernels.rms_norm import add_parts, add_rms_norm
from torch import Tensor

from eagle_fast.layers.links import Links, Proposed

T = TypeVar("T")


class Sum(NamedTuple):
    """(normed, total) [R, H] is asked for: total = x + residual, normed = its RMSNorm."""

    x: Tensor  # [R, H], or parts of it, fp32 [S, R, H]; over ranks, this one's share of it
    residual: Tensor  # [R, H]
    weight: Tensor | None  # [H]; None: the total alone, twice
    eps: float


Work: TypeAlias = Generator[Sum | Proposed, tuple[Tensor, Tensor], T]


def alone(work: Work[T]) -> T:
    """What work comes to on one device."""
    try:
        asked = next(work)
        while True:
            assert isinstance(asked, Sum), "one device has the whole vocabulary"
            asked = work.send(_added(asked))
    except StopIteration as end:
        return end.value


def _added(asked: Sum) -> tuple[Tensor, Tensor]:
    if asked.weight is not None:
        return add_rms_norm(*asked)  # type: ignore[arg-type]
    total = add_parts(asked.x, asked.residual)
    return total, total


def together(works: Sequence[Work[T]], links: Links) -> list[T]:
    """What the works of all ranks, in rank order, come to: each is done up to an exchange before all go on."""
    answers: Sequence[Any] = [None] * len(works)
    while True:
        asked, ended = [], []
        for work, answer in zip(works, answers, strict=True):
            try:
                asked.append(work.send(answer))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            assert not asked, "ranks do the same work"
            return ended
        answers = _exchanged(asked, links)


def _exchanged(asked: Sequence[Any], links: Links) -> Sequence[tuple[Tensor, Tensor]]:
    if isinstance(asked[0], Proposed):
        return links.best(asked)
    residuals = [each.residual.contiguous() for each in asked]
    # a total alone comes with a norm that nobody reads, by whatever weight
    weights = [rows[0] if each.weight is None else each.weight for each, rows in zip(asked, residuals, strict=True)]
    normed, totals = links.add_rms_norm([each.x for each in asked], residuals, weights, asked[0].eps)
    return list(zip(totals if asked[0].weight is None else normed, totals, strict=True))
