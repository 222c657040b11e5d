"""What a rank gets of a linear layer, plain or packed: a copy of some rows or columns of its weight.

Packed weights are cut along groups of columns. Where they have columns in an order of their own (act-order), the rows
of the layers before take that order over, which is known at load, or there is no such part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from eagle_fast_kernels.packed_layout import Packed, cut_columns, cut_rows
from torch import Tensor, nn

from eagle_fast.layers.cuts import taken
from eagle_fast.layers.linear import ROWS, FewRowsLinear, RowOrder
from eagle_fast.layers.packed import PackedLinear, merge_packed
from eagle_fast.target.anatomy import LlamaLayer
from eagle_fast.target.merged import SideBySide

PartLinear = FewRowsLinear | PackedLinear | SideBySide


def part_of(
    linears: Sequence[Any], parts: Sequence[range], axis: int, device: torch.device, order: RowOrder, *,
    biased: bool = True,
) -> PartLinear:  # fmt: skip
    """One layer of parts of several, side by side, copied to a device. axis: ROWS, or of one layer COLUMNS. biased:
    whether their biases come along. ValueError for columns that packed weights have not side by side."""
    packed = [isinstance(each, PackedLinear) for each in linears]
    if not any(packed):
        made: PartLinear = _plain(linears, parts, axis, device, biased)
    else:
        found = [
            _packed(linear, part, axis, biased).to(device)
            if isinstance(linear, PackedLinear)
            else _plain([linear], [part], axis, device, biased)
            for linear, part in zip(linears, parts, strict=True)
        ]
        alike = merge_packed(found) if all(packed) and len(found) > 1 else None  # type: ignore[arg-type]
        made = found[0] if len(found) == 1 else alike or SideBySide(found)
    for each in made.linears if isinstance(made, SideBySide) else [made]:
        each.order = order  # type: ignore[assignment]
    return made


def _plain(
    linears: Sequence[nn.Linear], parts: Sequence[range], axis: int, device: torch.device, biased: bool
) -> FewRowsLinear:
    pairs = list(zip(linears, parts, strict=True))
    weight = torch.cat([taken(each.weight.detach(), [part], axis).to(device) for each, part in pairs])
    bias = None
    if biased and linears[0].bias is not None:
        whole = [taken(each.bias.detach(), [part]) if axis == ROWS else each.bias.detach() for each, part in pairs]
        bias = torch.cat([each.to(device) for each in whole])
    return FewRowsLinear.of(weight, bias)


def _packed(linear: PackedLinear, part: range, axis: int, biased: bool) -> PackedLinear:
    if axis != ROWS and linear.columns is not None:
        raise ValueError("o_proj has its columns in an order of their own (act-order), across the heads of all ranks")
    cut, bias = (cut_rows, cut_columns)[axis], linear.bias if biased else None
    if bias is not None:
        bias = (bias[part.start : part.stop] if axis == ROWS else bias).clone()
    return PackedLinear.of(cut(linear.packed, part.start, part.stop), bias, linear.dtype)


def whole_on(matrix: Tensor | Packed, device: torch.device) -> Tensor | Packed:
    """A copy on a device."""
    if isinstance(matrix, Tensor):
        return matrix.detach().to(device, copy=True)
    return Packed(*(each.to(device, copy=True) if isinstance(each, Tensor) else each for each in matrix))


def rows_of(matrix: Tensor | Packed, rows: range, dtype: torch.dtype, order: RowOrder) -> FewRowsLinear | PackedLinear:
    """A layer of some rows of a matrix, which it reads where they lie. dtype: of what it computes."""
    if isinstance(matrix, Tensor):
        made: FewRowsLinear | PackedLinear = FewRowsLinear.of(taken(matrix, [rows]))
    else:
        some = slice(rows.start, rows.stop)
        made = PackedLinear.of(
            matrix._replace(words=matrix.words[some], scales=matrix.scales[:, some].contiguous()), None, dtype
        )
    made.order = order
    return made


def in_order_of_down(layer: LlamaLayer) -> LlamaLayer:
    """A layer whose `down` has its columns as they come: the rows of gate and up are in their order instead."""
    down: Any = layer.down
    if not isinstance(down, PackedLinear) or down.columns is None:
        return layer
    order = down.columns.long()
    plain = PackedLinear.of(down.packed._replace(order=None), down.bias, down.dtype)
    return layer._replace(gate=_reordered(layer.gate, order), up=_reordered(layer.up, order), down=plain)  # type: ignore[arg-type]


def _reordered(linear: Any, order: Tensor) -> FewRowsLinear | PackedLinear:
    """A layer with its rows in this order."""
    bias = None if linear.bias is None else linear.bias[order]
    if not isinstance(linear, PackedLinear):
        return FewRowsLinear.of(linear.weight[order], bias)
    whole = linear.packed
    zeros = None if whole.zeros is None else whole.zeros[:, order]
    packed = whole._replace(words=whole.words[order], scales=whole.scales[:, order], zeros=zeros)
    return PackedLinear.of(packed, bias, linear.dtype)


def tensors_of(linear: PartLinear) -> list[Tensor]:
    """All that takes memory."""
    return [*linear.parameters(), *linear.buffers()]
