"""What the cache of a decoding state holds when a call is over, and how much of it another call can go on with.

B sequences. Row n of the cache holds the keys and values of token n, and row n of the head's cache pairs the features
of token n with the token after it. So a text that shares its first P tokens with the one held finds P rows for the
target and P - 1 for the head: it is prefilled from token P - 1 on, whatever its neighbours share with theirs. All rows
that differ are written over, whatever is different there: a chat template may render an earlier answer in other tokens
than were decoded.

Which rows are held is kept by the host, between rounds: on the device the caches go on past a stop token, and a round
may be under way when a call ends. What such rounds write lies behind the rows that count here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eagle_fast.target import Target

Texts = Sequence[Sequence[int]]


@dataclass
class Held:
    """The keys and values of the first `rows[b]` tokens of `texts[b]`, and what else they depend on.

    edits: `Target.edits` when they were computed.
    kept: the call asked for them to be kept, so calls that hold something else leave them alone while there is room.
    """

    texts: Texts
    rows: list[int]
    long: list[bool]  # rotated by longrope's long frequencies
    edits: int | None
    kept: bool

    def shared(self, texts: Texts, target: Target, edits: int | None) -> list[int]:
        """From which token on each of these texts has to be prefilled now: 0 where nothing fits."""
        if len(texts) != len(self.texts) or self.edits is None or self.edits != edits:
            return [0] * len(texts)
        starts = []
        for text, mine, rows, long, now_long in zip(
            texts, self.texts, self.rows, self.long, are_long(texts, target), strict=True
        ):
            common = common_prefix(text, mine, rows) if long == now_long else 0
            starts.append(max(min(common, len(text) - 1) - 1, 0))
        return starts


def are_long(texts: Texts, target: Target) -> list[bool]:
    """Which texts are prefilled with longrope's long frequencies."""
    return [target.rope_switch is not None and len(text) > target.rope_switch for text in texts]


def common_prefix(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many first tokens are the same, `most` at the most."""
    most = min(most, len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(n for n, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
