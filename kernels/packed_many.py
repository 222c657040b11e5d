"""Products with packed weights of more rows than the kernel is fast for: the weight made dense, then cuBLAS.

    many_*            as `packed.py` has them, of any number of rows
    row_invariant_*   the same with the bits that few rows have (16 bits, a GPU)

As in `many_rows.py` every number of rows is tried once, on random numbers: the product in one call of cuBLAS, by the
parts of K, both with more rows; the first whose bits are the kernel's is taken, and where none is, the kernel.
Where no bits are asked for, one scale a row is multiplied into the weight, which rounds it, and not the sum.

Bytes: the packed weight, and the dense one written and read, 4 N K, SCRATCH of it at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .check import HALVES, flag
from .launch import INTERPRET, device_guard, use_triton
from .many_rows import EITHER, PARTS, TINY, WHOLE, Way, cancel, first_exact, products_by_part, settings_of_torch
from .overlap import dependent_launch
from .packed import launch, packed_gated, packed_matmul, packed_sums, packed_tile, part_bounds, streams
from .packed_kernels import dense_kernel
from .packed_layout import (
    WORDS,
    Packed,
    dense_rows,
    factors_of,
    group_of_kernel,
    has_kernel,
    pack,
    step_columns,
)  # fmt: skip
from .silu_mul import silu_mul

SCRATCH = 2**28  # bytes
BLOCK_N = 64
MOST_FINITE = 126  # code of the largest number of float8_e4m3fn; 127 is NaN
SCALE = 0.7  # of a trial's weights


class PackedShape(NamedTuple):
    """Of a product, all that cuBLAS and the kernel may choose by. columns: of one call."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    bounds: tuple[int, ...]  # of the parts of K
    kind: str
    group_size: int
    zeros: bool
    biased: bool
    settings: tuple[object, ...]


