"""How the weights of a layer are cut over ranks: lists of ranges, one for each rank; pure functions of sizes.

Hq/Hkv query and key heads, D head size, n ranks.

Query heads that read one key head stay with it. Key heads that do not divide are dealt unevenly; where there are fewer
of them than ranks, several ranks have the same one, and its query heads are dealt among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

UNITS = (128, 64, 32, 16, 8)  # of a dimension: what kernels read at once is not cut, where there is enough of it
GROUPS = (128, 64, 32)  # of columns that share a scale


class HeadShare(NamedTuple):
    """The heads of one rank: every `len(query) / len(kv)` of its query heads read one of its key heads."""

    query: range
    kv: range

    def rows(self, head_dim: int) -> tuple[range, range]:
        """(rows of q, rows of k or v) of the weights [heads D, H]; those of q are columns of o as well."""
        return scaled(self.query, head_dim), scaled(self.kv, head_dim)


def scaled(part: range, size: int) -> range:
    """A range of things that have so many rows each, in rows."""
    return range(part.start * size, part.stop * size)


def deal(total: int, ranks: int, unit: int = 1) -> list[int]:
    """`total` in sizes as equal as whole units allow, the larger ones first. ValueError where a rank would get none."""
    count, left = divmod(total, unit)
    if left or count < ranks:
        raise ValueError(f"{total} cannot be dealt to {ranks} ranks in units of {unit}")
    each, more = divmod(count, ranks)
    return [(each + (rank < more)) * unit for rank in range(ranks)]


def parts_of(sizes: Sequence[int], first: int = 0) -> list[range]:
    """Ranges of these sizes, one after the other."""
    return [range(low, high) for low, high in pairwise(accumulate(sizes, initial=first))]


def deal_dimension(total: int, ranks: int) -> list[range]:
    """Parts of a dimension (an MLP's width, a vocabulary), in the largest units that leave the parts about equal."""
    for unit in UNITS:
        if total % unit == 0 and total // unit >= 8 * ranks:
            return parts_of(deal(total, ranks, unit))
    return parts_of(deal(total, ranks))


def deal_groups(total: int, ranks: int) -> list[range]:
    """Parts of a dimension along groups of so many columns as packed weights have, the largest that there are."""
    for unit in GROUPS:
        if total % unit == 0 and total // unit >= ranks:
            return parts_of(deal(total, ranks, unit))
    raise ValueError(f"{total} columns cannot be dealt to {ranks} ranks in groups of {' or '.join(map(str, GROUPS))}")


def deal_heads(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """The heads of every rank. ValueError where a rank would get no query head."""
    group = num_heads // num_kv_heads
    if num_kv_heads >= ranks:
        return [HeadShare(scaled(part, group), part) for part in parts_of(deal(num_kv_heads, ranks))]
    owner = [rank * num_kv_heads // ranks for rank in range(ranks)]
    shares: list[HeadShare] = []
    for head in range(num_kv_heads):
        for part in parts_of(deal(group, owner.count(head)), head * group):
            shares.append(HeadShare(part, range(head, head + 1)))
    return shares


def taken(weight: Tensor, parts: Sequence[range], dim: int = 0) -> Tensor:
    """Parts of a weight side by side: a view where it is one, else a copy."""
    found = [weight.narrow(dim, part.start, len(part)) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim)
