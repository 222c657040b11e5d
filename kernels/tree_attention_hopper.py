"""The prefix of `tree_attention` for many rows over a long cache, by specialized warps (Hopper, in Gluon).

    B sequences   T queries   Hq, Hkv heads   G = Hq / Hkv   L cache rows   D head size

The same pieces as in `tree_attention_order.py`: blocks of 64 keys by matrix instructions of 64 rows, each block summed
for itself and added to its split, a split for each program; so the same bits. A program takes 128 of the T * G rows
that share a KV head. One warp asks for K and V by TMA, six blocks deep, and two warpgroups attend, 64 rows each. Each
issues S(i) = q K(i)^T and P(i-1) V(i-1) together and waits for the first alone: the softmax of S(i) runs under the
second product, and each group's softmax under the other's products.

Bytes: K and V of the prefix, 4 Hkv length D per sequence in 16 bits, once from memory, by further tiles of 128 rows
from L2; partial results, 4 T Hq D a split. Flops: 4 Hq T length D, of whole tiles. Llama-3.1-8B, 60 nodes, 32,000 rows:
131 MB, 43 us at 3.08 TB/s; 34 GFLOP with the 16 rows of padding, 34 us at 990 TFLOP/s.

Left out: a peak that follows only large rises, warpgroups that take turns at the tensor cores: little or nothing came
of them. Short caches and few rows, which `tree_attention`'s own kernel serves at least as well; windows, chunks,
softcaps, fp32.

Gluon is experimental and changes between releases of Triton: `tree_attention` takes this file with those that it is
written for (3.6 and 3.7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .check import FLOAT32, described, number, tensor, whole, written
from .launch import device_guard
from .tree_attention_inputs import check_inputs
from .tree_attention_order import LOG2E, SPLITS, UNIT, path_length, units

BLOCK = gl.constexpr(64)  # cache rows
ROWS = gl.constexpr(128)  # packed query rows of a program
STAGES = gl.constexpr(6)  # 6 * 2 * 16 KB, and 32 KB of q
WIDTHS = gl.constexpr(2)  # of splits, that the rows of one tree may have
SLOTS = gl.constexpr(SPLITS.value + 1)  # of partial results, as `tree_attention` has them for long caches
FIRST, SECOND = gl.constexpr(0), gl.constexpr(64)  # rows of the two warpgroups
HEAD_DIMS = (128,)  # 64 compiles as well, and has not been measured
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def _fetch(desc, row, bar, buffer, pred):
    mbarrier.expect(bar, desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(desc, [row, 0], bar, buffer, pred=pred)


@gluon.jit
def _load(k_desc, v_desc, k_bufs, v_bufs, k_full, v_full, free, k_row, v_row, blocks):
    """K(0), K(1), V(0), K(2), V(1), ...; `free` of block i says that K(i) and V(i-1) have been read."""
    steps = blocks + 1
    if blocks == 0:
        steps = 0
    for i in range(steps):
        slot, phase, last = i % STAGES, (i // STAGES) & 1, (i + STAGES - 1) % STAGES
        mbarrier.wait(free.index(slot), phase ^ 1)
        _fetch(k_desc, k_row + i * BLOCK, k_full.index(slot), k_bufs.index(slot), i < blocks)
        _fetch(v_desc, v_row + (i - 1) * BLOCK, v_full.index(last), v_bufs.index(last), i > 0)


@gluon.jit
def _load_q(q_ptr, stride_h, stride_t, first_row, live_rows, G: gl.constexpr, D: gl.constexpr):
    """64 packed rows of q in shared memory, ready for wgmma."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    at = (row % G).to(gl.int64) * stride_h + (row // G).to(gl.int64) * stride_t
    live = (row < live_rows)[:, None] & (d < D)[None, :]
    q = gl.load(q_ptr + at[:, None] + d[None, :], mask=live, other=0.0)
    return gl.allocate_shared_memory(dtype, [64, D], shared, q)


@gluon.jit
def _weigh(scores, factor):
    """`tree_attention_order._weigh`, where every score counts."""
    peak = gl.ceil(gl.max(scores, 1) * factor)
    shift = peak[:, None] + gl.zeros_like(scores)
    weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + factor, -shift))
    return weights, peak, gl.sum((weights + 64.0) - 64.0, 1)


@gluon.jit
def _add(acc, peak, total, acc_b, peak_b, total_b, ROWS_O: gl.constexpr):
    """`tree_attention_order.add`, of blocks that are never empty."""
    both = gl.maximum(peak, peak_b)
    left, right = gl.exp2(peak - both), gl.exp2(peak_b - both)
    wide_left, wide_right = gl.convert_layout(left, ROWS_O), gl.convert_layout(right, ROWS_O)
    acc = gl.fma(acc, wide_left[:, None] + gl.zeros_like(acc), acc_b * wide_right[:, None])
    return acc, both, gl.fma(total, left, total_b * right)


