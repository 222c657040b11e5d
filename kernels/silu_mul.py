"""SiLU-gated product of the two halves of a row: out = silu(gate) * up, gate | up = gate_up[r].

For rows that `linear.gated_matmul` does not take. Bytes: read once, written once; arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import BY_ROWS, FLOATS, tensor
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, stride, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,  # noqa: E741
):  # fmt: skip
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * stride + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * I + i, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=i < I)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [R, I], of gate_up [R, 2I] = gate | up."""
    _, both = tensor("gate_up", gate_up, "R 2I", FLOATS, layout=BY_ROWS, empty=True)
    if both % 2:
        raise ValueError(f"gate_up has rows of {both}; expected 2I, an even number: gate | up")
    return run_silu_mul(gate_up)


def run_silu_mul(gate_up: Tensor) -> Tensor:
    """`silu_mul` of an argument that is known to fit: nothing is checked."""
    if not use_triton(gate_up):
        return silu_mul_ref(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    block = min(1024, triton.next_power_of_2(width))
    with device_guard(gate_up):
        _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
            gate_up, out, gate_up.stride(0), I=width, BLOCK=block, num_warps=4, enable_fp_fusion=False,
            **dependent_launch(gate_up.device),
        )  # fmt: skip
    return out


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain PyTorch, differentiable."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
