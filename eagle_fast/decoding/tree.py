"""The draft tree as tensors: node 0 is the root, the newest token; parents come before their children.

B sequences, T nodes, W = ceil(T / 64) words of an ancestor mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tree(NamedTuple):
    tokens: torch.Tensor  # [B, T]
    parents: torch.Tensor  # [B, T], -1 for the root
    depths: torch.Tensor  # [B, T], 0 for the root
    ancestors: torch.Tensor  # [B, T, W]: bit j of node i is set where i is j or descends from it


class Walked(NamedTuple):
    """What the host knows of the paths that a round accepted, of B sequences."""

    counts: list[int]  # nodes
    ranks: list[list[int]]  # as `accept` gives them, of so many nodes or more
    full: list[bool]  # the sequence was done, or had no room for more


def root_only(roots: torch.Tensor) -> Tree:
    """The tree of plain decoding: just the newest token of each sequence [B]."""
    tokens = roots[:, None]
    return Tree(tokens, torch.full_like(tokens, -1), torch.zeros_like(tokens), torch.ones_like(tokens)[..., None])


def chain_masks(num_rows: int, device: torch.device) -> torch.Tensor:
    """Ancestor masks [num_rows, W] of a chain: row r sees rows 0..r. Made on the device: rounds may be under way."""
    words = torch.arange(-(-num_rows // 64), device=device)
    seen = torch.arange(1, num_rows + 1, device=device)[:, None] - 64 * words  # bits of each word, as far as it goes
    one = torch.ones((), dtype=torch.long, device=device)
    return torch.where(seen >= 64, -1, (one << seen.clamp(0, 63)) - 1)


def bit_masks(visible, num_slots: int, device: torch.device) -> torch.Tensor:
    """Masks [rows, ceil(num_slots / 64)] int64 from the visible slots of each row."""
    words = [[sum(1 << (j % 64) for j in row if j // 64 == w) for w in range(-(-num_slots // 64))] for row in visible]
    signed = [[word - (1 << 64) if word >= 1 << 63 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.long, device=device)
