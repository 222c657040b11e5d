"""One path of nodes, decoded plainly and among more and more rows: what `bits` compares.

B sequences, T tree nodes, P nodes of the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.slab import KVSlab
from eagle_fast.target.interface import SlabCache
from eagle_fast.target.made_up import make_up
from eagle_fast.target.rehearsal import DEEP, MOST_NODES, PROMPT, depth_for, masks_of
from eagle_fast.target.target import Target

PATH = 5
BLOCK, BEFORE = 64, 3  # the path starts BEFORE rows in front of a multiple of BLOCK, where attention's blocks meet
MANY_ROWS = 65  # of a batch, at least: products of more than 64 rows take other kernels
START = [97, BLOCK - BEFORE, 8, 130]  # lengths of the batch at the start of a text; the path's is number OWN
OWN = 1


class Form(NamedTuple):
    """A tree that holds the path: parents of its T nodes, and which P of them are the path."""

    parents: Sequence[int]
    path: Sequence[int]


ROOT = Form([-1], [0])
CHAIN = Form(range(-1, PATH - 1), range(PATH))
BUSHY = Form([-1, 0, 0, 1, 1, 2, 5, 3, 2, 6, 6, 10], [0, 2, 5, 6, 10])


def wide(num_nodes: int) -> Form:
    """A tree of so many nodes, PATH at least, with the path from its first to its last."""
    path = [step * (num_nodes - 1) // (PATH - 1) for step in range(PATH)]
    parents = [(node - 1) // 2 for node in range(num_nodes)]
    parents[0] = -1
    for before, node in pairwise(path):
        parents[node] = before
    return Form(parents, path)


class Run(NamedTuple):
    """The path behind lengths[own] rows, in a tree of some form in every sequence; or node by node, each alone."""

    cache: SlabCache
    lengths: list[int]
    own: int
    form: Form
    node_by_node: bool = False

    @property
    def where(self) -> str:
        """In what the path was decoded, for people."""
        count, batch = len(self.form.parents), len(self.lengths)
        tree = f"a tree of {count} nodes"
        return tree if batch == 1 else f"a batch of {batch} sequences with {tree} each"

    @property
    def rows(self) -> list[int]:
        """[P] of the path in the cache."""
        return [self.lengths[self.own] + node for node in self.form.path]


def forwards(target: Target, run: Run) -> Iterator[tuple[Tensor, TreeStep]]:
    """(tokens [B, T], step) of each verify that a run takes, one or P."""
    path = 5 + torch.arange(PATH) * 41 % (min(target.vocab_size, 1000) - 5)
    lengths = torch.tensor(run.lengths, device=target.device)
    target.choose_frequencies(run.cache, lengths)
    if run.node_by_node:
        ancestors, depths = masks_of(ROOT.parents, target.device)
        for step, token in enumerate(path.to(target.device).view(-1, 1, 1)):
            yield token, TreeStep(lengths + step, ancestors, depths)
        return
    batch, count = len(run.lengths), len(run.form.parents)
    tokens = 5 + torch.arange(3, 3 + batch * count).view(batch, count) * 37 % (min(target.vocab_size, 1000) - 5)
    tokens[run.own, list(run.form.path)] = path
    ancestors, depths = (
        each.repeat(batch, *[1] * (each.dim() - 1)) for each in masks_of(run.form.parents, target.device)
    )
    yield tokens.to(target.device), TreeStep(lengths, ancestors, depths)


def runs(target: Target, real: KVSlab, at: int, num_nodes: int) -> Iterator[tuple[Run, list[Run]]]:
    """(the path plainly, the same among more rows), at the start of a text and, after that was looked at, deep in it.

    The rows in front are made up after PROMPT rows of a slab of one sequence, which are `real`, from row `at` on.
    num_nodes: of the largest tree in use; not positive: not known yet.
    """
    widest = wide(min(max(num_nodes, PATH), MOST_NODES) if num_nodes > 0 else MOST_NODES)
    short = _new_cache(target, START)
    _make_up(target, short, START, real, at)
    plainly = _plainly(short, START)
    yield plainly, _among_others(short, START, widest)

    room = PATH + MOST_NODES
    deep = depth_for(target, DEEP, room, sequences=2) // BLOCK * BLOCK - BEFORE
    if deep <= START[OWN]:
        return
    lengths = [deep - 77 if deep > 2 * 77 else 8, deep]
    long = _new_cache(target, lengths)
    one = long.row(OWN)
    one.slab.copy_prefix(short.row(OWN).slab, START[OWN])  # a long cache may have kernels of its own
    yield plainly, [Run(one, [START[OWN]], 0, BUSHY)]
    _make_up(target, long, lengths, real, at)
    yield _plainly(long, lengths), _among_others(long, lengths, widest)


def _plainly(cache: SlabCache, lengths: list[int]) -> Run:
    return Run(cache.row(OWN), [lengths[OWN]], 0, CHAIN, node_by_node=True)


def _among_others(cache: SlabCache, lengths: list[int], widest: Form) -> list[Run]:
    one, batch = cache.row(OWN), len(lengths)
    each = wide(max(len(widest.parents), -(-MANY_ROWS // batch)))
    alone = [Run(one, [lengths[OWN]], 0, form) for form in (CHAIN, BUSHY, widest)]
    return [*alone, Run(cache, lengths, OWN, each)]


def _new_cache(target: Target, lengths: list[int]) -> SlabCache:
    """For sequences of these lengths and a tree behind each."""
    return target.new_cache(len(lengths), -(-(max(lengths) + MOST_NODES) // BLOCK) * BLOCK)


def _make_up(target: Target, cache: SlabCache, lengths: list[int], real: KVSlab, at: int) -> None:
    """Rows in front of the trees, for all as many as the longest has."""
    for mine, theirs in zip(cache.slab.slabs, real.slabs, strict=True):
        mine[..., :PROMPT, :] = theirs[..., at : at + PROMPT, :]
    make_up(cache.slab, max(lengths), target.bindings, PROMPT)
