"""Accept: from the root, walk to the child that carries the token chosen after the node, while there is one.

    path[0] = 0,   path[r + 1] = the node c with parents[c] = path[r] and tokens[c] = chosen[path[r]]
    emitted[r] = chosen[path[r]]
    ranks[r]   = how many children of path[r] come before path[r + 1]; where the walk ends at path[r], -1 - m of its m
                 children, none of which was right, and -1 where they were not looked at

    B sequences   T tree nodes   A most nodes on a path

The tokens emitted are the target's own choices, whatever the tree holds; only their number depends on it, and on the
room that the sequence has. One program per sequence with all nodes in registers. Bytes: 24 T + 16 A a sequence, 1.6 KB;
the time is that of A dependent loads and reductions within a warp, some microseconds, and of a launch.

Left out: nothing; acceptance by probabilities has no place where choices are a function of the position's noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import INT64, tensor, written
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch

MOST_NODES = 4096  # of a tree, which one program holds


@triton.jit
def _accept_kernel(
    tokens_ptr, parents_ptr, chosen_ptr, lengths_ptr, ends_ptr, roots_ptr, report_ptr, path_ptr, ranks_ptr,
    T: tl.constexpr, A: tl.constexpr, BLOCK_T: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_T)
    tokens = tl.load(tokens_ptr + sequence * T + node, mask=node < T, other=-1)
    parents = tl.load(parents_ptr + sequence * T + node, mask=node < T, other=-1)
    chosen = tl.load(chosen_ptr + sequence * T + node, mask=node < T, other=-1)
    room = tl.load(ends_ptr + sequence) - tl.load(lengths_ptr + sequence)
    newest = tl.load(roots_ptr + sequence)
    report = report_ptr + sequence * (1 + A)
    here = (room > 0).to(tl.int32) - 1  # the node reached, -1 once the walk is over
    count = here * 0
    for step in range(A):
        walking = here >= 0
        token = tl.sum(tl.where(node == here, chosen, 0), 0)
        tl.store(path_ptr + sequence * A + step, tl.maximum(here, 0).to(tl.int64))
        tl.store(report + 1 + step, token)
        newest = tl.where(walking, tl.maximum(token, 0), newest)
        count += walking.to(tl.int32)
        children = walking & (count < room) & (token >= 0) & (node > 0) & (parents == here)
        child = tl.min(tl.where(children & (tokens == token), node, BLOCK_T), 0)
        if RANKS:
            before = tl.sum((children & (node < child)).to(tl.int32), 0)
            rank = tl.where(child < BLOCK_T, before, -1 - before)
            tl.store(ranks_ptr + sequence * A + step, rank.to(tl.int64))
        here = tl.where(child < BLOCK_T, child, -1)
    tl.store(report, count.to(tl.int64))
    tl.store(roots_ptr + sequence, newest)


def accept(
    tokens: Tensor, parents: Tensor, chosen: Tensor, lengths: Tensor, ends: Tensor, roots: Tensor, report: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The accepted path [B, A] of every sequence: tree nodes, root first, then zeros.

    tokens, parents [B, T] of the tree (parents[:, 0] = -1); chosen [B, T] the target's token after each node, -1 (no
    valid choice) matches nothing; lengths, ends [B]: a path has at most ends - lengths nodes.
    report [B, 1 + A] gets the number of nodes on each path and the token chosen after each of them, then zeros; roots
    [B] the last of these tokens (0 if it is -1), and keep what they are where there is none. All are int64, contiguous.
    ranks [B, A]: if given, gets the ranks above, and -1 behind the end of the walk.
    """
    num_sequences, num_nodes = shape = tensor("tokens", tokens, "B T", INT64)
    near = ("tokens", tokens)
    of_nodes = [("parents", parents), ("chosen", chosen)]
    of_sequences = [("lengths", lengths), ("ends", ends), ("roots", roots)]
    for name, x in of_nodes:
        tensor(name, x, "B T", INT64, shape, near=near)
    for name, x in of_sequences:
        tensor(name, x, "B", INT64, (num_sequences,), near=near)
    max_path = tensor("report", report, "B 1+A", INT64, (num_sequences, None), near=near)[1] - 1
    if max_path < 1 or num_nodes > MOST_NODES:
        raise ValueError(
            f"report has {max_path + 1} columns, tokens {num_nodes}; expected 1 + A, for paths of A >= 1 nodes, and at "
            f"most {MOST_NODES} nodes"
        )
    if num_nodes > 1:
        of_nodes.append(near)  # a root alone may be its own token: the kernel does not look at it
    outputs = [("report", report), of_sequences.pop()]
    if ranks is not None:
        tensor("ranks", ranks, "B A", INT64, (num_sequences, max_path), near=("report", report))
        outputs.append(("ranks", ranks))
    written(outputs, [*of_nodes, *of_sequences])
    if not use_triton(tokens):
        return accept_ref(tokens, parents, chosen, lengths, ends, roots, report, ranks)
    path = tokens.new_empty(num_sequences, max_path)
    with device_guard(tokens):
        _accept_kernel[(num_sequences,)](
            tokens, parents, chosen, lengths, ends, roots, report, path, path if ranks is None else ranks,
            T=num_nodes, A=max_path, BLOCK_T=triton.next_power_of_2(num_nodes), RANKS=ranks is not None, num_warps=1,
            **dependent_launch(tokens.device),
        )  # fmt: skip
    return path


def accept_ref(
    tokens: Tensor, parents: Tensor, chosen: Tensor, lengths: Tensor, ends: Tensor, roots: Tensor, report: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`accept` in plain PyTorch: all sequences take a step together."""
    num_nodes, room = tokens.shape[1], (ends - lengths)[:, None]
    nodes = torch.arange(num_nodes, device=tokens.device)
    node, walking, newest = torch.zeros_like(tokens[:, :1]), room > 0, roots[:, None]
    path, emitted, walked, ranked = [], [], [], []
    for step in range(report.shape[1] - 1):
        token = chosen.gather(1, node)
        path.append(torch.where(walking, node, 0))
        emitted.append(torch.where(walking, token, 0))
        walked.append(walking)
        newest = torch.where(walking, token.clamp(min=0), newest)
        walking = walking & (step + 1 < room)
        children = walking & (nodes > 0) & (parents == node) & (token >= 0)
        child = torch.where(children & (tokens == token), nodes, num_nodes).amin(1, keepdim=True)
        before = (children & (nodes < child)).sum(1, keepdim=True)
        walking = walking & (child < num_nodes)
        ranked.append(torch.where(walking, before, -1 - before))
        node = torch.where(walking, child, 0)
    report.copy_(torch.cat([torch.cat(walked, 1).sum(1, keepdim=True), *emitted], 1))
    roots.copy_(newest[:, 0])
    if ranks is not None:
        ranks.copy_(torch.cat(ranked, 1))
    return torch.cat(path, 1)
