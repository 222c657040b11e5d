"""Attention of tree nodes over prefix and tree: the kernel of the verify pass and of every draft level.

    out[b, i, h] = sum_n p[n] v[b, h // G, n],   p = softmax over the visible n of  scale * q[b, h, i] . k[b, h // G, n]

A cache row n < lengths[b] is prefix and visible to all; row lengths[b] + j holds tree slot j, visible to query i if bit
j of `ancestors[b, i]` is set. Sliding windows and chunks compare logical positions: n in the prefix, lengths[b] +
depths[b, j] in the tree. A softcap bends the scores before the mask; a sink is one more logit of the denominator,
without a value.

    B sequences   T queries   Hq, Hkv heads   G = Hq / Hkv   L cache rows   D head size   W mask words   N tree slots

Bytes: K and V of the live rows, 2 Hkv (length + first + T) D per sequence, plus q and out, 2 T Hq D. Llama-3.1-8B with
2,048 rows in bf16: 8.4 MB per layer, 2.7 us at 3.08 TB/s (88 us for 32 layers). With 60 nodes the arithmetic weighs as
much: 256 rows of a tile against one KV head are 256 flops a byte, 790 TFLOP/s at 3.08 TB/s. The T * G rows that share a
KV head are packed into matrix tiles; each tile reads K and V once, all but the first from L2. The live rows are cut
into a number of splits that the grid fixes, so that a captured graph fits every length: shares grow with the length,
splits without a share leave at once. Each split leaves fp32 partials (4 T Hq D bytes, within L2) that a second kernel
combines in order. A row does not depend on what the other rows hold, but its rounding does on how many there are: one
query wants twice the splits of 60.

Many rows over a long cache take `tree_attention_hopper` for the splits' partials, on the GPUs that it is for. It takes
the same splits and leaves the same partials, over live rows cut from row 0 on.

Left out: fp8 caches, different head sizes of K and V, combining inside the first kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import FLOATS, number, whole
from .launch import device_guard, resources, upcast, use_triton
from .overlap import after_earlier_kernels, dependent_launch
from .tree_attention_inputs import check_inputs, check_options
from .tree_attention_ref import tree_attention_ref

# Gluon is experimental: other releases of Triton use this file's kernel only.
HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7."))
if HAS_GLUON:
    from . import tree_attention_hopper as hopper

LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How a launch cuts its work: query rows and cache rows per step, warps, pipeline stages, splits of the cache."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int


# (bytes an element, padded head size) -> (most query rows, cache rows), for Hopper. fp32 dots run on the CUDA cores
# with operands in registers. Candidates for re-tuning: rows 16..128, cache rows 16..64 (dividing 64), stages 2..4.
TILES = {
    (2, 16): (128, 64), (2, 32): (128, 64), (2, 64): (128, 64), (2, 128): (128, 64), (2, 256): (64, 64),
    (4, 16): (32, 32), (4, 32): (32, 32), (4, 64): (32, 32), (4, 128): (32, 16), (4, 256): (16, 16),
}  # fmt: skip
MAX_SPLITS = 64  # the combine kernel holds one partial of every split
LONG_CACHE = 4096  # rows from which on `tree_attention_hopper` attends, and this file's kernel does not start early


def _resources(device: torch.device) -> tuple[int, int]:
    """As `launch.resources`; interpreted, of a GPU with few multiprocessors, for few programs."""
    return resources(device) if device.type == "cuda" else (8, 232448)


def _tile(q: Tensor, k: Tensor) -> Tile:
    """As many splits as fill the GPU once, as many stages as fit; smaller GPUs also take fewer query rows."""
    num_sms, shared_memory = _resources(q.device)
    num_sequences, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_rows = k.shape[1], k.shape[2]
    block_d, size = _padded(head_dim), q.element_size()
    packed_rows = num_queries * num_heads // num_kv_heads
    if (size, block_d) not in TILES:
        raise ValueError(f"q has head size D = {head_dim}; expected at most 256")
    most_rows, block_n = TILES[size, block_d]
    most_rows = min(most_rows, 128 if shared_memory > 160_000 else 64)
    block_m = min(most_rows, max(16, triton.next_power_of_2(packed_rows)))
    num_stages = (shared_memory - 4096 - block_m * block_d * size) // (2 * block_n * block_d * size)
    programs = triton.cdiv(packed_rows, block_m) * num_sequences * num_kv_heads
    num_splits = min(max(1, num_sms // programs), triton.cdiv(num_rows, block_n), MAX_SPLITS)
    num_warps = 8 if size == 4 or block_m == 128 else 4
    return Tile(block_m, block_n, num_warps, min(3, max(1, num_stages)), num_splits)


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _by_hopper(q: Tensor, k: Tensor, v: Tensor, other: float) -> bool:
    """Whether `tree_attention_hopper` attends; `other` is not 0 where a window, a chunk or a softcap is asked for."""
    (_, num_heads, num_queries, head_dim), (_, num_kv_heads, num_rows, _) = q.shape, k.shape
    if not HAS_GLUON or not hopper.is_hopper(q.device):
        return False
    fits = q.dtype in hopper.TYPES and head_dim in hopper.HEAD_DIMS and hopper.can_fetch(k) and hopper.can_fetch(v)
    return fits and not other and num_rows >= LONG_CACHE and num_queries * num_heads // num_kv_heads > 64


@triton.jit
def _plan(
    length, num_slots, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """The first prefix row that any query sees, tiles of the prefix, tiles in all, tiles per split.

    JOINED: tiles run on from the prefix into the tree, as `tree_attention_hopper` cuts them.
    """
    begin = length * 0
    if WINDOW > 0:
        begin = tl.maximum(begin, length - WINDOW + 1)
    if CHUNK > 0:
        begin = tl.maximum(begin, length // CHUNK * CHUNK)
    prefix_tiles = tl.cdiv(length - begin, BLOCK_N)
    num_tiles = tl.cdiv(length + num_slots, BLOCK_N) if JOINED else prefix_tiles + tl.cdiv(num_slots, BLOCK_N)
    return begin, prefix_tiles, num_tiles, tl.cdiv(num_tiles, SPLITS)


@triton.jit
def _tanh(x):
    """Accurate near 0, where softcapped scores live and the exponential form cancels."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _in_reach(visible, query_positions, key_positions, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    if WINDOW > 0:
        visible = visible & (query_positions[:, None] - key_positions < WINDOW)
    if CHUNK > 0:
        visible = visible & (query_positions[:, None] // CHUNK == key_positions // CHUNK)
    return visible


@triton.jit
def _load(ptrs, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of q, k or v; `live` [rows], or None where all of them are."""
    if live is not None:
        x = tl.load(ptrs, mask=live[:, None] & (d < D), other=0.0)
    elif D == BLOCK_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _absorb(q, k, v, visible, acc, peak, total, scale, SOFTCAP: tl.constexpr):
    """One step of the running softmax, in base 2: `peak` and `total` are those of scale * log2(e) * score."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale * LOG2E
    if SOFTCAP > 0:
        scores = _tanh(scores * (scale / SOFTCAP))
        factor = SOFTCAP * LOG2E
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that have seen nothing yet
    weights = tl.exp2(scores * factor - shift[:, None])
    decay = tl.exp2(peak - shift)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_queries", "first"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ancestors_ptr, depths_ptr, sinks_ptr, out_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ab, stride_at, stride_db,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    split, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    num_slots = first + num_queries
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    begin, prefix_tiles, num_tiles, share = _plan(length, num_slots, WINDOW, CHUNK, SPLITS, BLOCK_N, False)
    low, high = split * share, tl.minimum((split + 1) * share, num_tiles)
    if low >= high:
        return
    full = tl.minimum(high, (length - begin) // BLOCK_N)

    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // G, kv_head * G + row % G
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    row_mask = query < num_queries
    q_ptrs = q_ptr + (sequence * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qt)[:, None] + d
    q = _load(q_ptrs, row_mask, d, D, BLOCK_D, UPCAST)
    k_base = k_ptr + sequence * stride_kb + kv_head * stride_kh + d
    v_base = v_ptr + sequence * stride_vb + kv_head * stride_vh + d
    depth_base, query_positions = depths_ptr, row
    if WINDOW > 0 or CHUNK > 0:
        depth_base += sequence * stride_db
        query_positions = length + tl.load(depth_base + first + query, mask=row_mask, other=0).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    for tile in range(low, full):
        rows = begin + tile * BLOCK_N + n
        k = _load(k_base + rows.to(tl.int64)[:, None] * stride_kl, None, d, D, BLOCK_D, UPCAST)
        v = _load(v_base + rows.to(tl.int64)[:, None] * stride_vl, None, d, D, BLOCK_D, UPCAST)
        visible = None
        if WINDOW > 0 or CHUNK > 0:
            visible = _in_reach(row_mask[:, None], query_positions, rows[None, :], WINDOW, CHUNK)
        acc, peak, total = _absorb(q, k, v, visible, acc, peak, total, scale, SOFTCAP)

    # What is left: a ragged tile at the end of the prefix, and the tree.
    words_base = ancestors_ptr + sequence * stride_ab + query.to(tl.int64) * stride_at
    for tile in tl.range(tl.maximum(low, full), high, num_stages=1):
        in_tree = tile >= prefix_tiles
        slots = (tile - prefix_tiles) * BLOCK_N + n
        rows = tl.where(in_tree, length + slots, begin + tile * BLOCK_N + n)
        live = rows < tl.where(in_tree, length + num_slots, length)
        k = _load(k_base + rows.to(tl.int64)[:, None] * stride_kl, live, d, D, BLOCK_D, UPCAST)
        v = _load(v_base + rows.to(tl.int64)[:, None] * stride_vl, live, d, D, BLOCK_D, UPCAST)
        # A tile starts at a multiple of BLOCK_N, which divides 64: its bits lie in one word. All of the prefix is seen.
        # Masks say in_tree element by element: Triton 3.9's interpreter takes no scalar condition in a mask.
        of_rows = row_mask & (tl.zeros_like(query) + tile >= prefix_tiles)
        words = tl.load(words_base + (tile - prefix_tiles) * BLOCK_N // 64, mask=of_rows, other=-1)
        visible = (((words[:, None] >> (slots & 63)[None, :].to(tl.int64)) & 1) == 1) & live[None, :]
        if WINDOW > 0 or CHUNK > 0:
            of_slots = live & (tl.zeros_like(n) + tile >= prefix_tiles)
            depths = tl.load(depth_base + slots, mask=of_slots, other=0).to(tl.int32)
            positions = tl.where(in_tree, length + depths, rows)
            visible = _in_reach(visible, query_positions, positions[None, :], WINDOW, CHUNK)
        acc, peak, total = _absorb(q, k, v, visible, acc, peak, total, scale, SOFTCAP)

    num_packed = num_queries * G
    if SPLITS == 1:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
            shift = tl.maximum(peak, sink)
            decay = tl.exp2(peak - shift)
            acc, total = acc * decay[:, None], total * decay + tl.exp2(sink - shift)
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_row = (sequence * num_queries + query) * num_kv_heads * G + head
        out_ptrs = out_ptr + out_row[:, None] * D + d
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (d < D))
    else:
        partial = (group * SPLITS + split) * num_packed + row
        tl.store(peak_ptr + partial, peak, mask=row_mask)
        tl.store(total_ptr + partial, total, mask=row_mask)
        tl.store(acc_ptr + partial[:, None] * D + d, acc, mask=row_mask[:, None] & (d < D))


@triton.jit(do_not_specialize=["num_queries", "first"])
def _combine_kernel(
    acc_ptr, peak_ptr, total_ptr, lengths_ptr, sinks_ptr, out_ptr, num_queries, num_kv_heads, first,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, JOINED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, head = group // num_kv_heads, group % num_kv_heads * G + row % G
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    _, _, num_tiles, share = _plan(length, first + num_queries, WINDOW, CHUNK, SPLITS, BLOCK_N, JOINED)
    split, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    ran = split * share < num_tiles  # the others left without writing
    partial = (group * SPLITS + split) * num_queries * G + row
    peaks = tl.load(peak_ptr + partial, mask=ran, other=float("-inf"))
    totals = tl.load(total_ptr + partial, mask=ran, other=0.0)
    acc = tl.load(acc_ptr + partial[:, None] * D + d, mask=ran[:, None] & (d < D), other=0.0)
    shift, sink = tl.max(peaks, 0), float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        shift = tl.maximum(shift, sink)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    weights = tl.exp2(peaks - shift)
    total = tl.sum(totals * weights, 0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - shift)
    out = tl.sum(acc * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_row = (sequence * num_queries + row // G) * num_kv_heads * G + head
    tl.store(out_ptr + out_row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, *, scale: float, depths: Tensor | None = None,
    first: int = 0, window: int = 0, chunk: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of T tree nodes over the prefix and the tree slots that they see.

    q [B, Hq, T, D] of any strides, row i is tree slot first + i; k, v [B, Hkv, L, D], views of a slab (all three with a
    contiguous last dimension); lengths [B] prefix rows; ancestors [B, T, W] int64 bits of the visible slots; scale > 0;
    depths [B, N] of the slots, needed by `window` (keys less than so many positions back) and `chunk` (keys of one
    chunk); window, chunk, softcap: 0 = off; sinks [Hq]. Rows from lengths[b] + first + T on do not count, whatever they
    hold. Returns [B, T, Hq, D], contiguous; a query that sees nothing gets zeros.
    """
    first, window, chunk = whole("first", first), whole("window", window), whole("chunk", chunk)
    scale, softcap = number("scale", scale), number("softcap", softcap, or_zero=True)
    check_inputs(q, k, v, lengths, ancestors, first, FLOATS)
    check_options(q, first, depths, bool(window or chunk), sinks)
    if not use_triton(q, k, v, sinks):
        return tree_attention_ref(
            q, k, v, lengths, ancestors, scale=scale, depths=depths, first=first, window=window, chunk=chunk,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
    num_sequences, num_heads, num_queries, head_dim = q.shape
    num_kv_heads = k.shape[1]
    tile = _tile(q, k)
    packed_rows = num_queries * num_heads // num_kv_heads
    groups, splits = num_sequences * num_kv_heads, tile.num_splits
    out = q.new_empty(num_sequences, num_queries, num_heads, head_dim)
    by_hopper = _by_hopper(q, k, v, window or chunk or softcap)
    in_parts = by_hopper or splits > 1
    partials: Any = (None, None, None)  # acc, peak, total
    if in_parts:
        acc = q.new_empty(groups, splits, packed_rows, head_dim, dtype=torch.float32)
        partials = (acc, *q.new_empty(2, groups, splits, packed_rows, dtype=torch.float32))
    # Programs that start early find some multiprocessors taken and crowd on the rest: a long cache does not forgive it.
    overlap = dependent_launch(q.device) if by_hopper or k.shape[2] < LONG_CACHE else {"PDL": False}
    shared = dict(
        G=num_heads // num_kv_heads, D=head_dim, BLOCK_D=_padded(head_dim),
        WINDOW=window, CHUNK=chunk, SPLITS=splits, BLOCK_N=hopper.UNIT.value if by_hopper else tile.block_n, **overlap,
    )  # fmt: skip
    with device_guard(q):
        if by_hopper:
            hopper.attend(q, k, v, lengths, ancestors, *partials, scale=scale, first=first, **overlap)
        else:
            _attend_kernel[(splits, triton.cdiv(packed_rows, tile.block_m), groups)](
                q, k, v, lengths, ancestors, depths, sinks, out, *partials,
                num_queries, num_kv_heads, first, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *ancestors.stride()[:2], 0 if depths is None else depths.stride(0),
                **shared, SOFTCAP=softcap, BLOCK_M=tile.block_m, UPCAST=upcast(q.dtype),
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if in_parts:
            _combine_kernel[(packed_rows, groups)](
                *partials, lengths, sinks, out, num_queries, num_kv_heads, first,
                **shared, JOINED=by_hopper, BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=2,
            )  # fmt: skip
    return out
