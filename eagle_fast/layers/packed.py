"""Linear layers over packed weights, 4 or 8 bits each: see `kernels/packed.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from eagle_fast_kernels.check import HALVES
from eagle_fast_kernels.packed import Packed, factors_of, packed_sums, streams, unpack
from eagle_fast_kernels.packed_layout import cut_columns, cut_rows, merge
from eagle_fast_kernels.packed_many import (
    many_gated,
    many_matmul,
    row_invariant_gated,
    row_invariant_matmul,
    row_invariant_sums,
)  # fmt: skip
from torch import Tensor, nn

from .linear import ROWS, RowOrder, parts_between


class PackedLinear(nn.Module):
    """What `FewRowsLinear` is to nn.Linear, with a packed weight: frozen; casts reach what it computes in, not the
    weight. order: of whoever runs it, None where bits of more rows do not matter."""

    order: RowOrder | None = None

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> PackedLinear:
        """A layer over the weight and bias [N] as they are. dtype: that it computes in; the bias's, or the scales'."""
        linear = cls()
        linear.kind, linear.in_features, linear.group_size = packed.kind, packed.in_features, packed.group_size
        linear.out_features = packed.out_features
        for name in ("words", "scales", "zeros", "columns"):
            linear.register_buffer(name, packed.order if name == "columns" else getattr(packed, name))
        linear.register_buffer("bias", None if bias is None else bias.detach())
        dtype = dtype or (packed.scales if bias is None else bias).dtype
        linear.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.words.device), persistent=False)
        return linear

    kind: str
    in_features: int
    out_features: int
    group_size: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    bias: Tensor | None
    like: Tensor
    _factors: Tensor | None = None  # what the kernel reads of scales and zero points, made when it first does

    @property
    def packed(self) -> Packed:
        return Packed(
            self.words, self.scales, self.zeros, self.columns, self.kind, self.in_features, self.group_size
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes with."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def num_bytes(self) -> int:
        return self.packed.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def _apply(self, fn, recurse=True):
        scales, self._factors = self.scales, None
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # a cast of the model, and scales are numbers of the file
            self.scales = scales.to(self.scales.device)
        return self

    def dense(self) -> Tensor:
        """The weight [N, K] that this one stands for."""
        return unpack(self.packed, self.dtype)

    def _load_from_state_dict(self, *args, **options):
        self._factors = None
        super()._load_from_state_dict(*args, **options)

    def _arguments(self, input: Tensor) -> tuple[Packed, Tensor | None, Tensor | None]:
        """What products take beside their rows."""
        if self._factors is None and self.device.type != "cpu" and self.dtype in HALVES:
            self._factors = factors_of(self.packed, self.dtype)
        return self.packed, self.bias, self._factors if input.dtype == self.dtype else None

    @property
    def _keeps_order(self) -> bool:
        return self.order is not None and self.order.kept

    def forward(self, input: Tensor) -> Tensor:
        return (row_invariant_matmul if self._keeps_order else many_matmul)(input, *self._arguments(input))

    def sums(self, input: Tensor, *, rounded: bool = True) -> Tensor:
        """See `FewRowsLinear`."""
        packed, bias, factors = self._arguments(input)
        if self._keeps_order:
            return row_invariant_sums(input, packed, bias, factors, rounded=rounded)
        if not streams(input, packed, bias):
            return many_matmul(input, packed, bias, factors)
        return packed_sums(input, packed, bias=bias, factors=factors)

    def gated(self, input: Tensor) -> Tensor:
        """See `FewRowsLinear`."""
        return (row_invariant_gated if self._keeps_order else many_gated)(input, *self._arguments(input))

    def cut(self, bounds: Sequence[int], axis: int) -> list[PackedLinear]:
        """Parts of the weight from each bound to the next, copies. Of rows (axis 0) their outputs lie side by side; of
        columns (axis 1) they are added up: the first has the bias."""
        whole, parts = self.packed, []
        for low, high in parts_between(bounds, axis, (self.out_features, self.in_features)):
            if axis == ROWS:
                bias = None if self.bias is None else self.bias[low:high].clone()
                part = cut_rows(whole, low, high)
            else:
                bias = self.bias if low == 0 else None
                part = cut_columns(whole, low, high)
            parts.append(PackedLinear.of(part, bias, self.dtype))
            parts[-1].order = self.order
        return parts

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def merge_packed(linears: Sequence[PackedLinear]) -> PackedLinear | None:
    """One layer whose outputs are those of several, in turn; None where their weights differ in kind, groups, zero
    points or order of columns, or some have a bias and others none."""
    first = linears[0]
    if len({(each.bias is None, each.dtype) for each in linears}) > 1:
        return None
    try:
        packed = merge([each.packed for each in linears])
    except ValueError:
        return None
    bias = None if first.bias is None else torch.cat([each.bias for each in linears if each.bias is not None])
    linear = PackedLinear.of(packed, bias, first.dtype)
    linear.order = first.order
    return linear
