"""Linear layers that read the same rows as one: their weights, dense or packed, in one tensor.

N rows of a weight, which are a layer's outputs. The merged tensors are the storage, and the stock ones become views
into them: memory does not double, and the user's model computes what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from eagle_fast_kernels.packed import Packed
from eagle_fast_kernels.silu_mul import silu_mul
from torch import Tensor, nn

from eagle_fast.layers.linear import FewRowsLinear, is_plain
from eagle_fast.layers.packed import PackedLinear


class SideBySide(nn.Module):
    """The products of several layers, one after the other, where their weights cannot be one."""

    def __init__(self, linears: Sequence[FewRowsLinear | PackedLinear]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], N of all layers."""
        return torch.cat([linear(input) for linear in self.linears], -1)

    def sums(self, input: Tensor, *, rounded: bool = True) -> Tensor:
        """See `FewRowsLinear`."""
        return self(input)

    def gated(self, input: Tensor) -> Tensor:
        """See `FewRowsLinear`."""
        out = self(input)
        return silu_mul(out.view(-1, out.shape[-1])).view(*out.shape[:-1], out.shape[-1] // 2)


def can_be_read(linear: Any) -> bool:
    """Whether kernels can read a layer's weight: a plain one, or a packed one of ours."""
    return is_plain(linear) or (type(linear) is PackedLinear and "forward" not in vars(linear))


def weight_of(linear: Any) -> Tensor:
    """The tensor that a layer's weight consists of, for the most part."""
    return linear.words if hasattr(linear, "words") else linear.weight


def single(linear: Any) -> FewRowsLinear | PackedLinear:
    """One layer as it is."""
    return linear if isinstance(linear, PackedLinear) else FewRowsLinear.of(linear.weight, linear.bias)


def merged(*linears: Any) -> FewRowsLinear | PackedLinear | SideBySide:
    """One layer of the rows of several; their own tensors become views into its."""
    if all(isinstance(each, PackedLinear) for each in linears) and _alike(linears):
        return _merged_packed(linears)
    biased = [linear.bias is not None for linear in linears]
    if any(isinstance(each, PackedLinear) for each in linears) or len(set(biased)) > 1:
        return SideBySide([single(each) for each in linears])
    bias = _merge([linear.bias for linear in linears]) if biased[0] else None
    return FewRowsLinear.of(_merge([linear.weight for linear in linears]), bias)


def _alike(linears: Sequence[PackedLinear]) -> bool:
    """Whether packed weights have the same bits, groups and order of columns."""
    kinds = {
        (each.kind, each.in_features, each.group_size, each.scales.dtype, each.zeros is None, each.bias is None,
         each.columns is None)
        for each in linears
    }  # fmt: skip
    if len(kinds) > 1:
        return False
    orders = [each.columns for each in linears if each.columns is not None]
    return all(torch.equal(each, orders[0]) for each in orders)


def _merged_packed(linears: Sequence[PackedLinear]) -> PackedLinear:
    first = linears[0]
    words = _merge([each.words for each in linears])
    scales = _merge([each.scales for each in linears], 1)
    zeros = None if first.zeros is None else _merge([each.zeros for each in linears], 1)
    bias = None if first.bias is None else _merge([each.bias for each in linears])
    for each in linears:
        if each.columns is not None and first.columns is not None:
            each.columns.data = first.columns
    packed = Packed(words, scales, zeros, first.columns, first.kind, first.in_features, first.group_size)
    return PackedLinear.of(packed, bias, first.dtype)


def _merge(held: Sequence[Any], dim: int = 0) -> Tensor:
    """Several tensors side by side in one, of which they are views from now on."""
    with torch.inference_mode(held[0].is_inference()):  # a view is of the kind that its tensor is
        parts = [each.detach() for each in held]
        whole = _stacked(parts, dim)
        if whole is None:
            whole = torch.cat(parts, dim)
        for each, part in zip(held, whole.split([part.shape[dim] for part in parts], dim), strict=True):
            each.data = part
    return whole


def _stacked(parts: list[Tensor], dim: int) -> Tensor | None:
    """The tensor that these are the views of already, if they are: a model may get a second target."""
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != offset:
            return None
        offset += part.shape[dim] * part.stride(dim)
    size = [*first.shape]
    size[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(size, first.stride())
