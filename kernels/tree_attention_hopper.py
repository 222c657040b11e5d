"""`tree_attention` of many rows over a long cache, by specialized warps (Hopper, in Gluon): the splits' partials.

    B sequences   T queries   Hq, Hkv heads   G = Hq / Hkv   L cache rows   D head size   W mask words

Live rows of a sequence lie side by side: prefix, then tree. They are cut into units of 128, and a program takes a share
of the units for 128 of the T * G rows that share a KV head. One warp asks for K and V by TMA, three units deep, and two
warpgroups attend, 64 rows each. Each issues S(i) = q K(i)^T and P(i-1) V(i-1) together and waits for the first alone:
the softmax of S(i) runs under the second product, and each group's softmax under the other's products. Units past the
prefix take the masks in between; rows past the last live one have no weight, and their V is overwritten with zeros in
shared memory, as 0 * NaN is NaN.

Bytes: K and V of the live rows, 4 Hkv (length + first + T) D per sequence in 16 bits, once from memory, by further
tiles of 128 rows from L2. Flops: 4 Hq T (length + first + T) D, of whole tiles. Llama-3.1-8B, 60 nodes, 32,000 rows:
131 MB, 43 us at 3.08 TB/s; 34 GFLOP with the 16 rows of padding, 34 us at 990 TFLOP/s.

Left out: a peak that follows only large rises, warpgroups that take turns at the tensor cores, and combining in the
same launch: little or nothing came of them. Short caches and few rows, which `tree_attention`'s own kernel serves at
least as well; windows, chunks, softcaps, fp32.

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

UNIT = gl.constexpr(128)  # cache rows
ROWS = gl.constexpr(128)  # packed query rows of a program
STAGES = gl.constexpr(3)  # 3 * 2 * 32 KB, and 32 KB of q
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
def _load(k_desc, v_desc, k_bufs, v_bufs, k_full, v_full, free, k_row, v_row, units):
    """K(0), K(1), V(0), K(2), V(1), ...; `free` of unit i says that K(i) and V(i-1) have been read."""
    steps = units + 1
    if units == 0:
        steps = 0
    for i in range(steps):
        slot, phase, last = i % STAGES, (i // STAGES) & 1, (i + STAGES - 1) % STAGES
        mbarrier.wait(free.index(slot), phase ^ 1)
        _fetch(k_desc, k_row + i * UNIT, k_full.index(slot), k_bufs.index(slot), i < units)
        _fetch(v_desc, v_row + (i - 1) * UNIT, v_full.index(last), v_bufs.index(last), i > 0)


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
def _ones(count):
    """The lowest `count` of 64 bits, 0 to 64: two shifts, as one of 64 is not defined."""
    count = count.to(gl.int64)
    return ((1 << (count >> 1)) << (count - (count >> 1))) - 1


@gluon.jit
def _mask(scores, words, stride_t, num_words, row, live_rows, begin, length, end, G: gl.constexpr):
    """Scores of the unit that starts at cache row `begin`, -inf where a row does not see a column.

    Its 128 bits begin inside a word: three words are shifted into two. Bits of the prefix, left of the first word, are
    set, those of rows from `end` on are not.
    """
    word, shift = (begin - length) >> 6, ((begin - length) & 63).to(gl.int64)
    base = words + (row // G).to(gl.int64) * stride_t + word
    inside = row < live_rows
    w0 = gl.load(base, mask=inside & (word >= 0) & (word < num_words), other=gl.where(word < 0, -1, 0))
    w1 = gl.load(base + 1, mask=inside & (word >= -1) & (word + 1 < num_words), other=gl.where(word < -1, -1, 0))
    w2 = gl.load(base + 2, mask=inside & (word >= -2) & (word + 2 < num_words), other=0)
    low = ((w0 >> shift) & _ones(64 - shift)) | ((w1 << 1) << (63 - shift))
    high = ((w1 >> shift) & _ones(64 - shift)) | ((w2 << 1) << (63 - shift))
    low &= _ones(gl.minimum(end - begin, 64))
    high &= _ones(gl.maximum(gl.minimum(end - begin, 128) - 64, 0))
    column = gl.arange(0, UNIT, gl.SliceLayout(0, scores.type.layout))[None, :]
    left = gl.where(column < 32, low.to(gl.int32)[:, None], (low >> 32).to(gl.int32)[:, None])
    right = gl.where(column < 96, high.to(gl.int32)[:, None], (high >> 32).to(gl.int32)[:, None])
    visible = (gl.where(column < 64, left, right) & (1 << (column & 31))) != 0
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _soften(scores, peak, total, factor):
    """Weights of a unit in base 2, and what the sums before it are to be multiplied by."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * factor)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that have seen nothing yet
    weights = gl.exp2(scores * factor - shift[:, None])
    decay = gl.exp2(peak - shift)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _clear_rows(buffer, first):
    """Zeros from row `first` on. Both warpgroups do this, to the same effect."""
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    row = gl.arange(0, UNIT, gl.SliceLayout(1, layout))
    values = buffer.load(layout)
    buffer.store(gl.where((row < first)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _attend(q, shared, masks, out, GROUP: gl.constexpr, G: gl.constexpr):
    """One warpgroup. An iteration issues S(i) and P(i-1) V(i-1); the softmax of S(i) runs under the second."""
    k_bufs, v_bufs, k_full, v_full, free, units = shared
    words, stride_t, num_words, tile_row, live_rows, begin, length, end, factor = masks
    acc_ptr, peak_ptr, total_ptr, base = out
    dtype: gl.constexpr = k_bufs.dtype
    D: gl.constexpr = k_bufs.shape[2]
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNIT, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROWS_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    if units > 0:
        row = tile_row + GROUP + gl.arange(0, 64, ROWS_S)
        zeros = gl.zeros([64, UNIT], gl.float32, MMA_S)
        peak = gl.full([64], float("-inf"), gl.float32, ROWS_S)
        total = gl.full([64], 0.0, gl.float32, ROWS_S)
        acc = gl.zeros([64, D], gl.float32, MMA_O)

        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(free.index(0))
        if begin + UNIT > length:
            s = _mask(s, words, stride_t, num_words, row, live_rows, begin, length, end, G)
        w, decay, peak, total = _soften(s, peak, total, factor)
        p = gl.convert_layout(w.to(dtype), A)
        mbarrier.wait(k_full.index(1), 0, pred=units > 1)
        for i in range(1, units):
            slot = i % STAGES
            last, last_phase = (i - 1) % STAGES, ((i - 1) // STAGES) & 1
            s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            acc = warpgroup_mma(p, v_bufs.index(last), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            here = begin + i * UNIT
            if here + UNIT > length:
                s = _mask(s, words, stride_t, num_words, row, live_rows, here, length, end, G)
            w, decay, peak, total = _soften(s, peak, total, factor)
            # This wait, a loop, also keeps ptxas from moving the softmax behind the wait for P V, which is next.
            mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < units)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(free.index(slot))
            acc = acc * gl.convert_layout(decay, ROWS_O)[:, None]
            p = gl.convert_layout(w.to(dtype), A)
        last, last_phase = (units - 1) % STAGES, ((units - 1) // STAGES) & 1
        mbarrier.wait(v_full.index(last), last_phase)
        dead = end - begin - (units - 1) * UNIT  # first row past the live ones
        if dead < UNIT:
            _clear_rows(v_bufs.index(last), dead)
        acc = warpgroup_mma(p, v_bufs.index(last), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))

        out_row = tile_row + GROUP + gl.arange(0, 64, ROWS_O)
        inside = out_row < live_rows
        d = gl.arange(0, D, gl.SliceLayout(0, MMA_O))
        gl.store(peak_ptr + base + out_row, gl.convert_layout(peak, ROWS_O), mask=inside)
        gl.store(total_ptr + base + out_row, gl.convert_layout(total, ROWS_O), mask=inside)
        at = (base + out_row)[:, None] * D + d[None, :]
        gl.store(acc_ptr + at, acc, mask=inside[:, None] & (d < D)[None, :])


@gluon.jit(do_not_specialize=["num_queries", "num_kv_heads", "first", "num_words", "stride_ab", "stride_at"])
def _attend_hopper_kernel(
    q_ptr, k_desc, v_desc, lengths_ptr, ancestors_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, num_words, factor,
    stride_qb, stride_qh, stride_qt, rows_kb, rows_kh, rows_vb, rows_vh, stride_ab, stride_at,
    G: gl.constexpr, SPLITS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    D: gl.constexpr = k_desc.block_type.shape[1]
    split, tile_row, group = gl.program_id(0), gl.program_id(1) * ROWS, gl.program_id(2)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    length = gl.load(lengths_ptr + sequence).to(gl.int32)
    end, live_rows = length + first + num_queries, num_queries * G
    units = (end + UNIT - 1) // UNIT
    share = (units + SPLITS - 1) // SPLITS
    begin = split * share
    units = gl.maximum(gl.minimum(share, units - begin), 0)
    begin = begin * UNIT

    wide = sequence.to(gl.int64)
    q_ptr += wide * stride_qb + (kv_head * G).to(gl.int64) * stride_qh
    loaded = live_rows
    if units == 0:  # nothing to do; what follows still runs, as warps must part and end together
        loaded = 0
    q_first = _load_q(q_ptr, stride_qh, stride_qt, tile_row, loaded, G, D)
    q_second = _load_q(q_ptr, stride_qh, stride_qt, tile_row + 64, loaded, G, D)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, UNIT, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, UNIT, D], v_desc.layout)
    k_full, v_full, free = _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 2)
    fence_async_shared()
    k_row = sequence * rows_kb + kv_head * rows_kh + begin
    v_row = sequence * rows_vb + kv_head * rows_vh + begin
    base = (group.to(gl.int64) * SPLITS + split) * live_rows
    shared = (k_bufs, v_bufs, k_full, v_full, free, units)
    words = ancestors_ptr + wide * stride_ab
    masks = (words, stride_at, num_words, tile_row, live_rows, begin, length, end, factor)
    out = (acc_ptr, peak_ptr, total_ptr, base)
    gl.warp_specialize([
        (_attend, (q_first, shared, masks, out, FIRST, G)),
        (_attend, (q_second, shared, masks, out, SECOND, G)),
        (_load, (k_desc, v_desc, k_bufs, v_bufs, k_full, v_full, free, k_row, v_row, units)),
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
    """All that x [B, Hkv, L, D] views as rows of D, fetched by units; rows from a sequence and a head to the next."""
    (num_sequences, num_heads, num_rows, head_dim), (by_sequence, by_head, by_row) = x.shape, _strides(x)
    by_sequence, by_head = by_sequence // by_row, by_head // by_row
    height = (num_sequences - 1) * by_sequence + (num_heads - 1) * by_head + num_rows
    block = [UNIT.value, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x.dtype])
    return TensorDescriptor(x, [height, head_dim], [by_row, 1], block, layout), by_sequence, by_head


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, acc: Tensor, peak: Tensor, total: Tensor, *,
    scale: float, first: int, **launch: Any,
) -> None:  # fmt: skip
    """Partials of every split into acc [B Hkv, splits, T G, D], peak, total [B Hkv, splits, T G], all fp32.

    The rest as for `tree_attention`, with q, k and v in 16 bits and K and V that `can_fetch`. Splits take shares of
    ceil(units / splits) units of 128 live rows; those beyond the last unit write nothing.
    """
    first, scale = whole("first", first), number("scale", scale)
    check_inputs(q, k, v, lengths, ancestors, first, tuple(TYPES))
    (num_sequences, num_heads, num_queries, head_dim), num_kv_heads = q.shape, k.shape[1]
    if head_dim not in HEAD_DIMS or not is_hopper(q.device):
        raise ValueError(f"q is {described(q)}; expected a head size D of {HEAD_DIMS} and a Hopper GPU")
    if k.shape[2] < 2 or not can_fetch(k) or not can_fetch(v):
        raise ValueError(f"k is {described(k)}, v {described(v)}; expected rows of one matrix, aligned to 16 bytes")
    groups, packed_rows = num_sequences * num_kv_heads, num_queries * num_heads // num_kv_heads
    of_acc, near = (groups, None, packed_rows, head_dim), ("q", q)
    splits = tensor("acc", acc, "B*Hkv splits T*G D", FLOAT32, of_acc, near=near)[1]
    tensor("peak", peak, "B*Hkv splits T*G", FLOAT32, (groups, splits, packed_rows), near=("acc", acc))
    tensor("total", total, "B*Hkv splits T*G", FLOAT32, (groups, splits, packed_rows), near=("acc", acc))
    written(
        [("acc", acc), ("peak", peak), ("total", total)],
        [near, ("k", k), ("v", v), ("lengths", lengths), ("ancestors", ancestors)],
    )
    tiles = -(-packed_rows // ROWS.value)
    (keys, *rows_k), (values, *rows_v) = _matrix(k), _matrix(v)
    with device_guard(q):
        _attend_hopper_kernel[(splits, tiles, groups)](
            q, keys, values, lengths, ancestors, acc, peak, total,
            num_queries, num_kv_heads, first, ancestors.shape[2], scale * 1.4426950408889634,
            *q.stride()[:3], *rows_k, *rows_v, *ancestors.stride()[:2],
            G=num_heads // num_kv_heads, SPLITS=splits, num_warps=4, maxnreg=168, **launch,
        )  # fmt: skip
