"""The two kernels of `tree_attention`, in the order that `tree_attention_order.py` lays down.

B sequences, T queries, Hq/Hkv heads, G = Hq/Hkv, D head size; slots of partial results, fp32, [B Hkv, slots, T G, D].

    attend_kernel     tiles of the T G rows that share a KV head. With FOLD a program does all that its rows need. Else
                      it takes one split and leaves its sum in the split's slot, or the last keys, some columns of D,
                      and leaves theirs in the slot behind those of splits. With RESUME the sums of the splits' whole
                      blocks are in the slots already, by `tree_attention_hopper`: it goes on from there.
    combine_kernel    adds up what the rows' programs left. It starts while the other still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tree_attention_last import last_keys, load, tile
from .tree_attention_order import (
    LAST,
    LOG2E,
    UNIT,
    add,
    add_block,
    first_key,
    in_reach,
    path_length,
    scores_of,
    units,
    whole_blocks,
)


@triton.jit
def _nothing(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of no keys."""
    empty = tl.full((ROWS,), float("-inf"), tl.float32)
    return tl.zeros((ROWS, COLUMNS), tl.float32), empty, tl.zeros((ROWS,), tl.float32)


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


@triton.jit
def _blocks(length, num_slots, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks that splits consist of: the first that a row sees, the first that ends behind some row's last but LAST,
    the first that no row sees."""
    end = tl.cdiv(tl.maximum(tl.minimum(length, length + num_slots - LAST), 0), BLOCK_N)
    return first_key(length, WINDOW, CHUNK) // BLOCK_N, whole_blocks(length, BLOCK_N), end


@triton.jit
def _split(slot, width, begin, end, BLOCK_N: tl.constexpr):
    """(first block, end) of the split that has this slot, where splits are `width` units wide."""
    blocks = width * (UNIT // BLOCK_N)
    first = (begin // blocks + slot) * blocks
    return tl.maximum(first, begin), tl.minimum(first + blocks, end)


@triton.jit
def _finish(
    out_ptr, sinks_ptr, sequence, query, head, num_queries, num_heads, acc, peak, total, mask, d, D: tl.constexpr
):
    """Store rows of which all keys are added up."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=mask, other=0.0).to(tl.float32) * LOG2E
        acc, peak, total = add(acc, peak, total, tl.zeros_like(acc), sink, tl.full(sink.shape, 1.0, tl.float32))
    out = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    ptrs = out_ptr + ((sequence * num_queries + query) * num_heads + head)[:, None] * D + d[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_queries", "first", "slots"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ancestors_ptr, depths_ptr, sinks_ptr, out_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, slots, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ab, stride_at, stride_db,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr, ONE: tl.constexpr, FINE: tl.constexpr, UPCAST: tl.constexpr,
    NUM_STAGES: tl.constexpr, RESUME: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With FOLD one program for each tile, else for each slot, of the last keys BLOCK_D / COLUMNS: these come first, as
    they take longest. slots: of splits."""
    PARTS: tl.constexpr = 0 if FOLD else BLOCK_D // COLUMNS
    group, slot = tl.program_id(1).to(tl.int64), tl.program_id(2) - PARTS
    if PDL:  # in this order: the kernel that follows counts on what earlier ones wrote
        gdc_wait()
        gdc_launch_dependents()
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    num_slots = first + num_queries
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    begin, whole, end = _blocks(length, num_slots, WINDOW, CHUNK, BLOCK_N)
    narrowest, widest = units(length, WINDOW, CHUNK), units(length + num_slots - 1, WINDOW, CHUNK)
    if not FOLD and slot >= 0:
        low, high = _split(slot, narrowest, begin, end, BLOCK_N)
        if (high <= (tl.maximum(low, whole) if RESUME else low)) & (narrowest == widest):
            return

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // G, kv_head * G + row % G
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row_mask = query < num_queries
    at_row = sequence * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qt
    q = load(q_ptr + at_row[:, None] + d[None, :], row_mask, d, D, BLOCK_D, UPCAST)
    k_base = k_ptr + sequence * stride_kb + kv_head * stride_kh
    v_base = v_ptr + sequence * stride_vb + kv_head * stride_vh
    words = ancestors_ptr + sequence * stride_ab + query.to(tl.int64) * stride_at
    position = length + tl.maximum(path_length(words, num_slots, row_mask), 1) - 1
    logical = position
    if depths_ptr is not None:
        depths_ptr += sequence * stride_db
    if WINDOW > 0 or CHUNK > 0:
        logical = length + tl.load(depths_ptr + first + query, mask=row_mask, other=0).to(tl.int32)
    rows = (row_mask, position, logical, length)
    partials, at = (acc_ptr, peak_ptr, total_ptr), group * (slots + 1) * num_queries * G + row

    if FOLD or slot < 0:
        columns = d
        if not FOLD:
            columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        done_acc, done_peak, done_total = last_keys(
            q, k_base, v_base, stride_kl, stride_vl, words, depths_ptr, rows, num_slots, scale, d, columns,
            D, BLOCK_D, WINDOW, CHUNK, SOFTCAP, COLUMNS, BLOCK_T, ONE, FINE, UPCAST,
        )  # fmt: skip
        if not FOLD:
            _store(partials, at + slots * num_queries * G, done_acc, done_peak, done_total, row_mask, columns, D)
            return

    acc, peak, total = _nothing(BLOCK_M, BLOCK_D)
    width_of_row, last = units(position, WINDOW, CHUNK), tl.minimum(position - LAST, length - 1)
    for wider in range(0, 1 if FOLD else widest - narrowest + 1):
        low, high = begin, end
        if not FOLD:
            low, high = _split(slot, narrowest + wider, begin, end, BLOCK_N)
            acc, peak, total = _nothing(BLOCK_M, BLOCK_D)
        mask = row_mask & (width_of_row == narrowest + wider)
        if RESUME:
            acc, peak, total = _fetch(partials, at + slot * num_queries * G, mask & (low < whole), d, D)
            low = tl.maximum(low, whole)
        for ragged in tl.static_range(2):  # blocks of which rows see all, and of which they do not
            begins, ends = tl.maximum(low, whole) if ragged else low, high if ragged else tl.minimum(whole, high)
            for block in tl.range(begins, ends, num_stages=1 if ragged else NUM_STAGES):
                if FOLD and (block > low) & ((widest > narrowest) | (block % (narrowest * (UNIT // BLOCK_N)) == 0)):
                    ended = block % (width_of_row * (UNIT // BLOCK_N)) == 0
                    ended_peak = tl.where(ended, peak, float("-inf"))
                    done_acc, done_peak, done_total = add(done_acc, done_peak, done_total, acc, ended_peak, total)
                    peak = tl.where(ended, float("-inf"), peak)
                keys, live = block * BLOCK_N + n, None
                if ragged:
                    live = keys < length
                k = load(tile(k_base, block * BLOCK_N, n, stride_kl, d), live, d, D, BLOCK_D, UPCAST)
                v = load(tile(v_base, block * BLOCK_N, n, stride_vl, d), live, d, D, BLOCK_D, UPCAST)
                scores, factor = scores_of(q, k, scale, SOFTCAP, FINE)
                if ragged or WINDOW > 0 or CHUNK > 0:
                    visible = keys[None, :] <= last[:, None]
                    visible = in_reach(visible, logical[:, None], keys[None, :], WINDOW, CHUNK)
                    scores = tl.where(visible, scores, float("-inf"))
                acc, peak, total = add_block(acc, peak, total, scores, factor, v, FINE)
        if not FOLD and low < high:
            _store(partials, at + slot * num_queries * G, acc, peak, total, mask, d, D)
    if FOLD:
        acc, peak, total = add(done_acc, done_peak, done_total, acc, peak, total)
        _finish(
            out_ptr, sinks_ptr, sequence, query, head, num_queries, num_kv_heads * G, acc, peak, total, row_mask, d, D
        )


@triton.jit(do_not_specialize=["num_queries", "first"])
def combine_kernel(
    lengths_ptr, ancestors_ptr, sinks_ptr, out_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, stride_ab, stride_at,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Before the wait, what earlier kernels wrote is read from L2: this one starts when they are done, but caches of
    multiprocessors may still hold what was there before."""
    if PDL:
        gdc_launch_dependents()
    group = tl.program_id(1).to(tl.int64)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    num_slots = first + num_queries
    length = tl.load(lengths_ptr + sequence, cache_modifier=".cg").to(tl.int32)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head, d = row // G, kv_head * G + row % G, tl.arange(0, BLOCK_D)
    row_mask = query < num_queries
    words = ancestors_ptr + sequence * stride_ab + query.to(tl.int64) * stride_at
    position = length + tl.maximum(path_length(words, num_slots, row_mask), 1) - 1
    begin, _, end = _blocks(length, num_slots, WINDOW, CHUNK, BLOCK_N)
    width = units(position, WINDOW, CHUNK)
    if PDL:
        gdc_wait()
    partials, at = (acc_ptr, peak_ptr, total_ptr), group * (SLOTS + 1) * num_queries * G + row
    acc, peak, total = _fetch(partials, at + SLOTS * num_queries * G, row_mask, d, D)
    for slot in tl.static_range(SLOTS):
        low, high = _split(slot, width, begin, end, BLOCK_N)
        sums = _fetch(partials, at + slot * num_queries * G, row_mask & (low < high), d, D)
        acc, peak, total = add(acc, peak, total, sums[0], sums[1], sums[2])
    _finish(out_ptr, sinks_ptr, sequence, query, head, num_queries, num_kv_heads * G, acc, peak, total, row_mask, d, D)
