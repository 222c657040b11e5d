"""Linear layers for the few rows of a tree: `nn.Linear` in everything but the product that it calls."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from eagle_fast_kernels.linear import few_rows_matmul, run_gated, run_sums, streams
from eagle_fast_kernels.many_rows import row_invariant_gated, row_invariant_matmul, row_invariant_sums
from torch import Tensor, nn

LARGEST = 127  # of a quantized weight, in either direction
PRODUCT = nn.Linear.forward
ROWS, COLUMNS = 0, 1  # of a weight [N, K], as axes
BLOCK_ROWS = 4096  # of a weight, quantized at a time


def parts_between(bounds: Sequence[int], axis: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of the parts of a weight of this shape. ValueError for bounds or an axis that are none."""
    if axis not in (ROWS, COLUMNS):
        raise ValueError(f"axis is {axis}; expected 0, rows, or 1, columns")
    end = shape[axis]
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != end or list(bounds) != sorted(set(bounds)):
        raise ValueError(f"bounds are {list(bounds)}; expected rising numbers from 0 to {end}")
    return list(itertools.pairwise(bounds))


class RowOrder:
    """Whether products of any number of rows are to have the bits of few rows: while decoded rows are computed."""

    def __init__(self) -> None:
        self.kept = False


class FewRowsLinear(nn.Linear):
    """nn.Linear whose products of a few rows take the fast way. order: of whoever runs it, None where bits of more rows
    do not matter."""

    order: RowOrder | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> FewRowsLinear:
        """A frozen layer over weight [N, K] and bias [N] as they are, without a copy."""
        linear = cls(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        if self._keeps_order(input):
            return row_invariant_matmul(input, self.weight, self.bias)
        if input.device.type != "cpu" and not streams(input, self.weight):
            return super().forward(input)
        return few_rows_matmul(input, self.weight, bias=self.bias)

    def _keeps_order(self, input: Tensor) -> bool:
        """On a GPU alone: elsewhere few rows have no order of their own, and the functions for it would only check."""
        return input.is_cuda and self.order is not None and self.order.kept

    def sums(self, input: Tensor, *, rounded: bool = True) -> Tensor:
        """The product [..., N], or parts of it [S, ..., N] in fp32: see `few_rows_sums`. rounded: whether all have the
        same bits once they are rounded to the input's dtype, or, with an order kept, before."""
        if self._keeps_order(input):
            return row_invariant_sums(input, self.weight, self.bias, rounded=rounded)
        return run_sums(input, self.weight, None, self.bias)

    def gated(self, input: Tensor) -> Tensor:
        """silu(gate) * up, [..., N / 2], where the weight is gate | up."""
        if self._keeps_order(input):
            return row_invariant_gated(input, self.weight, self.bias)
        return run_gated(input, self.weight, None, self.bias)

    def cut(self, bounds: Sequence[int], axis: int) -> list[FewRowsLinear]:
        """Parts of the weight from each bound to the next, copies. Of rows (axis 0) their outputs lie side by side; of
        columns (axis 1) they are added up: the first has the bias."""
        parts: list[FewRowsLinear] = []
        bias: Tensor | None
        for low, high in parts_between(bounds, axis, self.weight.shape):
            if axis == ROWS:
                weight, bias = self.weight[low:high], None if self.bias is None else self.bias[low:high].clone()
            else:
                weight, bias = self.weight[:, low:high], self.bias if low == 0 else None
            parts.append(FewRowsLinear.of(weight.clone(memory_format=torch.contiguous_format), bias))
            parts[-1].order = self.order
        return parts


class QuantizedLinear(nn.Module):
    """A `FewRowsLinear` in int8: weights with a scale for each output, which the product is multiplied by."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight, scale = quantize(linear.weight)
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer over weight [N, K], scale [N] and bias [N] as they are, without a copy."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = weight.shape
        for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            setattr(linear, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        return linear

    def forward(self, input: Tensor) -> Tensor:
        return few_rows_matmul(input, self.weight, scale=self.scale, bias=self.bias)

    def sums(self, input: Tensor) -> Tensor:
        """See `FewRowsLinear`."""
        return run_sums(input, self.weight, self.scale, self.bias)

    def gated(self, input: Tensor) -> Tensor:
        """See `FewRowsLinear`."""
        return run_gated(input, self.weight, self.scale, self.bias)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K] within -127 .. 127, scale [N] fp32) of weight [N, K], rounded to nearest.

    Their product is within scale / 2 of each entry: 1/254 of the row's largest, 0.9 % of sigma (rms) in a Gaussian row
    of 4096. A row of zeros stays zeros.
    """
    weight = weight.detach()
    scale = weight.new_empty(len(weight), dtype=torch.float32)
    quantized = torch.empty_like(weight, dtype=torch.int8)
    for first in range(0, len(weight), BLOCK_ROWS):  # the quotients are in fp32
        rows = slice(first, first + BLOCK_ROWS)
        scale[rows] = weight[rows].abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        quantized[rows] = (weight[rows] / scale[rows, None]).round_().to(torch.int8)
    return quantized, scale


QuantisedLinear, quantise = QuantizedLinear, quantize  # their names in 0.1


def is_plain(module: nn.Module) -> bool:
    """Whether this is nn.Linear itself with a weight that kernels can read: no subclass of either, as quantized ones
    are, and no forward of the instance's own or put on the class."""
    if type(module) is not nn.Linear or nn.Linear.forward is not PRODUCT or "forward" in vars(module):
        return False
    return type(module.weight.data) is Tensor


def use_few_rows_linear(model: nn.Module, order: RowOrder | None = None) -> None:
    """Replace every plain nn.Linear of `model` by one that shares its weight. All, old and new, get the order."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and is_plain(child):
                clone = copy.copy(child)
                clone.__class__ = FewRowsLinear
                module._modules[name] = clone
    for module in model.modules():
        if isinstance(module, FewRowsLinear):
            module.order = order
