"""RMSNorm of rows: out = weight * x / sqrt(mean(x^2) + eps), rounded as LlamaRMSNorm rounds it.

Bytes: 2 R H in and out; 60 rows of 4096 in bf16 are 1 MB, 0.3 us at 3.08 TB/s: one launch, so the launch is the cost.
Left out: widths over 65536.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .draft_head import after_earlier_kernels, rms_norm_ref
from .launch import dependent_launch, device_guard, use_triton


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, stride_x, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * H + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x [..., H], weight [H] of the same dtype -> [..., H], contiguous."""
    if not use_triton(x, weight):
        return rms_norm_ref(x, weight, eps)
    width = x.shape[-1]
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    rows = x.reshape(-1, width)
    assert rows.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    with device_guard(x):
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, eps, rows.stride(0), H=width, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
            **dependent_launch(x.device),
        )  # fmt: skip
    return out
