"""RMSNorm of rows, alone or of a sum with the residual stream; rounded where stock models round it.

    rms_norm        out = rms(x)
    add_rms_norm    total = x + residual,   normed = rms(total)          rms(x) = weight * x / sqrt(mean(x^2) + eps)
    add_parts       total alone, to the same bits, where the norm that reads it lies on another device

x of the last two may come in parts, fp32 [S, R, H] from `linear.few_rows_sums`. They are added up here in order, and
their sum is rounded to the residual's dtype before that is added: to the bits of a product that comes whole.

One program does a row, in an order that its width alone decides, and products are never fused with sums: the bits of a
row are the same however many rows there are, and in every variant of a kernel.

Bytes: in and out once; 60 rows of 4096 in bf16 are 1 MB, 0.3 us at 3.08 TB/s: one launch, so the launch is the cost.
Left out: widths over 65536; a bias, which only norms have that PyTorch's own LayerNorm computes, by a block for a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import ANY, BY_ROWS, FLOAT32, FLOATS, HUGE, Named, flag, number, tensor
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch

MOST_COLUMNS = 65536  # of a row, which one program holds


@triton.jit
def inverse_rms(x, width, eps):
    """1 / sqrt(mean(x^2) + eps) of x (fp32, zero past `width`)."""
    return tl.rsqrt(tl.sum(x * x, 0) / width + eps)


@triton.jit
def normalize(x, other, weight, other_weight, width, eps, ROUND: tl.constexpr):
    """Normalize x (fp32, zero past `width`) and a permutation of it, rounded to ROUND as LlamaRMSNorm does."""
    factor = inverse_rms(x, width, eps)
    x = (x * factor).to(ROUND).to(tl.float32) * weight
    other = (other * factor).to(ROUND).to(tl.float32) * other_weight
    return x.to(ROUND).to(tl.float32), other.to(ROUND).to(tl.float32)


@triton.jit
def sum_parts(ptr, offsets, mask, stride_part, PARTS: tl.constexpr, ROUND: tl.constexpr):
    """Sum over the parts of what is read, in order, rounded to ROUND, in fp32."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptr + part * stride_part + offsets, mask=mask, other=0.0).to(tl.float32)
    return total.to(ROUND).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, stride_x, H: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    CENTERED: tl.constexpr, ROUND_ONCE: tl.constexpr, PLUS_ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    x = tl.load(x_ptr + row * stride_x + i, mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(mask, x - tl.sum(x, 0) / H, 0.0)
    x = x * inverse_rms(x, H, eps)
    if not ROUND_ONCE:
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row % GROUPS * H + i, mask=mask, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight = 1.0 + weight
        x = x * weight
    tl.store(out_ptr + row * H + i, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, eps, stride_s, stride_x, stride_r,
    H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    total = sum_parts(x_ptr + row * stride_x, i, mask, stride_s, PARTS, total_ptr.dtype.element_ty)
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
    total = sum_parts(x_ptr + row * stride_x, i, mask, stride_s, PARTS, total_ptr.dtype.element_ty)
    total += tl.load(residual_ptr + row * stride_r + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_ptr + row * H + i, total.to(total_ptr.dtype.element_ty), mask=mask)


def num_warps(block: int) -> int:
    """Warps for a program of a row of `block` elements."""
    return min(16, max(1, block // 512))


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, centered: bool = False, round_once: bool = False,
    plus_one: bool = False,
) -> Tensor:  # fmt: skip
    """x [..., H], of any strides, weight [H], or [G, H] for x [..., G, H] -> [..., H] in x's dtype, contiguous.

    weight: None for a norm that has none.
    centered: the mean is taken out of each row first.
    round_once: at the end, as OLMo's and Gemma's norms; otherwise before the weight too, as Llama's.
    plus_one: the weight is one more than what is stored, in fp32, as Gemma's.
    ValueError, here as in all wrappers, where arguments do not fit: it names them and shows both sides.
    """
    shape = tensor("x", x, "... H", FLOATS, layout=ANY, empty=True)
    eps = _eps(eps, shape[-1], ("x", x))
    if weight is not None:
        grouped = isinstance(weight, Tensor) and weight.dim() == 2
        _check_weight(weight, shape[-2:] if grouped else shape[-1:], ("x", x))
    rounding = {"centered": centered, "round_once": round_once, "plus_one": plus_one}
    for name, value in rounding.items():
        flag(name, value)
    if not use_triton(x, weight):
        return rms_norm_ref(x, weight, eps, **rounding)
    rows = x.reshape(-1, shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(shape[-1])
    with device_guard(x):
        _rms_norm_kernel[(len(rows),)](
            rows, weight, out, eps, rows.stride(0), H=shape[-1], BLOCK=block,
            GROUPS=1 if weight is None else weight.numel() // shape[-1], CENTERED=centered, ROUND_ONCE=round_once,
            PLUS_ONE=plus_one, num_warps=num_warps(block), enable_fp_fusion=False, **dependent_launch(x.device),
        )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), both [R, H] as residual is; x [R, H] or parts of it, fp32 [S, R, H]."""
    _, width = _summands(x, residual)
    eps = _eps(eps, width, ("residual", residual))
    _check_weight(weight, (width,), ("residual", residual))
    return run_add_rms_norm(x, residual, weight, eps)


def run_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of arguments that are known to fit: nothing is checked."""
    if not use_triton(x, residual, weight):
        return add_rms_norm_ref(x, residual, weight, eps)
    num_rows, width = residual.shape
    num_parts, stride_s = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    normed, total = residual.new_empty(num_rows, width), residual.new_empty(num_rows, width)
    block = triton.next_power_of_2(width)
    with device_guard(x):
        _add_rms_norm_kernel[(num_rows,)](
            x, residual, weight, normed, total, eps, stride_s, x.stride(-2), residual.stride(0),
            H=width, BLOCK=block, PARTS=num_parts, num_warps=num_warps(block), enable_fp_fusion=False,
            **dependent_launch(x.device),
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
            H=width, BLOCK=block, PARTS=len(parts), num_warps=num_warps(block), enable_fp_fusion=False,
            **dependent_launch(x.device),
        )  # fmt: skip
    return total


def _eps(eps: float, width: int, near: Named) -> float:
    """Check the eps of a norm over rows of `width`, which comes back, and that a program can hold such a row."""
    if width > MOST_COLUMNS:
        raise ValueError(f"{near[0]} has rows of H = {width}; expected at most {MOST_COLUMNS}")
    return number("eps", eps, 0, HUGE)


def _check_weight(weight: Tensor, sizes: tuple[int, ...], near: Named) -> None:
    tensor("weight", weight, "G H" if len(sizes) == 2 else "H", FLOATS, sizes, near=near)


def _summands(x: Tensor, residual: Tensor) -> torch.Size:
    """Check x and the residual [R, H] that it is added to: their shape."""
    shape = tensor("residual", residual, "R H", FLOATS, layout=BY_ROWS, empty=True)
    near = ("residual", residual)
    if isinstance(x, Tensor) and x.dim() == 3:
        tensor("x", x, "S R H", FLOAT32, (None, *shape), near=near, layout=BY_ROWS, empty=not shape[0])
    else:
        tensor("x", x, "R H", (residual.dtype,), shape, near=near, layout=BY_ROWS, empty=True)
    return shape


def rms_norm_ref(
    x: Tensor, weight: Tensor | None, eps: float, *, centered: bool = False, round_once: bool = False,
    plus_one: bool = False,
) -> Tensor:  # fmt: skip
    """`rms_norm` in plain PyTorch, differentiable."""
    wide_already = x.dtype == torch.float32 and x.is_cpu
    if (
        wide_already
        and weight is not None
        and weight.dtype == x.dtype
        and weight.dim() == 1
        and not (centered or plus_one)
    ):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)  # the same bits, in half the time
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if not round_once:
        normed = normed.to(x.dtype)
    if weight is not None:
        normed = (1.0 + weight.to(wide.dtype) if plus_one else weight) * normed
    return normed.to(x.dtype)


def given_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension where there is a weight, else x itself; differentiable."""
    return x if weight is None else rms_norm_ref(x, weight, eps)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch, differentiable."""
    total = add_parts_ref(x, residual)
    return rms_norm_ref(total, weight, eps), total


def add_parts_ref(x: Tensor, residual: Tensor) -> Tensor:
    """`add_parts` in plain PyTorch, differentiable."""
    if x.dtype == residual.dtype and x.dim() == residual.dim():
        return x + residual
    whole = x if x.dim() == residual.dim() else sum_parts_ref(x, residual.dtype)
    return (whole + residual).to(residual.dtype)


def sum_parts_ref(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts [S, ...], in order, in this dtype."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)
