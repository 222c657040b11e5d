"""The kernel of `packed.py` for Hopper, in Gluon: the weight by TMA into a ring, asked for before the wait for x.

The same products in the same order as `packed_kernels.py`, K in tiles of 32 columns from left to right, so the same
bits. A program takes two tiles of the weight's rows in turns: one is made of its words while the matrix instructions
work on the other. GATED they are rows of gate and of up, which end in one thread.

The weight depends on no other kernel: its first STAGES steps are asked for before the wait for the kernels before,
which at 4 bits is all of `o` and of `qkv` of an 8B model. That hides most of what a launch costs. x follows after the
wait, and a further step takes the place of one that all warps have read. Two programs share a multiprocessor: one makes
weights while the other waits.

Gluon is experimental and changes between releases of Triton: `packed.py` takes this file with those that it is written
for (3.6 and 3.7).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

from .launch import device_guard
from .packed_kernels import assembly
from .packed_layout import Packed, group_of_kernel, step_columns

WORDS = gl.constexpr(32)  # as in packed_layout.py
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
all_warps = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6; 3.7
NUM_WARPS = 4
BLOCK_N = 32 * NUM_WARPS  # rows of the weight, in two tiles
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.constexpr_function
def factor_rows(STEP, GROUP, ZEROS):
    """Rows of factors [P, N] that a step reads."""
    return max(1, STEP // (GROUP if ZEROS else 2 * GROUP)) if GROUP else 1


@gluon.jit
def _fetch_weight(
    descs, bufs, bar, slot, row, step, pred, STEP: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr
):  # fmt: skip
    """A step of both tiles of the weight's rows, and its factors."""
    tma.async_copy_global_to_shared(descs[0], [0, row, step * WORDS], bar, bufs[1].index(slot), pred=pred)
    if GROUP > 0:
        pair = step * STEP // (GROUP if ZEROS else 2 * GROUP)
        tma.async_copy_global_to_shared(descs[1], [0, pair, row], bar, bufs[2].index(slot), pred=pred)


@gluon.jit
def _twice(half):
    """The low 16 bits in both halves, of [N] as [N, 1]."""
    return ((half & 0xFFFF) * 0x10001)[:, None]


