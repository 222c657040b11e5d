"""Which tree pays: the one that promises the most tokens a second. Functions of what they are given, nothing else.

Seconds are a round's, tokens those of one sequence and round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eagle_fast.config import ROOT_ALONE, TreeConfig

# From large to small, each about as good as any of its size on heads that were measured (LOG.md, "A tree that pays").
LADDER = tuple(
    TreeConfig(*each)
    for each in ((60, 7, 10), (40, 7, 8), (24, 6, 6), (16, 5, 4), (8, 3, 3), (5, 3, 2), (4, 3, 1), (3, 2, 1), (2, 0, 1))
)
# The trees that a state has for so many sequences at the most: the rows of a large one fill a GPU from a few on, and a
# CPU at once, which takes rows in eights.
ON_GPU = (
    (3, (LADDER[0], LADDER[2], LADDER[3], LADDER[4])),
    (15, (LADDER[2], LADDER[3], LADDER[4], LADDER[6])),
    (31, (LADDER[3], LADDER[4], LADDER[5], LADDER[6])),
    (63, (LADDER[4], LADDER[5], LADDER[6], LADDER[7])),
)
ON_CPU = ((1, (LADDER[3], LADDER[4])), (3, (LADDER[3], LADDER[4], LADDER[6])))
MANY = (LADDER[5], LADDER[6], LADDER[7], LADDER[8])
CPU_ROWS = 8
MARGIN = 1.02  # a tree is left for one that promises so much more
SMALLER_TIME = 0.5  # of a larger tree's time that a smaller one could take, before it was timed
CPU_GROWTH = 0.4  # power of its rows that a CPU's time grows by at least


def candidates(most: TreeConfig, batch: int, on_cpu: bool = False) -> tuple[TreeConfig, ...]:
    """Up to five trees for `batch` sequences, largest first, the root alone last; none is more than `most` in nodes,
    depth or top-k. For few sequences on a GPU `most` is one of them."""
    rungs = next((rungs for count, rungs in (ON_CPU if on_cpu else ON_GPU) if batch <= count), MANY)
    if rungs == ON_GPU[0][1]:
        rungs = (most, *rungs[1:])
    return tuple(dict.fromkeys([*(within(rung, most) for rung in rungs), ROOT_ALONE]))


def resolved(tree: TreeConfig) -> TreeConfig:
    """The most that rounds may have: a total_token of -1 leaves the number of nodes to the engine."""
    if tree.total_token != -1:
        return tree
    return replace(tree, total_token=min(LADDER[0].total_token, 1 + tree.num_candidates))


def within(tree: TreeConfig, most: TreeConfig) -> TreeConfig:
    """A tree no larger than `most` in any way."""
    depth, top_k = min(tree.depth, most.depth), min(tree.top_k, most.top_k)
    total = min(tree.total_token, most.total_token, 1 + top_k + depth * top_k**2)
    return ROOT_ALONE if total == 1 else TreeConfig(total, depth, top_k)


def whole_times(
    times: Mapping[TreeConfig, float], trees: Sequence[TreeConfig], batch: int = 1, on_cpu: bool = False
) -> dict[TreeConfig, float]:
    """Seconds of all the trees, where some were not timed: the least that they could take, so that each is tried which
    could be the best. No tree takes less than a smaller one; on a CPU it takes more, by its rows."""

    def growth(tree: TreeConfig, smaller: TreeConfig) -> float:
        return (_cpu_rows(tree, batch) / _cpu_rows(smaller, batch)) ** CPU_GROWTH if on_cpu else 1.0

    found = {}
    for tree in trees:
        by_smaller = [took * growth(tree, other) for other, took in times.items() if _is_larger(tree, other)]
        by_larger = [SMALLER_TIME * took for other, took in times.items() if _is_larger(other, tree)]
        least = max([*by_smaller, min(by_larger, default=0.0)])
        found[tree] = times.get(tree) or least or growth(tree, ROOT_ALONE)
    return found


def _is_larger(tree: TreeConfig, other: TreeConfig) -> bool:
    return tree.total_token > other.total_token


def _cpu_rows(tree: TreeConfig, batch: int) -> int:
    """Rows that a CPU computes to verify a tree."""
    rows = batch * tree.total_token
    return rows if rows == 1 else -(-rows // CPU_ROWS) * CPU_ROWS


def best_tree(
    times: Mapping[TreeConfig, float], tokens: Mapping[TreeConfig, float], current: TreeConfig | None = None
) -> TreeConfig:
    """The tree with the most tokens a second. `current` is kept unless another is better by more than they are known.

    times: seconds of a round under each tree. tokens: what a round under each brings; the root alone brings one.
    """
    rates = {tree: tokens[tree] / took for tree, took in times.items()}
    best = max(rates, key=lambda tree: rates[tree])
    return current if current in rates and rates[best] <= MARGIN * rates[current] else best