def many_matmul(x: Tensor, packed: Packed, bias: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """`packed_matmul`, of any number of rows."""
    if not _takes(x, packed):
        return packed_matmul(x, packed, bias=bias, factors=factors)
    rows, packed, factors = _prepared(x, packed, factors)
    blocks = [
        F.linear(rows, convert(packed, columns, x.dtype, factors), None if bias is None else bias[columns])
        for columns in _blocks(packed)
    ]
    return _side_by_side(blocks).view(*x.shape[:-1], -1)


def many_gated(x: Tensor, packed: Packed, bias: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """`packed_gated`, of any number of rows."""
    if not _takes(x, packed):
        return packed_gated(x, packed, bias=bias, factors=factors)
    return _gate(many_matmul(x, packed, bias, factors))


def row_invariant_matmul(
    x: Tensor, packed: Packed, bias: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`packed_matmul` with its bits for any number of rows, where it has them: on a GPU, in 16 bits."""
    if not _takes(x, packed):
        return packed_matmul(x, packed, bias=bias, factors=factors)
    return _product(x, packed, bias, factors, WHOLE)


def row_invariant_sums(
    x: Tensor, packed: Packed, bias: Tensor | None = None, factors: Tensor | None = None, *, rounded: bool = True
) -> Tensor:  # fmt: skip
    """`packed_sums` in the same way. rounded: or what they add up to, [..., N] in x's dtype, to the same bits."""
    if not _takes(x, packed):
        return packed_sums(x, packed, bias=bias, factors=factors)
    return _product(x, packed, bias, factors, EITHER if flag("rounded", rounded) else PARTS)


def row_invariant_gated(
    x: Tensor, packed: Packed, bias: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`packed_gated` in the same way."""
    if not _takes(x, packed):
        return packed_gated(x, packed, bias=bias, factors=factors)
    return _gate(_product(x, packed, bias, factors, WHOLE))


def convert(
    packed: Packed, rows: slice, dtype: torch.dtype, factors: Tensor | None = None, *, scaled: bool = True
) -> Tensor:  # fmt: skip
    """Rows of the weight in dtype, with the kernel's order of columns. Without the scale where not `scaled` and there
    is one a row."""
    if dtype not in HALVES or not has_kernel(packed) or not use_triton(packed.words):
        return dense_rows(packed, rows, dtype, scaled=scaled or group_of_kernel(packed) > 0)
    first, last, _ = rows.indices(packed.out_features)
    words, steps = packed.words[first:last], packed.words.shape[1] // WORDS
    factors = factors_of(packed, dtype) if factors is None else factors
    out = words.new_empty(len(words), packed.in_features, dtype=dtype)
    with device_guard(words):
        dense_kernel[(steps, triton.cdiv(len(words), BLOCK_N))](
            words, factors[..., first:], out, len(words), packed.in_features, steps, packed.out_features,
            out.stride(0), KIND=packed.kind, GROUP=group_of_kernel(packed), ZEROS=packed.zeros is not None,
            SCALED=scaled, BLOCK_N=BLOCK_N, EVEN=packed.in_features % step_columns(packed.kind) == 0,
            PTX=not INTERPRET and torch.version.hip is None, num_warps=4, enable_fp_fusion=False,
            **dependent_launch(words.device),
        )  # fmt: skip
    return out


def _takes(x: Tensor, packed: Packed) -> bool:
    """Whether there are more rows than the kernel takes, which it would take if they were fewer."""
    if not x.is_cuda or x.dtype not in HALVES or streams(x, packed):
        return False
    return streams(x[(0,) * (x.dim() - 1)], packed)


def _prepared(x: Tensor, packed: Packed, factors: Tensor | None) -> tuple[Tensor, Packed, Tensor]:
    """Rows of x in the order of the weight's columns, the weight without one, its factors."""
    rows = x.reshape(-1, x.shape[-1])
    if packed.order is not None:
        rows, packed = rows.index_select(1, packed.order), packed._replace(order=None)
    return rows.contiguous(), packed, factors_of(packed, x.dtype) if factors is None else factors


def _blocks(packed: Packed) -> Iterator[slice]:
    """Rows of the weight, of SCRATCH bytes each when dense."""
    size = max(BLOCK_N, SCRATCH // (2 * packed.in_features) // BLOCK_N * BLOCK_N)
    for first in range(0, packed.out_features, size):
        yield slice(first, min(first + size, packed.out_features))


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def _gate(gate_up: Tensor) -> Tensor:
    return silu_mul(gate_up.view(-1, gate_up.shape[-1])).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _product(
    x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor | None, forms: tuple[bool, ...]
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype, or parts, fp32 [S, ..., N]."""
    rows, packed, factors = _prepared(x, packed, factors)
    split = True in forms
    bounds = tuple(part_bounds(packed)) if split else (0, packed.in_features)
    tried = WHOLE if forms == EITHER and len(bounds) == 2 else forms
    blocks = list(_blocks(packed))
    found = [exact_way(_shape(rows, packed, bounds, columns, bias is not None), tried) for columns in blocks]
    exact = [way for way in found if way is not None and (found[0] is None or way.by_part == found[0].by_part)]
    if len(exact) < len(blocks) or rows.data_ptr() % 16 or packed.in_features % 8:
        out = _by_kernel(rows, packed, bias, factors, bounds, split=split)
    else:
        products = zip(blocks, exact, strict=True)
        out = _side_by_side([_by_torch(rows, packed, bias, factors, *each, bounds) for each in products])
    return out.view(*out.shape[:-2], *x.shape[:-1], packed.out_features)


def _shape(x: Tensor, packed: Packed, bounds: tuple[int, ...], columns: slice, biased: bool) -> PackedShape:
    return PackedShape(
        x.device, x.dtype, len(x), columns.stop - columns.start, bounds, packed.kind, packed.group_size,
        packed.zeros is not None, biased, settings_of_torch(),
    )  # fmt: skip


def _by_kernel(
    x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor, bounds: tuple[int, ...], *, split: bool
) -> Tensor:  # fmt: skip
    """[R, N], or parts, fp32 [S, R, N], by the kernel."""
    tile = packed_tile(packed, len(x), split=False)._replace(splits=len(bounds) - 1)
    out = x.new_empty(len(x), packed.out_features)
    if split:
        out = x.new_empty(tile.splits, len(x), packed.out_features, dtype=torch.float32)
    launch(x, packed, bias, factors, out, tile)
    return out


def _by_torch(
    x: Tensor, packed: Packed, bias: Tensor | None, factors: Tensor, columns: slice, way: Way, bounds: tuple[int, ...]
) -> Tensor:  # fmt: skip
    """x [R, K] times rows `columns` of the weight, plus bias: [R, n], or parts of it, fp32 [S, R, n]."""
    num_rows = len(x)
    if way.rows > num_rows:
        x = F.pad(x, (0, 0, 0, way.rows - num_rows))
    weight = convert(packed, columns, x.dtype, factors, scaled=False)
    scale = None if group_of_kernel(packed) else factors[columns]
    bias = None if bias is None else bias[columns]
    if not way.by_part and scale is None:
        return F.linear(x, weight, bias)[:num_rows]
    out = products_by_part(x, weight, bounds if way.by_part else (bounds[0], bounds[-1]))
    if scale is not None:
        out *= scale
    if bias is not None:
        out[0] += bias
    return out[:, :num_rows] if way.by_part else out[0, :num_rows].to(x.dtype)


@functools.cache
def exact_way(shape: PackedShape, forms: tuple[bool, ...]) -> Way | None:
    """The first way that gives the bits of the kernel; None where there is none, or no memory to try. Waits for the
    device, once for each shape."""
    try:
        x, packed, bias = trial(shape)
        factors = factors_of(packed, shape.dtype)
        expected = _by_kernel(x, packed, bias, factors, shape.bounds, split=True in forms)
        everything = slice(0, shape.columns)
        return first_exact(
            expected, shape.rows, shape.dtype, forms,
            lambda way: _by_torch(x, packed, bias, factors, everything, way, shape.bounds),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        return None


def trial(shape: PackedShape) -> tuple[Tensor, Packed, Tensor | None]:
    """x [R, K], a packed weight [N, K] and a bias [N] or None, to tell orders of additions apart by: see `cancel`."""
    generator = torch.Generator(shape.device).manual_seed(0)
    inner, most = shape.bounds[-1], 16 if shape.kind == "int4" else 256

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=shape.device, dtype=shape.dtype)

    def integers(*size: int) -> Tensor:
        return torch.randint(0, most, size, generator=generator, device=shape.device, dtype=torch.uint8)

    x, codes = normal(shape.rows, inner), integers(shape.columns, inner)
    if shape.kind == "fp8":
        codes[codes & 127 > MOST_FINITE] = 0
    cancel(x, codes, generator)
    scales = torch.full((shape.columns, -(-inner // shape.group_size)), SCALE, device=shape.device)
    zeros = integers(shape.columns, 1).expand_as(scales) if shape.zeros else None
    packed = pack(
        codes.view(torch.float8_e4m3fn) if shape.kind == "fp8" else codes, scales, kind=shape.kind, zeros=zeros,
        group_size=shape.group_size,
    )  # fmt: skip
    return x, packed, normal(shape.columns) * TINY if shape.biased else None
