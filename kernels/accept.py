"""Accept: from the root, walk to the child that carries the token chosen after the node, while there is one.

    path[0] = 0,   path[r + 1] = the node c with parents[c] = path[r] and tokens[c] = chosen[path[r]]
    emitted[r] = chosen[path[r]]

    B sequences   T tree nodes   A most nodes on a path

The tokens emitted are the target's own choices, whatever the tree holds; only their number depends on it. One program
a sequence with all nodes in registers. Bytes: 24 T + 16 A a sequence, 1.6 KB; the time is that of A dependent loads and
reductions within a warp, some microseconds, and of a launch.

Left out: nothing; acceptance by probabilities has no place where choices are a function of the position's noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from eagle_fast_kernels.launch import device_guard, use_triton
from torch import Tensor


class Accepted(NamedTuple):
    """What `accept` returns; `path` and `emitted` are 0 from column `counts` on."""

    path: Tensor  # [B, A] tree nodes, root first
    counts: Tensor  # [B] nodes on the path, 0 for a sequence that is not active
    emitted: Tensor  # [B, A] the token chosen after each node of the path


@triton.jit
def _accept_kernel(
    tokens_ptr, parents_ptr, chosen_ptr, active_ptr, path_ptr, counts_ptr, emitted_ptr,
    T: tl.constexpr, A: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_T)
    tokens = tl.load(tokens_ptr + sequence * T + node, mask=node < T, other=-1)
    parents = tl.load(parents_ptr + sequence * T + node, mask=node < T, other=-1)
    chosen = tl.load(chosen_ptr + sequence * T + node, mask=node < T, other=-1)
    here = tl.load(active_ptr + sequence).to(tl.int32) - 1  # the node reached, -1 once the walk is over
    count = here * 0
    for step in range(A):
        walking = here >= 0
        token = tl.sum(tl.where(node == here, chosen, 0), 0)
        tl.store(path_ptr + sequence * A + step, tl.maximum(here, 0).to(tl.int64))
        tl.store(emitted_ptr + sequence * A + step, token)
        count += walking.to(tl.int32)
        matches = walking & (token >= 0) & (node > 0) & (parents == here) & (tokens == token)
        child = tl.min(tl.where(matches, node, BLOCK_T), 0)
        here = tl.where(child < BLOCK_T, child, -1)
    tl.store(counts_ptr + sequence, count.to(tl.int64))


def accept(tokens: Tensor, parents: Tensor, chosen: Tensor, active: Tensor, max_path: int) -> Accepted:
    """Accepted path of every sequence, of at most `max_path` nodes.

    tokens, parents [B, T] of the tree (parents[:, 0] = -1); chosen [B, T] the target's token after each node, -1 (no
    valid choice) matches nothing; active [B] bool.
    """
    num_sequences, num_nodes = tokens.shape
    assert parents.shape == chosen.shape == tokens.shape
    assert active.shape == (num_sequences,)
    assert active.dtype == torch.bool
    assert all(t.is_contiguous() for t in (tokens, parents, chosen, active))
    if not use_triton(tokens):
        return accept_ref(tokens, parents, chosen, active, max_path)
    path, emitted = tokens.new_empty(2, num_sequences, max_path)
    counts = tokens.new_empty(num_sequences)
    with device_guard(tokens):
        _accept_kernel[(num_sequences,)](
            tokens, parents, chosen, active, path, counts, emitted,
            T=num_nodes, A=max_path, BLOCK_T=triton.next_power_of_2(num_nodes), num_warps=1,
        )  # fmt: skip
    return Accepted(path, counts, emitted)


def accept_ref(tokens: Tensor, parents: Tensor, chosen: Tensor, active: Tensor, max_path: int) -> Accepted:
    """`accept` in plain PyTorch: all sequences take a step together."""
    num_nodes = tokens.shape[1]
    nodes = torch.arange(num_nodes, device=tokens.device)
    node, walking = torch.zeros_like(tokens[:, :1]), active[:, None]
    path, emitted, walked = [], [], []
    for _ in range(max_path):
        token = chosen.gather(1, node)
        path.append(torch.where(walking, node, 0))
        emitted.append(torch.where(walking, token, 0))
        walked.append(walking)
        matches = (nodes > 0) & (parents == node) & (tokens == token) & (token >= 0)
        child = torch.where(matches, nodes, num_nodes).amin(1, keepdim=True)
        walking = walking & (child < num_nodes)
        node = torch.where(walking, child, 0)
    return Accepted(torch.cat(path, 1), torch.cat(walked, 1).sum(1), torch.cat(emitted, 1))
