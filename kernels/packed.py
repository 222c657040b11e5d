"""Products of rows with a packed weight (4 bits, int8, fp8): out [R, N] = x [R, K] weight [N, K]^T (+ bias [N])."""

from __future__ import annotations

from torch import Tensor

from .check import ANY, FLOATS, tensor
from .linear import few_rows_matmul_ref
from .packed_layout import Packed, pack, unpack
from .silu_mul import silu_mul

__all__ = ["Packed", "pack", "packed_gated", "packed_matmul", "packed_sums", "unpack"]


def packed_matmul(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight transposed, plus bias [N] -> [..., N]."""
    _check(x, packed, bias)
    return packed_matmul_ref(x, packed, bias=bias)


def packed_sums(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """Parts of `packed_matmul`, to be added up in order: fp32 [S, ..., N]; or the product, as `few_rows_sums`."""
    _check(x, packed, bias)
    return packed_matmul_ref(x, packed, bias=bias)


def packed_gated(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [..., I], of the rows gate | up of a weight [2I, K]."""
    _check(x, packed, bias)
    if packed.out_features % 2:
        raise ValueError(f"packed has {packed.out_features} rows; expected 2I, an even number: gate | up")
    return packed_gated_ref(x, packed, bias=bias)


def _check(x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    near = ("packed.words", packed.words)
    tensor("x", x, "... K", FLOATS, layout=ANY, empty=True, near=near)
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has rows of {x.shape[-1]}; expected {packed.in_features}, the columns of packed")
    if bias is not None:
        tensor("bias", bias, "N", FLOATS, (packed.out_features,), near=near, layout=ANY)


def packed_matmul_ref(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """`packed_matmul` in plain PyTorch, of the dense weight in x's dtype; differentiable in x."""
    return few_rows_matmul_ref(x, unpack(packed, x.dtype), bias=bias)


def packed_gated_ref(x: Tensor, packed: Packed, *, bias: Tensor | None = None) -> Tensor:
    """`packed_gated` as a product and `silu_mul`, differentiable in x."""
    gate_up = packed_matmul_ref(x, packed, bias=bias)
    return silu_mul(gate_up.reshape(-1, packed.out_features)).reshape(*x.shape[:-1], packed.out_features // 2)
