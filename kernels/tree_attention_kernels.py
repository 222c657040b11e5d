"""The two kernels of `tree_attention`, in the order that `tree_attention_order.py` lays down.

B sequences, T queries, Hq/Hkv heads, G = Hq/Hkv, D head size; slots of partial results, fp32, [B Hkv, slots, T G, D].

    prefix_kernel    whole blocks of the prefix, for tiles of the T G rows that share a KV head. A program takes one
                     split and leaves its sum, or with FOLD all of them: the sum of the finished splits in slot 0,
                     that of the split that goes on behind the prefix in slot 1.
    finish_kernel    for the G rows of a node: the blocks from the prefix's ragged end to the node itself, with its
                     ancestors gathered in order; then everything is added up. It starts while the other still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tree_attention_order import (
    LOG2E,
    UNIT,
    add,
    block_sums,
    block_sums_of_few,
    first_key,
    in_reach,
    path_length,
    units,
    write_path,
)

ANY, L2 = tl.constexpr(""), tl.constexpr(".cg")  # caches that loads may go through


@triton.jit
def _load(ptrs, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, CACHE: tl.constexpr):
    """Rows of q, k or v; `live` [rows], or None where all of them are."""
    if live is not None:
        x = tl.load(ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0, cache_modifier=CACHE)
    elif D == BLOCK_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _nothing(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of no keys."""
    empty = tl.full((ROWS,), float("-inf"), tl.float32)
    return tl.zeros((ROWS, BLOCK_D), tl.float32), empty, tl.zeros((ROWS,), tl.float32)