@gluon.jit
def _attend(q, shared, rows, out, GROUP: gl.constexpr):
    """One warpgroup. An iteration issues S(i) and P(i-1) V(i-1); the softmax of S(i) runs under the second."""
    k_bufs, v_bufs, k_full, v_full, free, blocks = shared
    tile_row, live_rows, factor, words, stride_t, length, num_slots, width, narrowest, widest, G = rows
    acc_ptr, peak_ptr, total_ptr, base = out
    dtype: gl.constexpr = k_bufs.dtype
    D: gl.constexpr = k_bufs.shape[2]
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROWS_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    if blocks > 0:
        no_scores = gl.zeros([64, BLOCK], gl.float32, MMA_S)
        nothing = gl.zeros([64, D], gl.float32, MMA_O)
        peak = gl.full([64], float("-inf"), gl.float32, ROWS_S)
        total = gl.full([64], 0.0, gl.float32, ROWS_S)
        acc = nothing

        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(free.index(0))
        w, peak_b, total_b = _weigh(s, factor)
        p = gl.convert_layout(w.to(dtype), A)
        mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
        for i in range(1, blocks):
            slot = i % STAGES
            last, last_phase = (i - 1) % STAGES, ((i - 1) // STAGES) & 1
            s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            acc_b = warpgroup_mma(p, v_bufs.index(last), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            w, next_peak, next_total = _weigh(s, factor)
            # This wait, a loop, also keeps ptxas from moving the softmax behind the wait for P V, which is next.
            mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
            acc_b, p = warpgroup_mma_wait(0, deps=(acc_b, p))
            mbarrier.arrive(free.index(slot))
            acc, peak, total = _add(acc, peak, total, acc_b, peak_b, total_b, ROWS_O)
            peak_b, total_b = next_peak, next_total
            p = gl.convert_layout(w.to(dtype), A)
        last, last_phase = (blocks - 1) % STAGES, ((blocks - 1) // STAGES) & 1
        mbarrier.wait(v_full.index(last), last_phase)
        acc_b = warpgroup_mma(p, v_bufs.index(last), nothing, use_acc=False, is_async=True)
        acc_b, p = warpgroup_mma_wait(0, deps=(acc_b, p))
        acc, peak, total = _add(acc, peak, total, acc_b, peak_b, total_b, ROWS_O)

        out_row = tile_row + GROUP + gl.arange(0, 64, ROWS_O)
        inside = out_row < live_rows
        if widest > narrowest:
            position = length + path_length(words + (out_row // G).to(gl.int64) * stride_t, num_slots, inside) - 1
            inside = inside & (units(position, 0, 0) == width)
        d = gl.arange(0, D, gl.SliceLayout(0, MMA_O))
        gl.store(peak_ptr + base + out_row, gl.convert_layout(peak, ROWS_O), mask=inside)
        gl.store(total_ptr + base + out_row, gl.convert_layout(total, ROWS_O), mask=inside)
        at = (base + out_row)[:, None] * D + d[None, :]
        gl.store(acc_ptr + at, acc, mask=inside[:, None] & (d < D)[None, :])


@gluon.jit(do_not_specialize=["num_queries", "num_kv_heads", "first", "stride_ab", "stride_at"])
def _attend_hopper_kernel(
    q_ptr, k_desc, v_desc, lengths_ptr, ancestors_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, factor,
    stride_qb, stride_qh, stride_qt, rows_kb, rows_kh, rows_vb, rows_vh, stride_ab, stride_at,
    G: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:  # in this order: the kernel that follows reads q, k and v before it waits for this one
        gdc_wait()
        gdc_launch_dependents()
    D: gl.constexpr = k_desc.block_type.shape[1]
    slot, tile_row, group = gl.program_id(0), gl.program_id(1) * ROWS, gl.program_id(2)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    length = gl.load(lengths_ptr + sequence).to(gl.int32)
    num_slots, live_rows = first + num_queries, num_queries * G
    # As in `prefix_kernel`: a second set of programs where the rows' positions have two widths of splits.
    widest = units(length + num_slots - 1, 0, 0)
    narrowest = units(length - 1, 0, 0)
    width = narrowest + slot // SPLITS
    slot = slot % SPLITS
    split = width * (UNIT // BLOCK)
    begin = slot * split
    blocks = gl.maximum(gl.minimum(split, length // BLOCK - begin), 0)
    if width > widest:
        blocks = blocks * 0
    begin = begin * BLOCK

    wide = sequence.to(gl.int64)
    q_ptr += wide * stride_qb + (kv_head * G).to(gl.int64) * stride_qh
    loaded = live_rows
    if blocks == 0:  # nothing to do; what follows still runs, as warps must part and end together
        loaded = 0
    q_first = _load_q(q_ptr, stride_qh, stride_qt, tile_row, loaded, G, D)
    q_second = _load_q(q_ptr, stride_qh, stride_qt, tile_row + 64, loaded, G, D)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK, D], v_desc.layout)
    k_full, v_full, free = _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 2)
    fence_async_shared()
    k_row = sequence * rows_kb + kv_head * rows_kh + begin
    v_row = sequence * rows_vb + kv_head * rows_vh + begin
    base = (group.to(gl.int64) * SLOTS + slot) * live_rows
    shared = (k_bufs, v_bufs, k_full, v_full, free, blocks)
    words = ancestors_ptr + wide * stride_ab
    rows = (tile_row, live_rows, factor, words, stride_at, length, num_slots, width, narrowest, widest, G)
    out = (acc_ptr, peak_ptr, total_ptr, base)
    gl.warp_specialize([
        (_attend, (q_first, shared, rows, out, FIRST)),
        (_attend, (q_second, shared, rows, out, SECOND)),
        (_load, (k_desc, v_desc, k_bufs, v_bufs, k_full, v_full, free, k_row, v_row, blocks)),
    ], [4, 1], [240, 24])  # fmt: skip


def is_hopper(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of sequence, head and row of x [B, Hkv, L, D]; 0 for the first two where there is but one."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0, x.stride(2)


def can_fetch(x: Tensor) -> bool:
    """Whether the rows of x [B, Hkv, L > 1, D] are rows of one matrix, aligned as TMA wants them."""
    by_sequence, by_head, by_row = _strides(x)
    aligned = by_row * x.element_size() % 16 == x.data_ptr() % 16 == 0
    return by_row > 0 and aligned and by_sequence % by_row == by_head % by_row == 0


def _matrix(x: Tensor) -> tuple[TensorDescriptor, int, int]:
    """All that x [B, Hkv, L, D] views as rows of D, fetched by blocks; rows from a sequence and a head to the next."""
    (num_sequences, num_heads, num_rows, head_dim), (by_sequence, by_head, by_row) = x.shape, _strides(x)
    by_sequence, by_head = by_sequence // by_row, by_head // by_row
    height = (num_sequences - 1) * by_sequence + (num_heads - 1) * by_head + num_rows
    block = [BLOCK.value, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x.dtype])
    return TensorDescriptor(x, [height, head_dim], [by_row, 1], block, layout), by_sequence, by_head


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, acc: Tensor, peak: Tensor, total: Tensor, *,
    scale: float, first: int, **launch: Any,
) -> None:  # fmt: skip
    """The sum of every split's whole blocks of the prefix into acc [B Hkv, 17, T G, D], peak, total [B Hkv, 17, T G],
    all fp32.

    The rest as for `tree_attention`, with q, k and v in 16 bits and K and V that `can_fetch`. Splits without a whole
    block write nothing, nor do those that are not as wide as the row's.
    """
    first, scale = whole("first", first), number("scale", scale)
    check_inputs(q, k, v, lengths, ancestors, first, tuple(TYPES))
    (num_sequences, num_heads, num_queries, head_dim), num_kv_heads = q.shape, k.shape[1]
    if head_dim not in HEAD_DIMS or not is_hopper(q.device):
        raise ValueError(f"q is {described(q)}; expected a head size D of {HEAD_DIMS} and a Hopper GPU")
    if first + num_queries > SPLITS.value * UNIT.value:
        raise ValueError(f"first + T is {first + num_queries}; expected at most {SPLITS.value * UNIT.value} tree slots")
    if k.shape[2] < 2 or not can_fetch(k) or not can_fetch(v):
        raise ValueError(f"k is {described(k)}, v {described(v)}; expected rows of one matrix, aligned to 16 bytes")
    groups, packed_rows = num_sequences * num_kv_heads, num_queries * num_heads // num_kv_heads
    of_sums, near = (groups, SLOTS.value, packed_rows), ("q", q)
    tensor("acc", acc, "B*Hkv splits T*G D", FLOAT32, (*of_sums, head_dim), near=near)
    tensor("peak", peak, "B*Hkv splits T*G", FLOAT32, of_sums, near=("acc", acc))
    tensor("total", total, "B*Hkv splits T*G", FLOAT32, of_sums, near=("acc", acc))
    written(
        [("acc", acc), ("peak", peak), ("total", total)],
        [near, ("k", k), ("v", v), ("lengths", lengths), ("ancestors", ancestors)],
    )
    tiles = -(-packed_rows // ROWS.value)
    (keys, *rows_k), (values, *rows_v) = _matrix(k), _matrix(v)
    with device_guard(q):
        _attend_hopper_kernel[(WIDTHS.value * SPLITS.value, tiles, groups)](
            q, keys, values, lengths, ancestors, acc, peak, total,
            num_queries, num_kv_heads, first, scale * LOG2E.value,
            *q.stride()[:3], *rows_k, *rows_v, *ancestors.stride()[:2],
            G=num_heads // num_kv_heads, num_warps=4, maxnreg=168, enable_fp_fusion=False, **launch,
        )  # fmt: skip