@gluon.jit
def _factors(
    factors, step, HALF: gl.constexpr, CODE: gl.constexpr, STEP: gl.constexpr, GROUP: gl.constexpr,
    ZEROS: gl.constexpr, GATED: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """(scale, offset) of tile CODE of a step, [N, 1], as `packed_kernels._factors`. HALF: which tile of rows."""
    ROW: gl.constexpr = CODE * WORDS // (GROUP if ZEROS else 2 * GROUP)
    PLACE: gl.constexpr = HALF * factor_rows(STEP, GROUP, ZEROS) + ROW if GATED else ROW * 2 + HALF
    pair = factors.index(PLACE).load(gl.SliceLayout(1, A))
    if ZEROS:
        return _twice(pair), _twice(pair >> 16)
    if STEP % (2 * GROUP) == 0:
        scale = _twice(pair >> CODE * WORDS // GROUP % 2 * 16)
    else:
        scale = _twice(pair >> step * STEP // GROUP % 2 * 16)
    return scale, scale


@gluon.jit
def _weights(
    words, scale, offset, CODE: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """As `packed_kernels._weights`."""
    w = gl.inline_asm_elementwise(
        assembly(KIND, CODE, gl.bfloat16 == DTYPE, GROUP > 0, ZEROS), "=r,r,r,r,r,r,r", [words, scale, offset],
        dtype=gl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    return w.to(DTYPE, bitcast=True)


@gluon.jit
def _add_step(
    bufs, slot, step, acc, other_acc, KIND: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """The products of both tiles with a step of x, added to theirs."""
    xs, all_words, all_factors = bufs
    STEP: gl.constexpr = xs.shape[2]
    ROWS: gl.constexpr = acc.shape[0]
    A: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    both = all_words.index(slot).reshape([2 * ROWS, WORDS])
    words, other_words = both.slice(0, ROWS).load(A), both.slice(ROWS, ROWS).load(A)
    factors = all_factors.index(slot)._reinterpret(
        gl.int32, [2 * factor_rows(STEP, GROUP, ZEROS), ROWS], PLAIN
    )  # fmt: skip
    scale, offset, other_scale, other_offset, other_w = words, words, other_words, other_words, other_words
    for code in gl.static_range(STEP // WORDS):
        if GROUP > 0 and (code * WORDS % GROUP == 0 if GROUP < STEP else code == 0):
            scale, offset = _factors(factors, step, 0, code, STEP, GROUP, ZEROS, GATED, A)
            other_scale, other_offset = _factors(factors, step, 1, code, STEP, GROUP, ZEROS, GATED, A)
        x = xs.index(slot).slice(code * WORDS, WORDS, 1).permute((1, 0))
        w = _weights(words, scale, offset, code, KIND, GROUP, ZEROS, xs.dtype)
        acc = warpgroup_mma(w, x, acc, is_async=True)
        if code > 0:
            other_acc, other_w = warpgroup_mma_wait(1, deps=(other_acc, other_w))
        other_w = _weights(other_words, other_scale, other_offset, code, KIND, GROUP, ZEROS, xs.dtype)
        other_acc = warpgroup_mma(other_w, x, other_acc, is_async=True)
        acc, w = warpgroup_mma_wait(1, deps=(acc, w))
    other_acc, other_w = warpgroup_mma_wait(0, deps=(other_acc, other_w))
    return acc, other_acc


@gluon.jit
def _column(ptr, first, n, end):
    """Numbers first + n of a vector, in fp32."""
    return gl.load(ptr + first + n, mask=n < end - first, other=0.0).to(gl.float32)


@gluon.jit
def _finish(acc, other_acc, out, m, row, GROUP: gl.constexpr, GATED: gl.constexpr):
    """Scales, bias and gate; and the results to memory."""
    factors_ptr, bias_ptr, out_ptr, split, num_rows, num_columns, all_rows = out
    ROWS: gl.constexpr = acc.shape[0]
    other = row + (num_columns if GATED else ROWS)
    n = gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    m += gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    if GROUP == 0:
        acc *= _column(factors_ptr, row, n, all_rows)[:, None]
        other_acc *= _column(factors_ptr, other, n, all_rows)[:, None]
    if bias_ptr is not None:
        acc += gl.where(split == 0, _column(bias_ptr, row, n, all_rows), 0.0)[:, None]
        other_acc += gl.where(split == 0, _column(bias_ptr, other, n, all_rows), 0.0)[:, None]
    out_ptrs = out_ptr + (split.to(gl.int64) * num_rows + m)[None, :] * num_columns + (row + n)[:, None]
    live = (m < num_rows)[None, :]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        gate, up = acc.to(dtype).to(gl.float32), other_acc.to(dtype).to(gl.float32)
        acc = gate * (1 / (1 + gl.exp(-gate))) * up
    gl.store(out_ptrs, acc.to(dtype), mask=live & (n < num_columns - row)[:, None])
    if not GATED:
        gl.store(out_ptrs + ROWS, other_acc.to(dtype), mask=live & (n < num_columns - other)[:, None])


@gluon.jit(do_not_specialize=["num_rows", "steps", "splits"])
def packed_hopper_kernel(
    x_desc, words_desc, factors_desc, factors_ptr, bias_ptr, out_ptr, num_rows, num_columns, all_rows, steps, splits,
    KIND: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """num_columns: of the output; all_rows, steps: of the weight, of a row of it. GROUP 0: one scale a row, fp32."""
    if PDL:
        gdc_launch_dependents()
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    STEP: gl.constexpr = x_desc.block_type.shape[1]
    ROWS: gl.constexpr = 16 * gl.num_warps()
    FACTORS: gl.constexpr = factor_rows(STEP, GROUP, ZEROS) if GROUP > 0 else 0
    BYTES: gl.constexpr = BLOCK_M * STEP * 2 + 2 * ROWS * 4 * (WORDS + FACTORS)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    tile, split = gl.program_id(1), gl.program_id(2)
    share = gl.cdiv(steps, splits)
    first = split * share
    count = gl.minimum(share, steps - first)
    m, row = gl.program_id(0) * BLOCK_M, tile * (ROWS if GATED else 2 * ROWS)
    out = (factors_ptr, bias_ptr, out_ptr, split, num_rows, num_columns, all_rows)
    descs = (words_desc, factors_desc)
    bufs = (
        gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout),  # noqa: RUF005
        gl.allocate_shared_memory(gl.int32, [STAGES] + words_desc.block_type.shape, words_desc.layout),  # noqa: RUF005
        gl.allocate_shared_memory(gl.int32, [STAGES] + factors_desc.block_type.shape, factors_desc.layout),  # noqa: RUF005
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES):
        mbarrier.expect(full.index(s), BYTES, pred=s < count)
    for s in gl.static_range(STAGES):
        _fetch_weight(descs, bufs, full.index(s), s, row, first + s, s < count, STEP, GROUP, ZEROS)
    if PDL:
        gdc_wait()
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x_desc, [m, (first + s) * STEP], full.index(s), bufs[0].index(s), pred=s < count
        )
    acc, other_acc = gl.zeros([ROWS, BLOCK_M], gl.float32, MMA), gl.zeros([ROWS, BLOCK_M], gl.float32, MMA)
    for i in range(count):
        slot = i % STAGES
        bar = full.index(slot)
        mbarrier.wait(bar, (i // STAGES) & 1)
        acc, other_acc = _add_step(bufs, slot, first + i, acc, other_acc, KIND, GROUP, ZEROS, GATED)
        all_warps()  # all warps have read the step
        more, step = i + STAGES < count, first + i + STAGES
        mbarrier.expect(bar, BYTES, pred=more)
        _fetch_weight(descs, bufs, bar, slot, row, step, more, STEP, GROUP, ZEROS)
        tma.async_copy_global_to_shared(x_desc, [m, step * STEP], bar, bufs[0].index(slot), pred=more)
    _finish(acc, other_acc, out, m, row, GROUP, GATED)


def is_hopper(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def can_fetch(rows: Tensor, packed: Packed, *, gated: bool) -> bool:
    """Whether x [R, K] and the weight lie as TMA wants them, on 16 bytes."""
    part = packed.out_features // 2 if gated else packed.out_features
    return part % 4 == 0 and len(rows) > 0 and rows.data_ptr() % 16 == 0 and rows.stride(0) % 8 == 0


class Block(NamedTuple):
    """How a launch cuts its work: rows of x; stages."""

    block_m: int
    num_stages: int


def block_of(packed: Packed, num_rows: int, splits: int, shared_memory: int) -> Block:
    """Two programs share a multiprocessor, each with as many stages as fit in half of its memory."""
    step, steps = step_columns(packed.kind), -(-packed.words.shape[1] // WORDS.value // splits)
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    factors = factor_rows(step, group_of_kernel(packed), packed.zeros is not None)
    stage = block_m * step * 2 + BLOCK_N * 4 * (WORDS.value + factors)
    return Block(block_m, max(2, min((shared_memory // 2 - 2048) // stage, steps, 6)))


def launch(
    rows: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor, out: Tensor, tile: Block, splits: int, *,
    gated: bool, **options: Any,
) -> None:  # fmt: skip
    """The product of x's rows [R, K] with the weight into out: [R, N] or [R, I], or parts [S, R, N]."""
    block_m, num_stages = tile
    all_rows, width, step = *packed.words.shape, step_columns(packed.kind)
    group, zeros, halves = group_of_kernel(packed), packed.zeros is not None, 2 if gated else 1
    part, block = all_rows // halves, BLOCK_N // halves
    x_layout = gl.NVMMASharedLayout.get_default_for([block_m, step], TYPES[rows.dtype])
    x_desc = TensorDescriptor(rows, [len(rows), packed.in_features], [rows.stride(0), 1], [block_m, step], x_layout)
    words_desc = TensorDescriptor(
        packed.words, [halves, part, width], [part * width, width, 1], [halves, block, WORDS.value],
        gl.NVMMASharedLayout(128, 32, 3),
    )  # fmt: skip
    pairs = factors if group else packed.words  # which are not read
    factors_desc = TensorDescriptor(
        pairs, [halves, len(factors) if group else 1, part], [part, all_rows, 1],
        [halves, factor_rows(step, group, zeros), block], gl.NVMMASharedLayout(0, 32, 3),
    )  # fmt: skip
    num_columns = out.shape[-1]
    grid = (-(-len(rows) // block_m), -(-num_columns // block), splits)
    with device_guard(rows):
        packed_hopper_kernel[grid](
            x_desc, words_desc, factors_desc, factors, bias, out, len(rows), num_columns, all_rows,
            width // WORDS.value, splits, KIND=packed.kind, GROUP=group, ZEROS=zeros, GATED=gated, STAGES=num_stages,
            num_warps=NUM_WARPS, enable_fp_fusion=False, **options,
        )  # fmt: skip
