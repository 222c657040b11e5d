"""The kernel of `packed.py` for Hopper, in Gluon: the weight by TMA into a deep ring, before the wait for x.

The same products in the same order as `packed_kernels.py`, K in tiles of 32 columns from left to right, so the same
bits. A program takes two tiles of the weight's rows in turns: one is made of its words while the matrix instructions
work on the other. GATED they are rows of gate and of up, which end in one thread.

The weight depends on no other kernel: its first STAGES steps are asked for before the wait for the kernels before,
which at 4 bits is all of `o` and of `qkv` of an 8B model. That hides most of what a launch costs. x follows after the
wait, and a further step takes the place of one that all warps have read.
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

from .packed_kernels import assembly
from .packed_layout import Packed, group_of_kernel, step_columns

WORDS = gl.constexpr(32)  # as in packed_layout.py
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.constexpr_function
def _factor_rows(STEP, GROUP, ZEROS):
    """Rows of factors that a step reads."""
    if GROUP == 0:
        return 0
    return max(1, STEP // (GROUP if ZEROS else 2 * GROUP))


@gluon.jit
def _fetch_weight(descs, bufs, bar, slot, row, step, pred, STEP: gl.constexpr, GROUP: gl.constexpr,
                  ZEROS: gl.constexpr):  # fmt: skip
    """A step of both tiles of the weight's rows, and its factors."""
    words_desc, factors_desc = descs
    words, factors = bufs
    tma.async_copy_global_to_shared(words_desc, [0, row, step * WORDS], bar, words.index(slot), pred=pred)
    if GROUP > 0:
        group = step * STEP // (GROUP if ZEROS else 2 * GROUP)
        tma.async_copy_global_to_shared(factors_desc, [0, group, row], bar, factors.index(slot), pred=pred)


@gluon.jit
def _twice(half):
    """The low 16 bits in both halves, of [N] as [N, 1]."""
    return ((half & 0xFFFF) * 0x10001)[:, None]


