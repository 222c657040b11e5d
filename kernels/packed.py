"""Products of rows with a packed weight (4 bits, int8, fp8): out [R, N] = x [R, K] weight [N, K]^T (+ bias [N]).

    packed_matmul   the product
    packed_sums     fp32 parts of it, [S, R, N], one per split of K: what reads them adds them up in order
    packed_gated    silu(gate) * up of a weight [2I, K] = gate | up -> [R, I]

A packed weight (`packed_layout.py`) stands for a dense one in x's dtype, (code - zero) * scale rounded once, which the
kernels (`packed_kernels.py`, on Hopper `packed_hopper.py`) make in registers; sums are in fp32, along K from left to
right, never rescaled. So rows have the bits that `linear.py` gives them with the dense weight where K is cut alike. A
weight with one scale a row, or one in all, multiplies by its codes as they are, and the sum by the scale, as int8 in
`linear.py`.

Bytes: the weight once, at 4 bits with groups of 128 N K 0.516 of them; 7 B weights 3.6 GB, 1.17 ms at 3.08 TB/s.
x comes from L2 once for every BLOCK_N rows of the weight, and is four times a tile of words at 64 rows and BLOCK_N 64:
tiles are wide. Splits depend on the weight alone, tiles on the number of rows as well, which changes no bits.
`packed_many.py` has the same for more rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .check import ANY, FLOATS, HALVES, described, tensor
from .launch import INTERPRET, device_guard, resources, upcast, use_triton
from .linear import PREFETCHED, few_rows_matmul_ref
from .overlap import dependent_launch
from .packed_kernels import packed_kernel
from .packed_layout import WORDS, Packed, factors_of, group_of_kernel, has_kernel, pack, step_columns, unpack
from .silu_mul import silu_mul

# Gluon is experimental: other releases of Triton use `packed_kernel` only.
HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7."))
if HAS_GLUON:
    from . import packed_hopper as hopper

__all__ = ["Packed", "factors_of", "pack", "packed_gated", "packed_matmul", "packed_sums", "unpack"]

MOST_ROWS = 256  # up to which the kernel, in tiles of 64, is faster than the weight made dense and cuBLAS
PIECE_STEPS = 2  # of a row, 256 bytes


class PackedTile(NamedTuple):
    """How a launch cuts its work: rows of x and of the weight; parts of K; warps and stages."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


