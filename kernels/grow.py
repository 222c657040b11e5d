"""Growing the draft tree: one beam step, and the choice of the final tree (EAGLE-2, sections 4.1 and 4.2).

Candidates are numbered level by level: 0 .. k-1 are the root's children (level 0, parent -1); child j of beam row i of
level l >= 1 is k + (l-1) k^2 + i k + j; C = k + depth k^2 for `depth` levels. Scores are cumulative log-probabilities,
so a child scores at most its parent, and with ties going to the lower index no node is chosen before its parent. A NaN
counts as -inf.

    B sequences   k rows of the beam and children of each   C candidates   T nodes of the tree   W mask words

Bytes: 20 C a sequence read and 32 T written (16 KB at C = 710, T = 60), so latency is all there is: each op is one
launch with one program per sequence. `grow` ranks its k^2 <= 256 scores by counting; `finish_tree` finds the score of
the last node taken by bisection, numbers the nodes by a prefix sum, and walks all paths up at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import FLOAT32, INT64, tensor, whole, written
from .launch import device_guard, use_triton
from .order_key import ABSENT, PACKED_ABSENT, kth_key, order_key, pack
from .overlap import after_earlier_kernels, dependent_launch

MOST_K = 16  # rows of a beam, whose k^2 candidates a program ranks at once
MOST_NODES = 256  # of a tree
MOST_CANDIDATES = 32768  # that a program of `finish_tree` holds


@triton.jit
def _grow_kernel(
    tokens_ptr, scores_ptr, candidates_ptr, rows_ptr, ancestors_ptr,
    topk_scores_ptr, topk_tokens_ptr, beam_scores_ptr, beam_candidates_ptr, beam_ancestors_ptr,
    out_scores_ptr, out_tokens_ptr, out_parents_ptr, stride_out, first, first_slot,
    PARENTS: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`first`: index of the level's first candidate; `first_slot`: draft slot of the new beam's first row."""
    after_earlier_kernels(PDL)
    b = tl.program_id(0).to(tl.int64)
    child = tl.arange(0, BLOCK)
    inside = child < PARENTS * K
    row = b * PARENTS + child // K
    total = tl.load(beam_scores_ptr + row, mask=inside, other=0.0)
    total += tl.load(topk_scores_ptr + b * PARENTS * K + child, mask=inside, other=0.0)
    total = tl.where(total == total, total, float("-inf"))
    token = tl.load(topk_tokens_ptr + b * PARENTS * K + child, mask=inside, other=0)
    parent = tl.load(beam_candidates_ptr + row, mask=inside, other=0)
    out = b * stride_out + first + child
    tl.store(out_scores_ptr + out, total, mask=inside)
    tl.store(out_tokens_ptr + out, token, mask=inside)
    tl.store(out_parents_ptr + out, parent, mask=inside)

    packed = tl.where(inside, pack(total, child), PACKED_ABSENT)
    rank = tl.sum((packed[None, :] > packed[:, None]).to(tl.int32), 1)
    taken = inside & (rank < K)
    beam = b * K + rank
    tl.store(tokens_ptr + beam, token, mask=taken)
    tl.store(scores_ptr + beam, total, mask=taken)
    tl.store(candidates_ptr + beam, (first + child).to(tl.int64), mask=taken)
    tl.store(rows_ptr + beam, row, mask=taken)
    slot = (first_slot + rank).to(tl.int64)
    for word in tl.static_range(WORDS):
        mask = tl.load(beam_ancestors_ptr + row * WORDS + word, mask=taken, other=0)
        mask |= tl.where((slot >> 6) == word, tl.full([BLOCK], 1, tl.int64) << (slot & 63), 0)
        tl.store(ancestors_ptr + beam * WORDS + word, mask, mask=taken)


@triton.jit
def _node_bit(nodes, words):
    """Mask words [N, W] of the nodes [N], each with its own bit."""
    bit = tl.full(nodes.shape, 1, tl.int64) << (nodes & 63).to(tl.int64)
    return tl.where((nodes >> 6)[:, None] == words[None, :], bit[:, None], 0)


