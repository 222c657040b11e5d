"""What a tree of drafts is worth: the tokens that a round under it brings, from how drafts have done so far.

d: depth of a drafted token, 0 for the root's children.   r: its rank among its siblings, 0 for the draft's best guess.

A round tells of each node that it accepted which of the node's children was right, or that none of so many was
(`accept`'s ranks). So counts are kept of how often rank r was tried at depth d, which is where every better sibling was
wrong, and how often it was right. From them, a chance h[d, r] for each place, given that everything before it is
settled, and for a token of rank r

    chance[d, r] = h[d, r] * product over s < r of (1 - h[d, s])

A tree takes the nodes with the largest products of chances along their paths, as EAGLE-2 takes those with the largest
scores, and its worth is 1 + the sum of these products. So trees can be told apart that never ran: what one of them
tries is known of all. A draft's scores say more than rank and depth do, and who goes by them gets more than this
promises; `adapt` keeps account of that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eagle_fast.config import MAX_DEPTH, MAX_TOP_K, TreeConfig

DEPTHS, RANKS = MAX_DEPTH + 1, MAX_TOP_K
Table = NDArray[np.float64]  # [DEPTHS, RANKS]
# Chances of trained heads on texts like those that they were trained on, greedy: by rank, the same at all depths.
USUAL = np.broadcast_to(np.array([0.65, 0.3, 0.2, 0.15, 0.1] + [0.08] * (RANKS - 5)), (DEPTHS, RANKS))
LEAST, MOST = 0.005, 0.98  # of a chance: nothing is known for certain


class DraftCounts:
    """How often drafts were tried and right, by depth and rank.

    right [DEPTHS, RANKS]; missed [DEPTHS, RANKS]: how often r + 1 siblings were tried and none was right.
    """

    def __init__(self, right: Table | None = None, missed: Table | None = None):
        self.right: Table = np.zeros((DEPTHS, RANKS)) if right is None else right
        self.missed: Table = np.zeros((DEPTHS, RANKS)) if missed is None else missed

    def take(self, ranks: Sequence[int]) -> None:
        """Count what a round tells of one sequence: `accept`'s ranks of its path, of which a leaf's tells nothing."""
        for depth, rank in enumerate(ranks):
            if rank < -1:
                self.missed[depth, -2 - rank] += 1
            if rank < 0:
                return
            self.right[depth, rank] += 1

    def fade(self, factor: float) -> None:
        """Let what was counted so far weigh less."""
        self.right *= factor
        self.missed *= factor

    @property
    def tried(self) -> Table:
        """[DEPTHS, RANKS]: how often a draft of this rank was there, and every better sibling was wrong."""
        last = self.right.copy()  # by the last rank that was tried
        last += self.missed
        return last[:, ::-1].cumsum(1)[:, ::-1]

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(self.right + other.right, self.missed + other.missed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DraftCounts):
            return NotImplemented
        return np.array_equal(self.right, other.right) and np.array_equal(self.missed, other.missed)

    __hash__ = None  # type: ignore[assignment]  # counts change

    @property
    def by_depth(self) -> list[float]:
        """Share of the drafts that were right, whatever their rank, at each depth that was tried."""
        tried = self.tried[:, 0]
        return [float(right / count) for right, count in zip(self.right.sum(1), tried, strict=True) if count > 0]

    def table(self, depths: int = DEPTHS, ranks: int = RANKS) -> list[list[float]]:
        """Chances by depth and rank as they were counted, for as many places as were tried."""
        found = []
        for tried, right in zip(self.tried[:depths, :ranks], self.right[:depths, :ranks], strict=True):
            found.append([round(float(r / t), 4) for t, r in zip(tried, right, strict=True) if t > 0])
        return [row for row in found if row]


def chances(counts: DraftCounts, usual: Table, strength: float) -> Table:
    """h [DEPTHS, RANKS], from counts and what is usual.

    Where little was counted the estimate leans, as if on `strength` more tries, on the place before it: as much better
    or worse than usual as that one is. So the best guess's chance at depth d leans on the same at d - 1, and that of
    rank r on rank r - 1, all depths taken together.
    """
    all_tried, firsts, ratios = counts.tried, list[float](), list[float]()
    ratio = 1.0
    for right, tried, chance in zip(*_lists(counts.right[:, 0], all_tried[:, 0], usual[:, 0]), strict=True):
        firsts.append(_mean(right, tried, min(chance * ratio, MOST), strength))
        ratio = firsts[-1] / chance
    by_rank = zip(*_lists(counts.right.sum(0), all_tried.sum(0), usual.mean(0)), strict=True)
    right, tried, chance = next(by_rank)
    ratio = min(_mean(right, tried, firsts[0], strength) / chance, 1.0)
    for right, tried, chance in by_rank:
        ratio = _mean(right, tried, min(chance * ratio, MOST), strength) / chance
        ratios.append(ratio)
    weight, leaning = 4 * strength, np.minimum(usual[:, 1:] * ratios, MOST)
    others = (counts.right[:, 1:] + weight * leaning) / (all_tried[:, 1:] + weight)
    return np.column_stack([firsts, others]).clip(LEAST, MOST)


def _lists(*columns: Table) -> tuple[list[float], ...]:
    """One number after the other is faster so than in arrays."""
    return tuple(column.tolist() for column in columns)


def _mean(right: float, tried: float, prior: float, strength: float) -> float:
    return (right + strength * prior) / (tried + strength)


def usual_chances(table: Sequence[Sequence[float]]) -> Table:
    """Chances [DEPTHS, RANKS] from a table that may have fewer depths and ranks: the last of each go on."""
    found = np.array(USUAL)
    for depth in range(DEPTHS):
        row = list(table[min(depth, len(table) - 1)])
        row += [row[-1]] * (RANKS - len(row))
        found[depth] = row[:RANKS]
    return found.clip(LEAST, MOST)


def expected_tokens(found: Table, tree: TreeConfig) -> float:
    """Tokens that a round under `tree` brings, the target's own included, for chances h [DEPTHS, RANKS].

    Nodes are taken by their worth, best first; of each depth the first top_k, which are the beam, have children.
    """
    missed = np.cumprod(1 - found[: tree.depth + 1, : tree.top_k], axis=1)
    chance = found[: tree.depth + 1, : tree.top_k].copy()
    chance[:, 1:] *= missed[:, :-1]
    rows = chance.tolist()
    total, expanded = 1.0, [0] * (tree.depth + 1)
    waiting: list[tuple[float, float, int, int]] = [(-rows[0][0], 1.0, 0, 0)]
    for _ in range(tree.total_token - 1):
        if not waiting:
            break
        worth, parent, depth, rank = heapq.heappop(waiting)
        total -= worth
        if rank + 1 < tree.top_k:
            heapq.heappush(waiting, (-parent * rows[depth][rank + 1], parent, depth, rank + 1))
        if depth < tree.depth and expanded[depth] < tree.top_k:
            expanded[depth] += 1
            heapq.heappush(waiting, (worth * rows[depth + 1][0], -worth, depth + 1, 0))
    return total
