"""The last LAST keys of rows of `tree_attention`, one by one, as `tree_attention_order.py` lays down.

The rows of a tile have different last keys: of the prefix some of its last NEAR, of the tree their own paths. All of
them are taken together, dense, as they lie in the cache: a column that a row does not see has a weight of 0 and changes
nothing. So no row gathers its path.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_attention_order import LAST, NEAR, add_one_by_one, in_reach, scores_of, weigh


@triton.jit
def load(ptrs, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of q, k or v; `live` [rows], or None where all of them are."""
    if live is not None:
        x = tl.load(ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def tile(base, first, n, stride, d):
    """Pointers to rows first + n of a cache, columns d."""
    return base + tl.cast(first, tl.int64) * stride + (n[:, None] * stride + d[None, :])


@triton.jit
def _tree_block(
    start, words, depths_ptr, rows, num_slots, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Which of the tree slots from `start` on each row sees, and when it is their turn."""
    row_mask, _, logical, length = rows
    t = tl.arange(0, BLOCK_T)
    live = start + t < num_slots
    word = tl.load(words + start // 64, mask=row_mask, other=0)
    turns = start + t
    if depths_ptr is not None:
        turns = tl.load(depths_ptr + start + t, mask=live, other=0).to(tl.int32)
    bit = start % 64 + t
    half = tl.where((bit < 32)[None, :], word.to(tl.int32)[:, None], (word >> 32).to(tl.int32)[:, None])
    visible = (((half >> (bit % 32)[None, :]) & 1) == 1) & live[None, :]
    if WINDOW > 0 or CHUNK > 0:
        visible = in_reach(visible, logical[:, None], (length + turns)[None, :], WINDOW, CHUNK)
    return visible, turns


@triton.jit
def _add_tree(
    acc, total, weights, v, turns, start, words, depths_ptr, rows, num_slots, WINDOW: tl.constexpr, CHUNK: tl.constexpr
):
    """Weighted values with those of a block of the tree. Every row adds up all of them, most with a weight of 0. So
    that an infinity or a NaN does not reach rows that do not see it, 0 stands there; the others' total becomes NaN."""
    nothing = tl.sum(tl.sum(v.to(tl.float32) * 0.0, 1), 0)
    if nothing != 0.0:
        wrong = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1)
        v = tl.where(wrong == 1, 0.0, v).to(v.dtype)
        visible, _ = _tree_block(start, words, depths_ptr, rows, num_slots, WINDOW, CHUNK, v.shape[0])
        seen = tl.max(tl.where(visible, tl.max(wrong, 1)[None, :], 0), 1)
        total = tl.where(seen == 1, float("nan"), total)
    return add_one_by_one(acc, weights, v, turns, tl.min(turns, 0), tl.max(turns, 0) + 1), total


@triton.jit
def last_keys(
    q, k_base, v_base, stride_kl, stride_vl, words, depths_ptr, rows, num_slots, scale, d, columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, ONE: tl.constexpr, FINE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums of the rows' LAST keys. ONE: the tree fits into one block of BLOCK_T slots."""
    _, position, logical, length = rows
    n, t = tl.arange(0, NEAR), tl.arange(0, BLOCK_T)
    keys = length - NEAR + n
    visible, turns = _tree_block(0, words, depths_ptr, rows, num_slots, WINDOW, CHUNK, BLOCK_T)
    near_k = load(tile(k_base, length - NEAR, n, stride_kl, d), keys >= 0, d, D, BLOCK_D, UPCAST)
    k = load(tile(k_base, length, t, stride_kl, d), t < num_slots, d, D, BLOCK_D, UPCAST)
    near_v = load(tile(v_base, length - NEAR, n, stride_vl, columns), keys >= 0, columns, D, COLUMNS, UPCAST)
    v = load(tile(v_base, length, t, stride_vl, columns), t < num_slots, columns, D, COLUMNS, UPCAST)
    near_visible = (keys >= 0)[None, :] & (keys[None, :] > position[:, None] - LAST)
    if WINDOW > 0 or CHUNK > 0:
        near_visible = in_reach(near_visible, logical[:, None], keys[None, :], WINDOW, CHUNK)
    near, factor = scores_of(q, near_k, scale, SOFTCAP, FINE)
    near = tl.where(near_visible, near, float("-inf"))
    tree, _ = scores_of(q, k, scale, SOFTCAP, FINE)
    tree = tl.where(visible, tree, float("-inf"))
    peak = tl.maximum(tl.max(near, 1), tl.max(tree, 1))
    if not ONE:
        for start in range(BLOCK_T, num_slots, BLOCK_T):
            k = load(tile(k_base, length + start, t, stride_kl, d), start + t < num_slots, d, D, BLOCK_D, UPCAST)
            seen, _ = _tree_block(start, words, depths_ptr, rows, num_slots, WINDOW, CHUNK, BLOCK_T)
            more, _ = scores_of(q, k, scale, SOFTCAP, FINE)
            peak = tl.maximum(peak, tl.max(tl.where(seen, more, float("-inf")), 1))
    peak *= factor
    acc = tl.zeros((q.shape[0], COLUMNS), tl.float32)
    weights, coarse, fine = weigh(near, factor, peak, FINE)
    acc = add_one_by_one(acc, weights, near_v, n, 0, NEAR)
    tree, tree_coarse, tree_fine = weigh(tree, factor, peak, FINE)
    coarse, fine = coarse + tree_coarse, fine + tree_fine
    acc, coarse = _add_tree(acc, coarse, tree, v, turns, 0, words, depths_ptr, rows, num_slots, WINDOW, CHUNK)
    if not ONE:
        for start in range(BLOCK_T, num_slots, BLOCK_T):
            live = start + t < num_slots
            k = load(tile(k_base, length + start, t, stride_kl, d), live, d, D, BLOCK_D, UPCAST)
            v = load(tile(v_base, length + start, t, stride_vl, columns), live, columns, D, COLUMNS, UPCAST)
            visible, turns = _tree_block(start, words, depths_ptr, rows, num_slots, WINDOW, CHUNK, BLOCK_T)
            tree, _ = scores_of(q, k, scale, SOFTCAP, FINE)
            tree, tree_coarse, tree_fine = weigh(tl.where(visible, tree, float("-inf")), factor, peak, FINE)
            coarse, fine = coarse + tree_coarse, fine + tree_fine
            acc, coarse = _add_tree(
                acc, coarse, tree, v, turns, start, words, depths_ptr, rows, num_slots, WINDOW, CHUNK
            )
    return acc, peak, coarse + fine