def packed_tile(packed: Packed, num_rows: int, *, split: bool) -> PackedTile:
    """Of `packed_kernel`, as measured on an H100; as many parts as the GPU can hold, of which rows know nothing."""
    num_sms, shared_memory = resources(packed.words.device)
    steps = packed.words.shape[1] // WORDS
    splits = 1
    if split:
        tiles = triton.cdiv(packed.out_features, 128)
        splits = max((s for s in range(1, steps // 2 + 1) if _fits(steps, s) and s * tiles <= 2 * num_sms), default=1)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    wide = packed.out_features >= 64 * num_sms
    block_n = 128 if packed.kind != "int8" or (wide and block_m == 64) else 64
    if not _is_hopper(packed.words.device):
        block_n = 64
    narrow = packed.kind == "fp8" or (packed.kind == "int4" and block_m <= 32 and not wide)
    num_warps = 4 if narrow else block_n // 16
    stage = (block_n * 4 + step_columns(packed.kind) // WORDS * block_m * 2) * WORDS
    num_stages = min(3 if packed.kind == "fp8" else 4, max(2, shared_memory // 2 // stage))
    return PackedTile(block_m, block_n, splits, num_warps, num_stages)


def _fits(steps: int, splits: int) -> bool:
    """Whether none of so many parts, all but the last alike, is empty."""
    return triton.cdiv(steps, triton.cdiv(steps, splits)) == splits


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def part_bounds(packed: Packed) -> list[int]:
    """Where K is cut into the parts of `packed_sums`, 0 and K included."""
    steps = packed.words.shape[1] // WORDS
    share = triton.cdiv(steps, packed_tile(packed, MOST_ROWS, split=True).splits) * step_columns(packed.kind)
    return [*range(0, packed.in_features, share), packed.in_features]


def packed_matmul(
    x: Tensor, packed: Packed, *, bias: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x [..., K] times the weight transposed, plus bias [N] -> [..., N].

    A few rows in 16 bits on a GPU take the kernel; others torch's product with the dense weight. factors: those of
    `factors_of` for x's dtype, kept by a caller.
    """
    _check(x, packed, bias)
    if not streams(x, packed, bias):
        return packed_matmul_ref(x, packed, bias=bias)
    return kernel_product(x, packed, bias, factors, split=False)


def packed_sums(x: Tensor, packed: Packed, *, bias: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """Parts of `packed_matmul`, bias included: fp32 [S, ..., N], to be added up in order.

    Where the kernel does not run, the product itself, [..., N] in x's dtype, as `few_rows_sums`.
    """
    _check(x, packed, bias)
    if not streams(x, packed, bias):
        return packed_matmul_ref(x, packed, bias=bias)
    return kernel_product(x, packed, bias, factors, split=True)


def packed_gated(x: Tensor, packed: Packed, *, bias: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [..., I], of the rows gate | up of a weight [2I, K], both rounded; others as `packed_matmul`."""
    _check(x, packed, bias)
    if packed.out_features % 2:
        raise ValueError(f"packed has {packed.out_features} rows; expected 2I, an even number: gate | up")
    if not streams(x, packed, bias):
        return packed_gated_ref(x, packed, bias=bias)
    return kernel_gated(x, packed, bias, factors)


def streams(x: Tensor, packed: Packed, bias: Tensor | None = None, most_rows: int = MOST_ROWS) -> bool:
    """Whether products of x [..., K] take the kernel: few rows of 16 bits on a GPU, and groups that it knows."""
    if not use_triton(x, packed.words, bias) or x.numel() > most_rows * x.shape[-1]:
        return False
    return x.dtype in HALVES and has_kernel(packed)


def _check(x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    if not isinstance(packed, Packed):
        raise ValueError(f"packed is {described(packed)}; expected a weight as `pack` makes it")
    near = ("packed.words", packed.words)
    tensor("x", x, "... K", FLOATS, layout=ANY, empty=True, near=near)
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has rows of {x.shape[-1]}; expected {packed.in_features}, the columns of packed")
    if bias is not None:
        tensor("bias", bias, "N", FLOATS, (packed.out_features,), near=near, layout=ANY)


def kernel_product(x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor | None, *, split: bool) -> Tensor:
    """The kernel's, of any number of rows: [..., N] in x's dtype, or with `split` its parts, fp32 [S, ..., N]."""
    tile = packed_tile(packed, x.shape[:-1].numel(), split=split)
    shape = *x.shape[:-1], packed.out_features
    out = x.new_empty(tile.splits, *shape, dtype=torch.float32) if split else x.new_empty(*shape)
    launch(x, packed, bias, factors, out, tile)
    return out


def kernel_gated(x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor | None) -> Tensor:
    """`packed_gated` by the kernel, of any number of rows."""
    out = x.new_empty(*x.shape[:-1], packed.out_features // 2)
    launch(x, packed, bias, factors, out, packed_tile(packed, x.shape[:-1].numel(), split=False), gated=True)
    return out


def launch(
    x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor | None, out: Tensor, tile: PackedTile, *,
    gated: bool = False,
) -> None:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])
    if packed.order is not None:
        rows = rows.index_select(1, packed.order)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    factors = factors_of(packed, x.dtype) if factors is None else factors
    bias = None if bias is None else bias.contiguous()
    if by_hopper(rows, packed, gated=gated):
        block = hopper.block_of(packed, len(rows), tile.splits, resources(x.device).shared_memory)
        hopper.launch(
            rows, packed, bias, factors, out, block, tile.splits, gated=gated, **dependent_launch(x.device)
        )  # fmt: skip
        return
    inner, steps = packed.in_features, packed.words.shape[1] // WORDS
    shortest = steps - (tile.splits - 1) * triton.cdiv(steps, tile.splits)  # of the parts
    num_columns, block_n = out.shape[-1], tile.block_n // 2 if gated else tile.block_n
    grid = (triton.cdiv(len(rows), tile.block_m), triton.cdiv(num_columns, block_n), tile.splits)
    with device_guard(x):
        packed_kernel[grid](
            rows, packed.words, factors, bias, out,
            len(rows), num_columns, inner, steps, rows.stride(0), tile.splits,
            KIND=packed.kind, GROUP=group_of_kernel(packed), ZEROS=packed.zeros is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GATED=gated, EVEN=inner % step_columns(packed.kind) == 0,
            PIECES=PREFETCHED if shortest >= PREFETCHED * PIECE_STEPS else 0, UPCAST=upcast(x.dtype),
            PTX=not INTERPRET and torch.version.hip is None, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=False, **dependent_launch(x.device),
        )  # fmt: skip


def by_hopper(rows: Tensor, packed: Packed, *, gated: bool) -> bool:
    """Whether `packed_hopper` takes the product."""
    return HAS_GLUON and hopper.is_hopper(rows.device) and hopper.can_fetch(rows, packed, gated=gated)


def packed_matmul_ref(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """`packed_matmul` in plain PyTorch, of the dense weight in x's dtype; differentiable in x."""
    return few_rows_matmul_ref(x, unpack(packed, x.dtype), bias=bias)


def packed_gated_ref(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """`packed_gated` as a product and `silu_mul`, differentiable in x."""
    gate_up = packed_matmul_ref(x, packed, bias=bias)
    return silu_mul(gate_up.reshape(-1, packed.out_features)).reshape(*x.shape[:-1], packed.out_features // 2)
