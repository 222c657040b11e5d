"""Logits of trees against plain decoding of one of their paths, bit by bit, behind contexts that nobody computed.

B sequences, T tree nodes, P nodes of a path, V vocabulary.

A tree goes through `Target.verify` in a batch. The path is decoded as plain decoding does it: in a cache of its own of
batch 1, just long enough, by trees of the root alone, each compacted to the end of the prefix. Rows of the context are
made up (`target/made_up.py`) and the same for both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.config import MAX_DEPTH
from eagle_fast.decoding.tree import bit_masks
from eagle_fast.layers.attention import TreeStep
from eagle_fast.target import Target
from eagle_fast.target.interface import SlabCache
from eagle_fast.target.made_up import make_up

REAL = 16  # rows of a prompt, which give the sizes of those that are made up
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Compared(NamedTuple):
    """Rows of logits: how many were compared, how many differ in any bit, by how much at the most."""

    rows: int
    differ: int
    largest: float


def random_parents(num_nodes: int, rng: random.Random) -> list[int]:
    """A tree from the longest chain to a star: a node's parent is one of the few, or of all, before it, of those that
    are less than MAX_DEPTH deep; there are no deeper trees while decoding."""
    reach = rng.choice((1, 2, 3, 8, num_nodes))
    parents, depths = [-1], [0]
    for node in range(1, num_nodes):
        near = [each for each in range(max(0, node - reach), node) if depths[each] < MAX_DEPTH]
        parent = rng.choice(near or [each for each in range(node) if depths[each] < MAX_DEPTH])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def paths_of(parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the root to each node."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def random_leaf(parents: Sequence[int], rng: random.Random) -> int:
    return rng.choice([node for node in range(len(parents)) if node not in parents])


def tree_step(parents: Sequence[Sequence[int]], lengths: Tensor) -> TreeStep:
    """Of a tree for each sequence, all of T nodes, behind lengths [B]."""
    device, num_nodes = lengths.device, len(parents[0])
    paths = [paths_of(each) for each in parents]
    depths = torch.tensor([[len(path) - 1 for path in each] for each in paths], device=device)
    return TreeStep(lengths, torch.stack([bit_masks(each, num_nodes, device) for each in paths]), depths)


def compare(tree: Tensor, plain: Tensor) -> Compared:
    """Two [P, V] of one dtype."""
    bits = BITS[tree.element_size()]
    differ = (tree.view(bits) != plain.view(bits)).any(-1)
    return Compared(len(differ), int(differ.sum()), float((tree.double() - plain.double()).abs().max()))


class MadeUpContexts:
    """A cache of `batch` sequences whose first `rows` rows are made up; any first ones of them are a context."""

    def __init__(self, target: Target, batch: int, rows: int, most_nodes: int = 64):
        self.target, self.batch, self.rows = target, batch, rows
        self.cache = new_cache(target, batch, rows + most_nodes)
        for row in range(batch):
            sequence = self.cache.row(row)
            target.choose_frequencies(sequence, torch.tensor([rows], device="cpu"))
            tokens = random_tokens(target, (1, min(REAL, rows)), random.Random(row))
            target.prefill(tokens, 0, sequence)
            make_up(sequence.slab, rows, target.bindings, min(REAL, rows))

    @torch.no_grad()
    def compare(
        self, lengths: Sequence[int], parents: Sequence[Sequence[int]], row: int, leaf: int, rng: random.Random
    ) -> Compared:
        """Trees with random tokens behind contexts of these lengths [B], and the path of sequence `row` to a leaf."""
        target, path = self.target, paths_of(parents[row])[leaf]
        tokens = random_tokens(target, (self.batch, len(parents[0])), rng)
        at = torch.tensor(lengths, device=target.device)
        logits = target.verify(tokens, tree_step(parents, at), self.cache).logits
        return compare(logits[row, path], self._plain(row, lengths[row], tokens[row, path]))

    def _plain(self, row: int, length: int, tokens: Tensor) -> Tensor:
        """Logits [P, V] after each of the tokens [P], one at a time."""
        target, device = self.target, self.target.device
        cache = new_cache(target, 1, length + len(tokens))
        cache.slab.copy_prefix(self.cache.row(row).slab, length)
        for mine, theirs in zip(cache.long_rows.values(), self.cache.row(row).long_rows.values(), strict=True):
            mine.copy_(theirs)
        at, first = torch.tensor([length], device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
        logits = []
        for token in tokens.split(1):
            logits.append(target.verify(token[None], tree_step([[-1]], at), cache).logits[0])
            cache.slab.compact(first, torch.ones_like(at), at, target.transfers)
            at = at + 1
        return torch.cat(logits)


def new_cache(target: Target, batch: int, rows: int) -> SlabCache:
    """As a `Round` makes it, of whole blocks of 64 rows."""
    return target.new_cache(batch, -(-rows // 64) * 64)


def random_tokens(target: Target, shape: tuple[int, int], rng: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return torch.randint(target.vocab_size, shape, generator=generator).to(target.device)
