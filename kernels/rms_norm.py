"""RMSNorm of rows, alone or of a sum with the residual stream; rounded as LlamaRMSNorm rounds it.

    rms_norm        out = rms(x)
    add_rms_norm    total = x + residual,   normed = rms(total)          rms(x) = weight * x / sqrt(mean(x^2) + eps)
    add_parts       total alone, to the same bits, where the norm that reads it lies on another device

x of the last two may come in parts, fp32 [S, R, H] from `linear.few_rows_sums`, which are added up here in order.
Bytes: in and out once; 60 rows of 4096 in bf16 are 1 MB, 0.3 us at 3.08 TB/s: one launch, so the launch is the cost.
Left out: widths over 65536.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import BY_ROWS, FLOAT32, FLOATS, HUGE, Named, number, tensor
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch

MOST_COLUMNS = 65536  # of a row, which one program holds


@triton.jit
def normalize(x, other, weight, other_weight, width, eps, ROUND: tl.constexpr):
    """Normalize x (fp32, zero past `width`) and a permutation of it, rounded to ROUND as LlamaRMSNorm does."""
    factor = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    x = (x * factor).to(ROUND).to(tl.float32) * weight
    other = (other * factor).to(ROUND).to(tl.float32) * other_weight
    return x.to(ROUND).to(tl.float32), other.to(ROUND).to(tl.float32)


@triton.jit
def sum_parts(ptr, offsets, mask, stride_part, PARTS: tl.constexpr):
    """fp32 sum over the parts of what is read, in order."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptr + part * stride_part + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, stride_x, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed, _ = normalize(x, x, weight, weight, H, eps, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * H + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, eps, stride_s, stride_x, stride_r,
    H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    total = sum_parts(x_ptr + row * stride_x, i, mask, stride_s, PARTS)
    total += tl.load(residual_ptr + row * stride_r + i, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * H + i, rounded, mask=mask)
    total = rounded.to(tl.float32)
    normed, _ = normalize(total, total, weight, weight, H, eps, total_ptr.dtype.element_ty)
    tl.store(normed_ptr + row * H + i, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts_kernel(
    x_ptr, residual_ptr, total_ptr, stride_s, stride_x, stride_r,
    H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    total = sum_parts(x_ptr + row * stride_x, i, mask, stride_s, PARTS)
    total += tl.load(residual_ptr + row * stride_r + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_ptr + row * H + i, total.to(total_ptr.dtype.element_ty), mask=mask)


def num_warps(block: int) -> int:
    """Warps for a program of a row of `block` elements."""
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., H], weight [H], a floating dtype each -> [..., H] in x's, contiguous.

    ValueError, here as in all wrappers, where arguments do not fit: it names them and shows both sides.
    """
    width = tensor("x", x, "... H", FLOATS, layout=BY_ROWS, empty=True)[-1]
    eps = _norm_settings(weight, width, eps, ("x", x))
    if not use_triton(x, weight):
        return rms_norm_ref(x, weight, eps)
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    with device_guard(x):
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, eps, rows.stride(0), H=width, BLOCK=block, num_warps=num_warps(block),
            **dependent_launch(x.device),
        )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), both [R, H] as residual is; x [R, H] or parts of it, fp32 [S, R, H]."""
    num_rows, width = _summands(x, residual)
    eps = _norm_settings(weight, width, eps, ("residual", residual))
    if not use_triton(x, residual, weight):
        return add_rms_norm_ref(x, residual, weight, eps)
    parts = x if x.dim() == 3 else x[None]
    normed, total = residual.new_empty(2, num_rows, width)
    block = triton.next_power_of_2(width)
    with device_guard(x):
        _add_rms_norm_kernel[(num_rows,)](
            x, residual, weight, normed, total, eps, *parts.stride()[:2], residual.stride(0),
            H=width, BLOCK=block, PARTS=len(parts), num_warps=num_warps(block), **dependent_launch(x.device),
        )  # fmt: skip
    return normed, total


def add_parts(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual, [R, H] as residual is; x [R, H] or parts of it, fp32 [S, R, H]."""
    num_rows, width = _summands(x, residual)
    if not use_triton(x, residual):
        return add_parts_ref(x, residual)
    parts = x if x.dim() == 3 else x[None]
    total = residual.new_empty(num_rows, width)
    block = triton.next_power_of_2(width)
    with device_guard(x):
        _add_parts_kernel[(num_rows,)](
            x, residual, total, *parts.stride()[:2], residual.stride(0),
            H=width, BLOCK=block, PARTS=len(parts), num_warps=num_warps(block), **dependent_launch(x.device),
        )  # fmt: skip
    return total


def _norm_settings(weight: Tensor, width: int, eps: float, near: Named) -> float:
    """Check the weight [H] of a norm over rows of `width` and its eps, which comes back."""
    if width > MOST_COLUMNS:
        raise ValueError(f"{near[0]} has rows of H = {width}; expected at most {MOST_COLUMNS}")
    tensor("weight", weight, "H", FLOATS, (width,), near=near)
    return number("eps", eps, 0, HUGE)


def _summands(x: Tensor, residual: Tensor) -> torch.Size:
    """Check x and the residual [R, H] that it is added to: their shape."""
    shape = tensor("residual", residual, "R H", FLOATS, layout=BY_ROWS, empty=True)
    near = ("residual", residual)
    if isinstance(x, Tensor) and x.dim() == 3:
        tensor("x", x, "S R H", FLOAT32, (None, *shape), near=near, layout=BY_ROWS, empty=not shape[0])
    else:
        tensor("x", x, "R H", (residual.dtype,), shape, near=near, layout=BY_ROWS, empty=True)
    return shape


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension as LlamaRMSNorm rounds it, differentiable; without a weight, x itself."""
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch, differentiable."""
    total = add_parts_ref(x, residual)
    return rms_norm_ref(total, weight, eps), total


def add_parts_ref(x: Tensor, residual: Tensor) -> Tensor:
    """`add_parts` in plain PyTorch, differentiable."""
    whole = x if x.dim() == residual.dim() else x.sum(0)
    return (whole + residual).to(residual.dtype)
