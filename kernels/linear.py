"""Products of a few rows with a large weight: out [R, N] = x [R, K] weight [N, K]^T (* scale [N]) (+ bias [N]).

    few_rows_matmul   the product
    few_rows_sums     fp32 parts of it, [S, R, N], one per split of K: what reads them adds them up in order
    gated_matmul      silu(gate) * up of weight [2I, K] = gate | up -> [R, I]

Bytes: the weight once, N K of them (twice that in bf16); at R up to 60 that is the whole cost on an H100 (floor 4.9 ms
for 7.5 B weights in bf16 at 3.08 TB/s). x comes from L2 once for every BLOCK_N rows of the weight, so tiles are as wide
as still fill the GPU; narrow weights are also split along K, and the parts are added by the kernel that reads the
product (`add_rms_norm`, `rope_append`), which costs no launch. The splits depend on the weight alone, and in a tile of
any size a sum adds up along K: a row's result does not depend on how many rows there are, nor on what they hold.
The kernel is in `linear_kernels.py`; `many_rows.py` has the same for more rows than are fast here.

On a CPU the BLAS that torch ships is slow at 2 to 30 rows: it packs the weight for a tall x. With the operands swapped
the weight is the tall one. 240 projections of a 135M model in fp32, 2 cores, ms (1 row: 36 either way):

    rows                 8     12     16     24
    x @ weight.T        81    105    109    128
    (weight @ x.T).T    45     78     69    100

Left out: TMA loads (0.3 us less per launch at 60 rows), eviction hints (Triton drops them on asynchronous copies).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .check import ANY, FLOATS, MOST_BLOCKS, flag, tensor
from .launch import device_guard, resources, upcast, use_triton
from .linear_kernels import few_rows_kernel
from .overlap import dependent_launch
from .silu_mul import run_silu_mul

MOST_ROWS_CPU = 32
ROW_STEP = 8  # on a CPU whole vectors of rows are fast, what is left over is not
MOST_ROWS = 64  # on a GPU more rows go to cuBLAS: a second tile of rows costs a third more time, cuBLAS nearly nothing
MOST_ROWS_GATED = 128  # of a wide weight: 5 us less than cuBLAS and the gate's launch take at 8B's shapes, of 73
MOST_ROWS_INT8 = 256  # cuBLAS needs a bf16 copy per call: 9 bytes per weight against 1, and L2
PREFETCHED = 2  # pieces of 256 bytes of each weight row of a tile, fetched before the wait


class Tile(NamedTuple):
    """How a launch cuts its work: rows of x and of the weight, columns per step; parts of K; warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def weight_tile(weight: Tensor, num_rows: int, *, split: bool) -> Tile:
    """256 bytes of a weight row per step. A wide weight takes wide tiles; others as many parts as the GPU can hold.

    num_rows: of x. More than MOST_ROWS take tiles of 128, so that the weight is read half as often.
    """
    num_columns, inner = weight.shape
    num_sms, shared_memory = resources(weight.device)
    size = weight.element_size()
    block_k = 256 // size
    if inner % block_k:
        block_k //= 2
    block_m = 64 if size == 2 else min(64, max(16, triton.next_power_of_2(num_rows)))
    if size == 4:
        block_m, block_k = 16, 32
    tiles, steps = triton.cdiv(num_columns, 64), triton.cdiv(inner, block_k)
    splits = 1
    if split:
        splits = _most_splits(steps, num_sms // tiles)
        if size == 1 and splits * tiles < 0.8 * num_sms:
            splits = _most_splits(steps, 3 * num_sms // tiles)
    wide = is_wide(weight)
    block_n, num_warps = (128, 8) if wide else (64, 4)
    if size == 1 and num_rows > 64:  # one tile of rows, since each converts the weights for itself
        return Tile(128, block_n, 64 if wide else 128, splits, 8, 4 if wide else 3)
    if size == 2 and num_rows > MOST_ROWS:
        num_stages = min(5 if wide else 6, shared_memory // (2 * 64 * (128 + block_n)))
        return Tile(128, block_n, 64, splits, 8, num_stages)
    stage = (block_n * size + block_m * max(size, 2)) * block_k
    crowded = not wide and splits * tiles > num_sms
    most = shared_memory // 2 - 1024 if crowded else shared_memory  # room for two programs per multiprocessor
    num_stages = min(4 if size == 2 or wide else 6, max(2, most // stage))
    return Tile(block_m, block_n, block_k, splits, num_warps, num_stages)


def is_wide(weight: Tensor) -> bool:
    """Whether tiles of 64 rows of the weight [N, K] are three for every multiprocessor."""
    return triton.cdiv(len(weight), 64) >= 3 * resources(weight.device).num_sms


def part_bounds(weight: Tensor) -> list[int]:
    """Where K is cut into the parts of `few_rows_sums`, 0 and K included."""
    tile, inner = weight_tile(weight, MOST_ROWS, split=True), weight.shape[1]
    share = triton.cdiv(triton.cdiv(inner, tile.block_k), tile.splits) * tile.block_k
    return [min(part * share, inner) for part in range(tile.splits + 1)]


def _most_splits(steps: int, most: int) -> int:
    """Into how many equal parts of at least two steps K is cut."""
    return max((s for s in range(1, min(steps // 2, most) + 1) if steps % s == 0), default=1)


def streams(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """True if products of x [..., K] with this weight take the kernel: few rows, 16 bits or int8, on a GPU.

    gated: those of `gated_matmul`.
    """
    columns = tensor("x", x, "... K", FLOATS, layout=ANY, empty=True)[-1:]
    tensor("weight", weight, "N K", (*FLOATS, torch.int8), (None, *columns), near=("x", x), layout=ANY)
    return _streams(x, weight, gated=flag("gated", gated))


def _streams(x: Tensor, weight: Tensor, *vectors: Tensor | None, gated: bool = False) -> bool:
    if x.numel() > _most_rows(weight, gated) * x.shape[-1] or not use_triton(x, weight, *vectors):
        return False
    if weight.stride(1) != 1 or weight.dtype not in (x.dtype, torch.int8) or len(weight) > 32 * MOST_BLOCKS:
        return False
    return not x.is_cuda or (x.dtype in (torch.bfloat16, torch.float16) and weight.element_size() <= 2)


def _most_rows(weight: Tensor, gated: bool) -> int:
    if weight.element_size() == 1:
        return MOST_ROWS_INT8
    return MOST_ROWS_GATED if gated and is_wide(weight) else MOST_ROWS


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dims: str = "N K") -> None:
    """Strides are free: what the kernel does not read as it lies, it gets as a copy, or torch does."""
    columns = tensor("x", x, "... K", FLOATS, layout=ANY, empty=True)[-1]
    near = ("x", x)
    dtypes = FLOATS if _autocast(x.device.type) else (x.dtype,)
    of_weight = dtypes if scale is None else (*dtypes, torch.int8)
    if scale is None and isinstance(weight, Tensor) and weight.dtype is torch.int8:
        raise ValueError("weight is int8 and scale is None; expected the scale of its rows")
    num_columns = tensor("weight", weight, dims, of_weight, (None, columns), near=near, layout=ANY)[0]
    if scale is not None:
        tensor("scale", scale, "N", FLOATS, (num_columns,), near=("weight", weight), layout=ANY)
    if bias is not None:
        tensor("bias", bias, "N", dtypes, (num_columns,), near=("weight", weight), layout=ANY)


def prefetched(weight: Tensor, inner: int) -> int:
    """How many pieces `after_fetching_rows` may ask for, of `inner` elements of the weight's rows."""
    size = weight.element_size()
    aligned = weight.stride(0) * size % 16 == 0 and weight.data_ptr() % 16 == 0
    return PREFETCHED if aligned and inner * size >= PREFETCHED * 256 else 0


def _autocast(device_type: str) -> bool:
    """Whether torch's products take any dtypes."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def few_rows_matmul(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, times scale [N] fp32 (of int8 weights), plus bias [N] -> [..., N].

    A few rows take the kernel on a GPU, and the faster of two ways to say it on a CPU; others torch's matmul.
    """
    _check(x, weight, scale, bias)
    if not _streams(x, weight, scale, bias):
        return few_rows_matmul_ref(x, weight, scale=scale, bias=bias)
    return kernel_product(x, weight, scale, bias, split=False)


def few_rows_sums(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Parts of the product of x [..., K] and weight [N, K], bias included: fp32 [S, ..., N], to be added up in order.

    Where the kernel does not run, the product itself, [..., N] in x's dtype. `add_rms_norm`, `rope_append` take both.
    """
    _check(x, weight, scale, bias)
    return run_sums(x, weight, scale, bias)


def run_sums(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`few_rows_sums` of arguments that are known to fit: nothing is checked."""
    if not _streams(x, weight, scale, bias):
        return few_rows_matmul_ref(x, weight, scale=scale, bias=bias)
    return kernel_product(x, weight, scale, bias, split=True)


def gated_matmul(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [..., I], of the rows gate | up of weight [2I, K], both rounded; others as `few_rows_matmul`."""
    _check(x, weight, scale, bias, "2I K")
    if len(weight) % 2:
        raise ValueError(f"weight has {len(weight)} rows; expected 2I, an even number: gate | up")
    return run_gated(x, weight, scale, bias)


def run_gated(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`gated_matmul` of arguments that are known to fit: nothing is checked."""
    if not _streams(x, weight, scale, bias, gated=True):
        return gated_matmul_ref(x, weight, scale=scale, bias=bias)
    out = x.new_empty(*x.shape[:-1], len(weight) // 2)
    _launch(x, weight, scale, bias, out, weight_tile(weight, x.shape[:-1].numel(), split=False), gated=True)
    return out


def kernel_product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, split: bool) -> Tensor:
    """The kernel's, of any number of rows: [..., N] in x's dtype, or with `split` its parts, fp32 [S, ..., N]."""
    tile = weight_tile(weight, x.shape[:-1].numel(), split=split)
    shape = *x.shape[:-1], len(weight)
    out = x.new_empty(tile.splits, *shape, dtype=torch.float32) if split else x.new_empty(*shape)
    _launch(x, weight, scale, bias, out, tile)
    return out


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, tile: Tile, *,
    gated: bool = False,
) -> None:  # fmt: skip
    inner, rows = x.shape[-1], x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    scale, bias = None if scale is None else scale.float().contiguous(), None if bias is None else bias.contiguous()
    num_columns, block_n = out.shape[-1], tile.block_n // 2 if gated else tile.block_n
    even = inner % (tile.block_k * tile.splits) == 0
    grid = (triton.cdiv(len(rows), tile.block_m), triton.cdiv(num_columns, block_n), tile.splits)
    with device_guard(x):
        few_rows_kernel[grid](
            rows, weight, scale, bias, out, len(rows), num_columns, inner, rows.stride(0), weight.stride(0),
            tile.splits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GATED=gated,
            EVEN=even, UPCAST=upcast(x.dtype),
            PIECES=prefetched(weight, inner // tile.splits) if even else 0,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False, **dependent_launch(x.device),
        )  # fmt: skip


def few_rows_matmul_ref(
    x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`few_rows_matmul` in plain PyTorch, differentiable."""
    if scale is not None:
        weight = weight.to(x.dtype) * scale.to(x.dtype)[:, None]
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or not 1 < rows <= MOST_ROWS_CPU:
        return torch.nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    padding = -rows % ROW_STEP
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding, flat.shape[1])])
    out = (weight @ flat.T)[:, :rows].T.contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def gated_matmul_ref(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`gated_matmul` as a product and `silu_mul`, differentiable."""
    gate_up = few_rows_matmul_ref(x, weight, scale=scale, bias=bias)
    num_columns = weight.shape[0]
    return run_silu_mul(gate_up.reshape(-1, num_columns)).reshape(*x.shape[:-1], num_columns // 2)