@gluon.jit
def _pair(factors, half: gl.constexpr, step, CODE: gl.constexpr, STEP: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
          GATED: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """(scale, offset) of tile CODE of a step, [N, 1], as `packed_kernels._factors`."""
    FACTORS: gl.constexpr = _factor_rows(STEP, GROUP, ZEROS)
    PER_ROW: gl.constexpr = GROUP if ZEROS else 2 * GROUP  # columns
    I: gl.constexpr = CODE * WORDS // PER_ROW
    PLACE: gl.constexpr = half * FACTORS + I if GATED else I * 2 + half
    pair = factors.index(PLACE).load(gl.SliceLayout(1, A))
    if ZEROS:
        return _twice(pair), _twice(pair >> 16)
    if STEP % (2 * GROUP) == 0:
        scale = _twice(pair >> (CODE * WORDS // GROUP % 2 * 16))
    else:
        scale = _twice(pair >> (step * STEP // GROUP % 2 * 16))
    return scale, scale


@gluon.jit
def _weights(words, scale, offset, CODE: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
             DTYPE: gl.constexpr):  # fmt: skip
    w = gl.inline_asm_elementwise(
        assembly(KIND, CODE, DTYPE == gl.bfloat16, GROUP > 0, ZEROS), "=r,r,r,r,r,r,r", [words, scale, offset],
        dtype=gl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    return w.to(DTYPE, bitcast=True)


@gluon.jit(do_not_specialize=["num_rows", "steps", "splits"])
def packed_hopper_kernel(
    x_desc, words_desc, factors_desc, factors_ptr, bias_ptr, out_ptr, num_rows, num_columns, all_rows, steps, splits,
    KIND: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """num_columns: of the output; all_rows: of the weight; steps: of a row of it. GROUP 0: one scale a row, fp32."""
    CODES: gl.constexpr = 8 if KIND == "int4" else 4
    STEP: gl.constexpr = CODES * WORDS
    DTYPE: gl.constexpr = x_desc.dtype
    HALF: gl.constexpr = 16 * gl.num_warps()
    M: gl.constexpr = x_desc.block_type.shape[0]
    FACTORS: gl.constexpr = _factor_rows(STEP, GROUP, ZEROS)
    BYTES: gl.constexpr = 2 * HALF * 4 * (WORDS + FACTORS) + M * STEP * 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    if PDL:
        gdc_launch_dependents()
    m, tile, split = gl.program_id(0) * M, gl.program_id(1), gl.program_id(2)
    row = tile * (HALF if GATED else 2 * HALF)
    other = row + (num_columns if GATED else HALF)
    share = gl.cdiv(steps, splits)
    first = split * share
    count = gl.minimum(share, steps - first)

    words = gl.allocate_shared_memory(gl.int32, [STAGES] + words_desc.block_type.shape, words_desc.layout)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, M, STEP], x_desc.layout)
    factors = gl.allocate_shared_memory(gl.int32, [STAGES] + factors_desc.block_type.shape, factors_desc.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    descs, bufs = (words_desc, factors_desc), (words, factors)
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
    for s in gl.static_range(STAGES):
        _fetch_weight(descs, bufs, bars.index(s), s, row, first + s, s < count, STEP, GROUP, ZEROS)
    own: gl.constexpr = gl.SliceLayout(1, MMA)
    n = gl.arange(0, HALF, own)
    if PDL:
        gdc_wait()
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [m, (first + s) * STEP], bars.index(s), xs.index(s), pred=s < count)

    acc_a, acc_b = gl.zeros([HALF, M], gl.float32, MMA), gl.zeros([HALF, M], gl.float32, MMA)
    for i in range(count):
        slot = i % STAGES
        bar = bars.index(slot)
        mbarrier.wait(bar, (i // STAGES) & 1)
        both = words.index(slot).reshape([2 * HALF, WORDS])
        words_a, words_b = both.slice(0, HALF).load(A), both.slice(HALF, HALF).load(A)
        pairs = factors.index(slot)._reinterpret(gl.int32, [2 * max(1, FACTORS), HALF], PLAIN)
        scale_a, offset_a, scale_b, offset_b = words_a, words_a, words_b, words_b
        w_b = words_b
        for code in gl.static_range(CODES):
            if GROUP > 0 and (code * WORDS % GROUP == 0 if GROUP < STEP else code == 0):
                scale_a, offset_a = _pair(pairs, 0, first + i, code, STEP, GROUP, ZEROS, GATED, A)
                scale_b, offset_b = _pair(pairs, 1, first + i, code, STEP, GROUP, ZEROS, GATED, A)
            x = xs.index(slot).slice(code * WORDS, WORDS, 1).permute((1, 0))
            w_a = _weights(words_a, scale_a, offset_a, code, KIND, GROUP, ZEROS, DTYPE)
            acc_a = warpgroup_mma(w_a, x, acc_a, is_async=True)
            if code > 0:
                acc_b, w_b = warpgroup_mma_wait(1, deps=(acc_b, w_b))
            w_b = _weights(words_b, scale_b, offset_b, code, KIND, GROUP, ZEROS, DTYPE)
            acc_b = warpgroup_mma(w_b, x, acc_b, is_async=True)
            acc_a, w_a = warpgroup_mma_wait(1, deps=(acc_a, w_a))
        acc_b, w_b = warpgroup_mma_wait(0, deps=(acc_b, w_b))
        gl.thread_barrier()  # all warps have read the step
        more, step = i + STAGES < count, first + i + STAGES
        mbarrier.expect(bar, BYTES, pred=more)
        _fetch_weight(descs, bufs, bar, slot, row, step, more, STEP, GROUP, ZEROS)
        tma.async_copy_global_to_shared(x_desc, [m, step * STEP], bar, xs.index(slot), pred=more)

    out_m = m + gl.arange(0, M, gl.SliceLayout(0, MMA))
    if GROUP == 0:
        acc_a *= gl.load(factors_ptr + row + n, mask=n < all_rows - row, other=0.0)[:, None]
        acc_b *= gl.load(factors_ptr + other + n, mask=n < all_rows - other, other=0.0)[:, None]
    out_rows = split.to(gl.int64) * num_rows + out_m
    out_ptrs = out_ptr + out_rows[None, :] * num_columns + (row + n)[:, None]
    live = (out_m < num_rows)[None, :]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        gate, up = acc_a.to(dtype).to(gl.float32), acc_b.to(dtype).to(gl.float32)
        z = gate * (1 / (1 + gl.exp(-gate))) * up
        gl.store(out_ptrs, z.to(dtype), mask=live & (n < num_columns - row)[:, None])
    else:
        gl.store(out_ptrs, acc_a.to(dtype), mask=live & (n < num_columns - row)[:, None])
        gl.store(out_ptrs + HALF, acc_b.to(dtype), mask=live & (n < num_columns - other)[:, None])


def _matrix(x: Tensor, halves: int, rows_of_block: int, block: int, *, swizzled: bool) -> TensorDescriptor:
    """x [halves P, C] as [halves, P, C]; or by its columns"""


def launch(
    rows: Tensor, packed: Packed, factors: Tensor, bias: Tensor | None, out: Tensor, block_m: int, num_warps: int,
    splits: int, stages: int, *, gated: bool, **options: Any,
) -> None:  # fmt: skip
    half, all_rows, step = 16 * num_warps, packed.out_features, step_columns(packed.kind)
    halves = 2 if gated else 1
    block = 2 * half // halves
    x_layout = gl.NVMMASharedLayout.get_default_for([block_m, step], TYPES[rows.dtype])
    x_desc = TensorDescriptor(rows, [len(rows), packed.in_features], [rows.stride(0), 1], [block_m, step], x_layout)
    part, width = all_rows // halves, packed.words.shape[1]
    words_desc = TensorDescriptor(
        packed.words, [halves, part, width], [part * width, width, 1], [halves, block, 32],
        gl.NVMMASharedLayout.get_default_for([halves, block, 32], gl.int32),
    )
    group, zeros = group_of_kernel(packed), packed.zeros is not None
    flat = factors if group else packed.words.view(-1)[:all_rows].view(1, -1)
    count = max(1, step // (group if zeros else 2 * group)) if group else 1
    factors_desc = TensorDescriptor(
        flat, [halves, len(flat), part], [part, all_rows, 1], [halves, count, block],
        gl.NVMMASharedLayout(0, 32, 3),
    )
    num_columns = out.shape[-1]
    grid = (-(-len(rows) // block_m), -(-num_columns // (half if gated else 2 * half)), splits)
    packed_hopper_kernel[grid](
        x_desc, words_desc, factors_desc, factors, bias, out, len(rows), num_columns, all_rows,
        packed.words.shape[1] // 32, splits, KIND=packed.kind, GROUP=group, ZEROS=packed.zeros is not None,
        GATED=gated, STAGES=stages, num_warps=num_warps, enable_fp_fusion=False, **options,
    )