@triton.jit
def _store(partials, at, acc, peak, total, mask, d, D: tl.constexpr):
    acc_ptr, peak_ptr, total_ptr = partials
    tl.store(peak_ptr + at, peak, mask=mask)
    tl.store(total_ptr + at, total, mask=mask)
    tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _fetch(partials, at, mask, d, D: tl.constexpr):
    """What `_store` left at `at` [M], nothing where the mask is not set."""
    acc_ptr, peak_ptr, total_ptr = partials
    acc = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)
    peak = tl.load(peak_ptr + at, mask=mask, other=float("-inf"))
    return acc, peak, tl.load(total_ptr + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_queries", "first"])
def prefix_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ancestors_ptr, depths_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ab, stride_at, stride_db,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOTS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FINE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # in this order: `finish_kernel` reads q, k and v before it waits for this one
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(2).to(tl.int64)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    num_slots = first + num_queries
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    whole, begin = length // BLOCK_N, first_key(length, WINDOW, CHUNK)
    # Where the rows' positions have several widths of splits, there is another set of programs for each.
    narrowest = units(length - 1, WINDOW, CHUNK)
    widest = units(length + num_slots - 1, WINDOW, CHUNK)
    slot, programs = tl.program_id(0), 1 if FOLD else SLOTS
    width, slot = narrowest + slot // programs, slot % programs
    if width > widest:
        return
    split = width * (UNIT // BLOCK_N)  # blocks
    low, high = begin // BLOCK_N, whole
    if not FOLD:
        split_begin = (begin // (split * BLOCK_N) + slot) * split
        low, high = tl.maximum(low, split_begin), tl.minimum(high, split_begin + split)
    if low >= high:
        return

    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // G, kv_head * G + row % G
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row_mask = query < num_queries
    q_ptrs = q_ptr + (sequence * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qt)[:, None] + d
    q = _load(q_ptrs, row_mask, d, D, BLOCK_D, UPCAST, ANY)
    k_base = k_ptr + sequence * stride_kb + kv_head * stride_kh + d
    v_base = v_ptr + sequence * stride_vb + kv_head * stride_vh + d
    positions = row
    if WINDOW > 0 or CHUNK > 0:
        depths_ptr += sequence * stride_db + first
        positions = length + tl.load(depths_ptr + query, mask=row_mask, other=0).to(tl.int32)
    acc, peak, total = _nothing(BLOCK_M, BLOCK_D)
    done_acc, done_peak, done_total = _nothing(BLOCK_M, BLOCK_D)
    for block in range(low, high):
        if FOLD and block % split == 0:
            done_acc, done_peak, done_total = add(done_acc, done_peak, done_total, acc, peak, total)
            acc, peak, total = _nothing(BLOCK_M, BLOCK_D)
        keys = block * BLOCK_N + n
        k = _load(k_base + keys.to(tl.int64)[:, None] * stride_kl, None, d, D, BLOCK_D, UPCAST, ANY)
        v = _load(v_base + keys.to(tl.int64)[:, None] * stride_vl, None, d, D, BLOCK_D, UPCAST, ANY)
        visible = None
        if WINDOW > 0 or CHUNK > 0:
            visible = in_reach(row_mask[:, None], positions[:, None], keys[None, :], WINDOW, CHUNK)
        acc_b, peak_b, total_b = block_sums(q, k, v, visible, scale, SOFTCAP, FINE)
        acc, peak, total = add(acc, peak, total, acc_b, peak_b, total_b)

    if widest > narrowest:
        words = ancestors_ptr + sequence * stride_ab + query.to(tl.int64) * stride_at
        mine = units(length + path_length(words, num_slots, row_mask) - 1, WINDOW, CHUNK)
        row_mask = row_mask & (mine == width)
    partials, at = (acc_ptr, peak_ptr, total_ptr), group * SLOTS * num_queries * G + row
    if FOLD:
        if high % split == 0:
            done_acc, done_peak, done_total = add(done_acc, done_peak, done_total, acc, peak, total)
        _store(partials, at, done_acc, done_peak, done_total, row_mask, d, D)
        _store(partials, at + num_queries * G, acc, peak, total, row_mask, d, D)
    else:
        _store(partials, at + slot * num_queries * G, acc, peak, total, row_mask, d, D)


@triton.jit(do_not_specialize=["num_queries", "first", "num_tails"])
def finish_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ancestors_ptr, depths_ptr, sinks_ptr, out_ptr, acc_ptr, peak_ptr, total_ptr,
    tail_acc_ptr, tail_peak_ptr, tail_total_ptr, paths_ptr, num_queries, num_kv_heads, first, num_tails, path_size,
    scale, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ab, stride_at, stride_db,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOTS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, LEAST: tl.constexpr, FINE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS: the G rows of a node, or as many of them as a tile of BLOCK_M takes, rounded up to a power of two. LEAST:
    rows of a product.

    Before the wait, what earlier kernels wrote is read from L2: this one starts when they are done, but caches of
    multiprocessors may still hold what was there before.
    """
    if PDL:
        gdc_launch_dependents()
    tiles: tl.constexpr = (G + HEADS - 1) // HEADS
    node, group = tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    num_slots = first + num_queries
    length = tl.load(lengths_ptr + sequence, cache_modifier=L2).to(tl.int32)
    words = ancestors_ptr + sequence * stride_ab + node.to(tl.int64) * stride_at
    path_ptr = paths_ptr + (group * tl.num_programs(0) + tl.program_id(0)) * path_size
    write_path(path_ptr, words, num_slots)
    position = length + path_length(words, num_slots, None) - 1
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    whole = length // BLOCK_N

    first_head = tl.program_id(0) % tiles * HEADS
    here = tl.minimum(HEADS, G - first_head)  # heads of this tile
    g, g_acc = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_M if BLOCK_M > LEAST else LEAST)
    row_mask, acc_mask = g < here, g_acc < here
    g, g_acc = first_head + g, first_head + g_acc
    q_base = q_ptr + sequence * stride_qb + node.to(tl.int64) * stride_qt + d
    q = _load(q_base + (kv_head * G + g)[:, None] * stride_qh, row_mask, d, D, BLOCK_D, UPCAST, L2)
    k_base = k_ptr + sequence * stride_kb + kv_head * stride_kh + d
    v_base = v_ptr + sequence * stride_vb + kv_head * stride_vh + d
    of_tails = (group * num_queries + node) * num_tails * G
    depths_base, at_depth = depths_ptr, position
    if WINDOW > 0 or CHUNK > 0:
        depths_base += sequence * stride_db
        at_depth = length + tl.load(depths_base + first + node, cache_modifier=L2).to(tl.int32)
    tl.debug_barrier()  # the path is read by other threads
    for block in range(whole, position // BLOCK_N + 1):
        keys = block * BLOCK_N + n
        live = keys <= position
        slots = tl.load(path_ptr + keys - length, mask=live & (keys >= length), other=0, cache_modifier=L2)
        cache_rows = tl.where(keys < length, keys, length + slots).to(tl.int64)
        k = _load(k_base + cache_rows[:, None] * stride_kl, live, d, D, BLOCK_D, UPCAST, L2)
        v = _load(v_base + cache_rows[:, None] * stride_vl, live, d, D, BLOCK_D, UPCAST, L2)
        visible = live[:, None] & (g >= 0)[None, :]
        if WINDOW > 0 or CHUNK > 0:
            of_path = tl.load(depths_base + slots, mask=live & (keys >= length), other=0, cache_modifier=L2)
            key_positions = tl.where(keys < length, keys, length + of_path.to(tl.int32))
            visible = in_reach(visible, at_depth, key_positions[:, None], WINDOW, CHUNK)
        acc, peak, total = block_sums_of_few(q, k, v, visible, scale, LEAST, SOFTCAP, FINE)
        tail = of_tails + (block - whole) * G
        tl.store(tail_peak_ptr + tail + g, peak, mask=row_mask)
        tl.store(tail_total_ptr + tail + g, total, mask=row_mask)
        tl.store(
            tail_acc_ptr + (tail + g_acc)[:, None] * D + d[None, :], acc, mask=acc_mask[:, None] & (d < D)[None, :]
        )
    tl.debug_barrier()  # they are read in another order of threads
    if PDL:
        gdc_wait()

    h = first_head + tl.arange(0, HEADS)
    heads = h < G
    begin = first_key(length, WINDOW, CHUNK)
    split = units(position, WINDOW, CHUNK) * (UNIT // BLOCK_N)
    earlier = begin // (split * BLOCK_N)
    going_on = whole // split  # the split that the first block behind the prefix belongs to
    partials = (acc_ptr, peak_ptr, total_ptr)
    at = group * SLOTS * num_queries * G + node * G + h
    by_slot = num_queries * G
    acc, peak, total = _fetch(partials, at, heads & (going_on > earlier), d, D)
    if FOLD:
        last = at + by_slot
    else:
        for slot in tl.static_range(1, SLOTS):
            there = heads & (slot < going_on - earlier)
            acc, peak, total = add(acc, peak, total, *_fetch(partials, at + slot * by_slot, there, d, D))
        last = at + (going_on - earlier) * by_slot
    there = heads & (tl.maximum(going_on * split, begin // BLOCK_N) < whole)
    acc_s, peak_s, total_s = _fetch(partials, last, there, d, D)
    for block in range(whole, position // BLOCK_N + 1):
        if block % split == 0:
            acc, peak, total = add(acc, peak, total, acc_s, peak_s, total_s)
            acc_s, peak_s, total_s = _nothing(HEADS, BLOCK_D)
        tail = _fetch((tail_acc_ptr, tail_peak_ptr, tail_total_ptr), of_tails + (block - whole) * G + h, heads, d, D)
        acc_s, peak_s, total_s = add(acc_s, peak_s, total_s, *tail)
    acc, peak, total = add(acc, peak, total, acc_s, peak_s, total_s)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + kv_head * G + h, mask=heads, other=0.0).to(tl.float32) * LOG2E
        acc, peak, total = add(acc, peak, total, tl.zeros_like(acc), sink, tl.full(sink.shape, 1.0, tl.float32))
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (sequence * num_queries + node) * num_kv_heads * G + kv_head * G + h
    ptrs = out_ptr + out_row[:, None] * D + d[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=heads[:, None] & (d < D)[None, :])