@triton.jit
def _finish_tree_kernel(
    tree_tokens_ptr, tree_parents_ptr, depths_ptr, ancestors_ptr,
    scores_ptr, tokens_ptr, parents_ptr, roots_ptr, num_candidates, num_nodes,
    WORDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    b = tl.program_id(0).to(tl.int64)
    candidates = tl.arange(0, BLOCK_C)
    inside = candidates < num_candidates
    source = b * num_candidates + candidates
    key = order_key(tl.load(scores_ptr + source, mask=inside, other=0.0))
    key = tl.where(inside, key, ABSENT)
    least = kth_key(key, num_nodes - 1)
    above = (key > least).to(tl.int32)
    tied = (key == least).to(tl.int32)
    chosen = (above == 1) | ((tied == 1) & (tl.cumsum(tied, 0) <= num_nodes - 1 - tl.sum(above, 0)))
    node_of = tl.cumsum(chosen.to(tl.int32), 0)

    parent = tl.load(parents_ptr + source, mask=inside, other=-1).to(tl.int32)
    parent = tl.where(parent < 0, 0, tl.gather(node_of, tl.maximum(parent, 0), 0))
    token = tl.load(tokens_ptr + source, mask=inside, other=0)
    tree = b * num_nodes
    tl.store(tree_tokens_ptr + tree, tl.load(roots_ptr + b))
    tl.store(tree_parents_ptr + tree, tl.full([], -1, tl.int64))
    tl.store(tree_tokens_ptr + tree + node_of, token, mask=chosen)
    tl.store(tree_parents_ptr + tree + node_of, parent.to(tl.int64), mask=chosen)
    tl.debug_barrier()

    nodes = tl.arange(0, BLOCK_T)
    words = tl.arange(0, BLOCK_W)
    parents = tl.load(tree_parents_ptr + tree + nodes, mask=nodes < num_nodes, other=-1).to(tl.int32)
    ancestors = _node_bit(nodes, words)
    depths = tl.zeros([BLOCK_T], tl.int32)
    current = parents
    while tl.max(current, 0) >= 0:
        alive = current >= 0
        ancestors |= tl.where(alive[:, None], _node_bit(tl.maximum(current, 0), words), 0)
        depths += alive.to(tl.int32)
        current = tl.where(alive, tl.gather(parents, tl.maximum(current, 0), 0), -1)
    tl.store(depths_ptr + tree + nodes, depths.to(tl.int64), mask=nodes < num_nodes)
    mask = (nodes < num_nodes)[:, None] & (words < WORDS)[None, :]
    tl.store(ancestors_ptr + (tree + nodes)[:, None] * WORDS + words[None, :], ancestors, mask=mask)


def grow(
    topk_scores: torch.Tensor,
    topk_tokens: torch.Tensor,
    beam_scores: torch.Tensor,
    beam_candidates: torch.Tensor,
    beam_ancestors: torch.Tensor,
    level: int,
    out_scores: torch.Tensor,
    out_tokens: torch.Tensor,
    out_parents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes the P k candidates of `level` and returns the next beam, its best row first. P = k, but 1 at level 0.

    topk_scores, topk_tokens [B, P, k]: the k best tokens after each beam row, log-probabilities and ids
    beam_scores, beam_candidates [B, P], beam_ancestors [B, P, W]: the beam; row i is candidate beam_candidates[:, i].
        At level 0 it is the root: score 0, candidate -1, no ancestors
    out_scores, out_tokens, out_parents [B, C]: all candidates, written in place
    -> tokens, scores, candidates, rows (of the parent among the B P of all old beams) [B, k], ancestors [B, k, W]: row
       r becomes draft slot level * k + r, whose bit its ancestors get.
    """
    level = whole("level", level)
    num_sequences, parents, k = tensor("topk_scores", topk_scores, "B P k", FLOAT32)
    if parents != (k if level else 1) or k > MOST_K:
        raise ValueError(
            f"topk_scores has P = {parents} rows of k = {k} at level={level}; expected P = k, but 1 at level 0, and k "
            f"of at most {MOST_K}"
        )
    near, of_beam = ("topk_scores", topk_scores), (num_sequences, parents)
    tensor("topk_tokens", topk_tokens, "B P k", INT64, topk_scores.shape, near=near)
    tensor("beam_scores", beam_scores, "B P", FLOAT32, of_beam, near=near)
    tensor("beam_candidates", beam_candidates, "B P", INT64, of_beam, near=near)
    num_words = tensor("beam_ancestors", beam_ancestors, "B P W", INT64, (*of_beam, None), near=near)[2]
    tensor("out_scores", out_scores, "B C", FLOAT32, (num_sequences, None), near=near)
    tensor("out_tokens", out_tokens, "B C", INT64, out_scores.shape, near=("out_scores", out_scores))
    tensor("out_parents", out_parents, "B C", INT64, out_scores.shape, near=("out_scores", out_scores))
    first = _first_candidate(level, k)
    if first + parents * k > out_scores.shape[1] or (level + 1) * k > 64 * num_words:
        raise ValueError(
            f"level={level} of k = {k} fills candidates up to {first + parents * k} and bits up to {(level + 1) * k}; "
            f"out_scores has C = {out_scores.shape[1]} and beam_ancestors 64 W = {64 * num_words}"
        )
    inputs = (topk_scores, topk_tokens, beam_scores, beam_candidates, beam_ancestors)
    buffers = (out_scores, out_tokens, out_parents)
    written(
        [("out_scores", out_scores), ("out_tokens", out_tokens), ("out_parents", out_parents)],
        [near, ("topk_tokens", topk_tokens), ("beam_scores", beam_scores), ("beam_candidates", beam_candidates),
         ("beam_ancestors", beam_ancestors)],
    )  # fmt: skip
    if not use_triton(topk_scores):
        return grow_ref(*inputs, level, *buffers)
    scores = beam_scores.new_empty(num_sequences, k)
    tokens, candidates, rows = (beam_candidates.new_empty(num_sequences, k) for _ in range(3))
    ancestors = beam_ancestors.new_empty(num_sequences, k, num_words)
    with device_guard(topk_scores):
        _grow_kernel[(num_sequences,)](
            tokens, scores, candidates, rows, ancestors, *inputs, *buffers, out_scores.stride(0), first, level * k,
            PARENTS=parents, K=k, WORDS=num_words, BLOCK=triton.next_power_of_2(parents * k),
            num_warps=4 if k <= 11 else 8, **dependent_launch(topk_scores.device),
        )  # fmt: skip
    return tokens, scores, candidates, rows, ancestors


def _first_candidate(level: int, k: int) -> int:
    return k + (level - 1) * k * k if level else 0


def finish_tree(
    scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, roots: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tree of T = num_nodes nodes: the root and the T-1 best candidates, in candidate order.

    scores, tokens, parents [B, C] as `grow` wrote them, roots [B] -> tokens, parents (root: -1), depths [B, T],
    ancestors [B, T, ceil(T / 64)].
    """
    num_sequences, num_candidates = tensor("scores", scores, "B C", FLOAT32)
    near = ("scores", scores)
    tensor("tokens", tokens, "B C", INT64, scores.shape, near=near)
    tensor("parents", parents, "B C", INT64, scores.shape, near=near)
    tensor("roots", roots, "B", INT64, (num_sequences,), near=near)
    if num_candidates > MOST_CANDIDATES:
        raise ValueError(f"scores has C = {num_candidates}; expected at most {MOST_CANDIDATES} candidates")
    num_nodes = whole("num_nodes", num_nodes, 1, min(MOST_NODES, 1 + num_candidates), ", the root and C of scores")
    num_words = triton.cdiv(num_nodes, 64)
    if not use_triton(scores):
        return finish_tree_ref(scores, tokens, parents, roots, num_nodes)
    tree_tokens, tree_parents, depths = (tokens.new_empty(num_sequences, num_nodes) for _ in range(3))
    ancestors = tokens.new_empty(num_sequences, num_nodes, num_words)
    block_c = triton.next_power_of_2(num_candidates)
    with device_guard(scores):
        _finish_tree_kernel[(num_sequences,)](
            tree_tokens, tree_parents, depths, ancestors, scores, tokens, parents, roots, num_candidates, num_nodes,
            WORDS=num_words, BLOCK_C=block_c, BLOCK_T=triton.next_power_of_2(num_nodes),
            BLOCK_W=triton.next_power_of_2(num_words), num_warps=min(16, max(4, block_c // 256)),
            **dependent_launch(scores.device),
        )  # fmt: skip
    return tree_tokens, tree_parents, depths, ancestors


def grow_ref(
    topk_scores: torch.Tensor,
    topk_tokens: torch.Tensor,
    beam_scores: torch.Tensor,
    beam_candidates: torch.Tensor,
    beam_ancestors: torch.Tensor,
    level: int,
    out_scores: torch.Tensor,
    out_tokens: torch.Tensor,
    out_parents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_sequences, parents, k), device = topk_scores.shape, topk_scores.device
    first = _first_candidate(level, k)
    total = (beam_scores[..., None] + topk_scores).flatten(1)
    total = total.masked_fill(total.isnan(), float("-inf"))
    out_scores[:, first : first + parents * k] = total
    out_tokens[:, first : first + parents * k] = topk_tokens.flatten(1)
    out_parents[:, first : first + parents * k] = beam_candidates.repeat_interleave(k, 1)

    scores, index = total.sort(dim=-1, descending=True, stable=True)
    scores, index = scores[:, :k], index[:, :k]
    rows = index // k + torch.arange(num_sequences, device=device)[:, None] * parents
    slots = level * k + torch.arange(k, device=device)
    words = torch.arange(beam_ancestors.shape[-1], device=device)
    bits = torch.where(words == (slots >> 6)[:, None], (torch.ones_like(slots) << (slots & 63))[:, None], 0)
    ancestors = beam_ancestors.flatten(0, 1)[rows] | bits
    return topk_tokens.flatten(1).gather(1, index), scores.contiguous(), first + index, rows, ancestors


def finish_tree_ref(
    scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, roots: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    device = scores.device
    ranked = scores.masked_fill(scores.isnan(), float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, : num_nodes - 1].sort(-1).values
    nodes = torch.arange(num_nodes, device=device)
    # Node of a candidate; the last column stands for the root, whose candidate index is -1.
    node_of = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.int64, device=device)
    node_of.scatter_(1, chosen, nodes[1:].expand_as(chosen))
    last = torch.where(parents < 0, scores.shape[1], parents).gather(1, chosen)
    tree_parents = torch.cat([torch.full_like(roots, -1)[:, None], node_of.gather(1, last)], 1)
    tree_tokens = torch.cat([roots[:, None], tokens.gather(1, chosen)], 1)

    # Path doubling: after n steps `masks` holds the first 2^n nodes of each path up and `jump` the node after them.
    words = torch.arange(-(-num_nodes // 64), device=device)
    own = (torch.ones_like(nodes) << (nodes & 63))[:, None]
    masks = torch.where(words == (nodes >> 6)[:, None], own, 0).expand(len(roots), -1, -1)
    jump = tree_parents.clamp(min=0)
    depths = (nodes > 0).long().expand_as(jump)
    for _ in range(int(num_nodes - 1).bit_length()):
        masks = masks | masks.gather(1, jump[..., None].expand_as(masks))
        depths = depths + depths.gather(1, jump)
        jump = jump.gather(1, jump)
    return tree_tokens, tree_parents, depths, masks
