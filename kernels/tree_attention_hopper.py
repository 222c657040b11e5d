"""The prefix of `tree_attention` for many rows over a long cache, by specialized warps (Hopper, in Gluon).

    B sequences   T queries   Hq, Hkv heads   G = Hq / Hkv   L cache rows   D head size

The same pieces as in `tree_attention_order.py`: splits, each one chain of matrix instructions of 64 rows over blocks of
64 keys; so the same bits. It takes the blocks of which every row of the tree sees all among its splits' keys, and
leaves each split's sums, from which `attend_kernel` goes on. A program takes 128 of the T * G rows of a KV head, and as
many splits as let all programs run at once. One warp asks for K and V by TMA, six blocks deep, and two warpgroups
attend, 64 rows each. The softmax of S(i) = q K(i)^T runs under P(i-1) V(i-1), the rescaling of that under S(i+1).

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
from .launch import device_guard, resources
from .tree_attention_inputs import check_inputs
from .tree_attention_order import LOG2E, SPLITS, UNIT, path_length, units, whole_blocks

BLOCK = gl.constexpr(64)  # cache rows
ROWS = gl.constexpr(128)  # packed query rows of a program
STAGES = gl.constexpr(6)  # 6 * 2 * 16 KB, and 32 KB of q
SLOTS = gl.constexpr(SPLITS.value + 2)  # of partial results: see `tree_attention`
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
def _split(at, widths, job, EACH: gl.constexpr):
    """(its width in units, its slot, its first block, their number) of one of the splits that a program takes: EACH of
    them, where the rows' positions have several widths of splits as many of each."""
    program, length = at
    width, slot = widths[0] + job // EACH, program * EACH + job % EACH
    split = width * (UNIT // BLOCK)
    begin = slot * split
    return width, slot, begin, gl.maximum(gl.minimum(split, whole_blocks(length, BLOCK) - begin), 0)


@gluon.jit
def _load(k_desc, v_desc, bufs, bars, k_row, v_row, at, widths, EACH: gl.constexpr):
    """K(0), K(1), V(0), K(2), V(1), ...; `free` of block i says that K(i) and V(i-1) have been read."""
    k_bufs, v_bufs = bufs
    k_full, v_full, free = bars
    done = 0
    for job in range((widths[1] - widths[0] + 1) * EACH):
        _, _, begin, blocks = _split(at, widths, job, EACH)
        for i in range(gl.where(blocks > 0, blocks + 1, 0)):
            g = done + i
            slot, last, row = g % STAGES, (g + STAGES - 1) % STAGES, (begin + i) * BLOCK
            mbarrier.wait(free.index(slot), ((g // STAGES) & 1) ^ 1)
            _fetch(k_desc, k_row + row, k_full.index(slot), k_bufs.index(slot), i < blocks)
            _fetch(v_desc, v_row + row - BLOCK, v_full.index(last), v_bufs.index(last), i > 0)
        done += blocks


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
def _weigh(scores, peak, factor, DTYPE: gl.constexpr, A: gl.constexpr):
    """As `tree_attention_order.add_block` weighs, where every score counts: (weights for the second product, their sum,
    the new peak, what the sums so far are multiplied by)."""
    risen = gl.maximum(peak, gl.max(scores, 1) * factor)
    shift = risen[:, None] + gl.zeros_like(scores)
    weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + factor, -shift))
    # How many 2^-17 a weight is: what it adds to the bits of 64.0, 0x42800000, and 64 of these are -0x60000000.
    steps = gl.sum((weights + 64.0).to(gl.int32, bitcast=True), 1) + 0x60000000
    return gl.convert_layout(weights.to(DTYPE), A), steps.to(gl.float32) * 2.0**-17, risen, gl.exp2(peak - risen)


@gluon.jit
def _scores(q, k_bufs, k_full, i, blocks, MMA_S: gl.constexpr):
    """S(i), under way; of one block too many, whatever lies there."""
    slot = i % STAGES
    mbarrier.wait(k_full.index(slot), (i // STAGES) & 1, pred=blocks)
    nothing = gl.zeros([64, BLOCK], gl.float32, MMA_S)
    return warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _values(p, acc, v_bufs, v_full, i):
    """P(i) V(i) onto acc, under way."""
    slot = i % STAGES
    mbarrier.wait(v_full.index(slot), (i // STAGES) & 1)
    return warpgroup_mma(p, v_bufs.index(slot), acc, is_async=True)


@gluon.jit
def _attend(q, bufs, bars, at, widths, rows, out, GROUP: gl.constexpr, EACH: gl.constexpr):
    """One warpgroup. The softmax of S(i) runs under P(i-1) V(i-1), the rescaling of that under S(i+1)."""
    k_bufs, v_bufs = bufs
    k_full, v_full, free = bars
    tile_row, live_rows, factor, words, stride_t, num_slots, G = rows
    acc_ptr, peak_ptr, total_ptr, base = out
    dtype: gl.constexpr = k_bufs.dtype
    D: gl.constexpr = k_bufs.shape[2]
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROWS_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    done = 0
    for job in range((widths[1] - widths[0] + 1) * EACH):
        width, slot, _, blocks = _split(at, widths, job, EACH)
        if blocks > 0:
            peak = gl.full([64], float("-inf"), gl.float32, ROWS_S)
            acc = gl.zeros([64, D], gl.float32, MMA_O)
            end = done + blocks
            s = _scores(q, k_bufs, k_full, done, True, MMA_S)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(free.index(done % STAGES))
            p, total, peak, left = _weigh(s, peak, factor, dtype, A)
            s = _scores(q, k_bufs, k_full, done + 1, done + 1 < end, MMA_S)
            s = warpgroup_mma_wait(0, deps=(s,))
            for i in range(done + 1, end):
                acc = _values(p, acc, v_bufs, v_full, i - 1)
                next_p, block_total, peak, left = _weigh(s, peak, factor, dtype, A)
                # The wait for K(i+1), a loop, also keeps ptxas from moving the softmax behind the one for P V.
                s = _scores(q, k_bufs, k_full, i + 1, i + 1 < end, MMA_S)
                acc, p = warpgroup_mma_wait(1, deps=(acc, p))
                mbarrier.arrive(free.index(i % STAGES))
                acc, total, p = acc * gl.convert_layout(left, ROWS_O)[:, None], gl.fma(total, left, block_total), next_p
                s = warpgroup_mma_wait(0, deps=(s,))
            acc = _values(p, acc, v_bufs, v_full, end - 1)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))

            out_row = tile_row + GROUP + gl.arange(0, 64, ROWS_O)
            inside = out_row < live_rows
            if widths[1] > widths[0]:
                nodes = path_length(words + (out_row // G).to(gl.int64) * stride_t, num_slots, inside)
                inside = inside & (units(at[1] + gl.maximum(nodes, 1) - 1, 0, 0) == width)
            d = gl.arange(0, D, gl.SliceLayout(0, MMA_O))
            first = base + slot.to(gl.int64) * live_rows
            gl.store(peak_ptr + first + out_row, gl.convert_layout(peak, ROWS_O), mask=inside)
            gl.store(total_ptr + first + out_row, gl.convert_layout(total, ROWS_O), mask=inside)
            to = (first + out_row)[:, None] * D + d[None, :]
            gl.store(acc_ptr + to, acc, mask=inside[:, None] & (d < D)[None, :])
        done += blocks


@gluon.jit(do_not_specialize=["num_queries", "num_kv_heads", "first", "stride_ab", "stride_at"])
def _attend_hopper_kernel(
    q_ptr, k_desc, v_desc, lengths_ptr, ancestors_ptr, acc_ptr, peak_ptr, total_ptr,
    num_queries, num_kv_heads, first, factor,
    stride_qb, stride_qh, stride_qt, rows_kb, rows_kh, rows_vb, rows_vh, stride_ab, stride_at,
    G: gl.constexpr, EACH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:  # in this order: the kernel that follows reads q, k and v before it waits for this one
        gdc_wait()
        gdc_launch_dependents()
    D: gl.constexpr = k_desc.block_type.shape[1]
    program, tile_row, group = gl.program_id(0), gl.program_id(1) * ROWS, gl.program_id(2)
    sequence, kv_head = group // num_kv_heads, group % num_kv_heads
    length = gl.load(lengths_ptr + sequence).to(gl.int32)
    num_slots, live_rows = first + num_queries, num_queries * G
    at, widths = (program, length), (units(length, 0, 0), units(length + num_slots - 1, 0, 0))

    wide = sequence.to(gl.int64)
    q_ptr += wide * stride_qb + (kv_head * G).to(gl.int64) * stride_qh
    q_first = _load_q(q_ptr, stride_qh, stride_qt, tile_row, live_rows, G, D)
    q_second = _load_q(q_ptr, stride_qh, stride_qt, tile_row + 64, live_rows, G, D)
    bufs = (
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK, D], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK, D], v_desc.layout),
    )
    bars = _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 2)
    fence_async_shared()
    k_row, v_row = sequence * rows_kb + kv_head * rows_kh, sequence * rows_vb + kv_head * rows_vh
    base = group.to(gl.int64) * SLOTS * live_rows
    rows = (tile_row, live_rows, factor, ancestors_ptr + wide * stride_ab, stride_at, num_slots, G)
    out = (acc_ptr, peak_ptr, total_ptr, base)
    gl.warp_specialize([
        (_attend, (q_first, bufs, bars, at, widths, rows, out, FIRST, EACH)),
        (_attend, (q_second, bufs, bars, at, widths, rows, out, SECOND, EACH)),
        (_load, (k_desc, v_desc, bufs, bars, k_row, v_row, at, widths, EACH)),
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
    """The sums of every split's blocks of which all rows see all, into acc [B Hkv, 18, T G, D], peak, total [B Hkv, 18,
    T G], all fp32.

    The rest as for `tree_attention`, with q, k and v in 16 bits and K and V that `can_fetch`. Splits without such a
    block write nothing, nor do those that are not as wide as the row's.
    """
    first, scale = whole("first", first), number("scale", scale)
    check_inputs(q, k, v, lengths, ancestors, first, tuple(TYPES))
    (num_sequences, num_heads, num_queries, head_dim), num_kv_heads = q.shape, k.shape[1]
    if head_dim not in HEAD_DIMS or not is_hopper(q.device):
        raise ValueError(f"q is {described(q)}; expected a head size D of {HEAD_DIMS} and a Hopper GPU")
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
    each = 1  # splits of a program: all programs at once, as one fills a multiprocessor
    while each < SPLITS.value and SPLITS.value // each * tiles * groups > resources(q.device)[0]:
        each *= 2
    (keys, *rows_k), (values, *rows_v) = _matrix(k), _matrix(v)
    with device_guard(q):
        _attend_hopper_kernel[(SPLITS.value // each, tiles, groups)](
            q, keys, values, lengths, ancestors, acc, peak, total,
            num_queries, num_kv_heads, first, scale * LOG2E.value,
            *q.stride()[:3], *rows_k, *rows_v, *ancestors.stride()[:2],
            G=num_heads // num_kv_heads, EACH=each, num_warps=4, maxnreg=168, enable_fp_fusion=False, **launch,
        )  # fmt: skip
