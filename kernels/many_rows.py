"""Products of more rows than `linear.py`'s kernel is fast for, with the bits that it gives each (16 bits, a GPU).

cuBLAS is faster there, and adds up along K in the order of the kernel's matrix instructions, wherever it does not cut K
into parts of its own: which it does for some numbers of rows. So every number of rows is tried once, on random numbers:
the product in one call, then by the parts of K that the kernel has, then both with more rows, which are padding. The
first whose bits are the kernel's is taken from then on; where none is, the kernel itself, which reads the weight once
for every 128 rows. Tried on an H100 (cuBLAS 13.0), 13 numbers of rows from 65 to 2,048, eight weights: one
call is right for all weights that the kernel does not cut, a batch of the parts of K for those that it does.

Bytes and flops: those of the product, and parts of it written in fp32, 4 S R N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .check import HALVES, flag
from .linear import few_rows_matmul, few_rows_sums, gated_matmul, kernel_product, part_bounds, streams
from .rms_norm import sum_parts_ref
from .silu_mul import silu_mul

PADDED = (128, 256)  # multiples of rows that are tried as well
TINY = 2.0**-20  # of a bias that hides no rounding
# whether a product comes by parts: never, as it is faster, or always
WHOLE, EITHER, PARTS = (False,), (False, True), (True,)


class Way(NamedTuple):
    """rows: as many as the call to cuBLAS has; by_part: the parts of K as a batch."""

    rows: int
    by_part: bool


class Shape(NamedTuple):
    """Of a product, all that cuBLAS may choose by."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    inner: int
    biased: bool
    settings: tuple[object, ...]  # torch's, of all products


def row_invariant_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`few_rows_matmul` with its bits for any number of rows, where it has them: on a GPU, in 16 bits."""
    if not _takes(x, weight):
        return few_rows_matmul(x, weight, bias=bias)
    return _product(x, weight, bias, WHOLE)


def row_invariant_sums(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rounded: bool = True) -> Tensor:
    """`few_rows_sums` in the same way. rounded: or what they add up to, [..., N] in x's dtype, to the same bits."""
    if not _takes(x, weight):
        return few_rows_sums(x, weight, bias=bias)
    return _product(x, weight, bias, EITHER if flag("rounded", rounded) else PARTS)


def row_invariant_gated(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gated_matmul` in the same way."""
    if not _takes(x, weight, gated=True):
        return gated_matmul(x, weight, bias=bias)
    gate_up = _product(x, weight, bias, WHOLE)
    return silu_mul(gate_up.view(-1, len(weight))).view(*x.shape[:-1], len(weight) // 2)


def _takes(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether there are more rows than the kernel takes, which it would take if they were fewer."""
    if not x.is_cuda or x.dtype not in HALVES or streams(x, weight, gated=gated):
        return False
    return streams(x[(0,) * (x.dim() - 1)], weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, forms: tuple[bool, ...]) -> Tensor:
    """[..., N] in x's dtype, or parts, fp32 [S, ..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    aligned = all(
        each.data_ptr() % 16 == 0 and each.stride(0) * each.element_size() % 16 == 0 for each in (rows, weight)
    )
    way = None
    if aligned and rows.stride(1) == 1:
        columns, inner = weight.shape
        way = exact_way(
            Shape(x.device, x.dtype, len(rows), columns, inner, bias is not None, settings_of_torch()), forms
        )
    out = _by_torch(rows, weight, bias, way) if way else kernel_product(rows, weight, None, bias, split=True in forms)
    return out.view(*out.shape[:-2], *x.shape[:-1], len(weight))


def settings_of_torch() -> tuple[object, ...]:
    """What a user may set that changes how cuBLAS adds up, or what takes its place."""
    cuda = torch.backends.cuda
    reduced = cuda.matmul.allow_bf16_reduced_precision_reduction, cuda.matmul.allow_fp16_reduced_precision_reduction
    return (*reduced, cuda.preferred_blas_library(), torch.are_deterministic_algorithms_enabled())


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N]: [R, N], or parts of it, fp32 [S, R, N]."""
    num_rows = len(x)
    if way.rows > num_rows:
        x = F.pad(x, (0, 0, 0, way.rows - num_rows))
    if not way.by_part:
        return F.linear(x, weight, bias)[:num_rows]
    parts = products_by_part(x, weight, part_bounds(weight))
    if bias is not None:
        parts[0] += bias
    return parts[:, :num_rows]


def products_by_part(x: Tensor, weight: Tensor, bounds: Sequence[int]) -> Tensor:
    """x [R, K] times weight [N, K] transposed, by the parts of K that lie between bounds: fp32 [S, R, N]."""
    sizes = {high - low for low, high in pairwise(bounds)}
    if len(sizes) == 1:
        size = sizes.pop()
        of_x, of_weight = x.unflatten(1, (-1, size)), weight.unflatten(1, (-1, size))
        return torch.bmm(of_x.transpose(0, 1), of_weight.permute(1, 2, 0), out_dtype=torch.float32)
    out = x.new_empty(len(bounds) - 1, len(x), len(weight), dtype=torch.float32)
    for part, (low, high) in zip(out, pairwise(bounds), strict=True):
        torch.mm(x[:, low:high], weight[:, low:high].T, out_dtype=torch.float32, out=part)
    return out


def ways(rows: int, forms: tuple[bool, ...]) -> Iterator[Way]:
    for multiple in (1, *PADDED):
        padded = -(-rows // multiple) * multiple
        if multiple == 1 or padded > rows:
            for by_part in forms:
                yield Way(padded, by_part)


def first_exact(
    expected: Tensor, rows: int, dtype: torch.dtype, forms: tuple[bool, ...], product: Callable[[Way], Tensor]
) -> Way | None:
    """The first way whose product has the bits of the kernel's: [R, N], or where forms have parts these, [S, R, N]."""
    whole = sum_parts_ref(expected, dtype) if True in forms else expected
    for way in ways(rows, forms):
        if torch.equal(product(way), expected if way.by_part else whole):
            return way
    return None


@functools.cache
def exact_way(shape: Shape, forms: tuple[bool, ...]) -> Way | None:
    """The first way that gives the bits of the kernel; None where there is none, or no memory to try. Waits for the
    device, once for each shape."""
    try:
        x, weight, bias = trial(shape)
        expected = kernel_product(x, weight, None, bias, split=True in forms)
        return first_exact(expected, shape.rows, shape.dtype, forms, lambda way: _by_torch(x, weight, bias, way))
    except torch.OutOfMemoryError:
        return None


def trial(shape: Shape) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [R, K], a weight [N, K] and a bias [N] or None, to tell orders of additions apart by."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=shape.device, dtype=shape.dtype)

    x, weight = normal(shape.rows, shape.inner), normal(shape.columns, shape.inner)
    cancel(x, weight, generator)
    return x, weight, normal(shape.columns) * TINY if shape.biased else None


def cancel(x: Tensor, weight: Tensor, generator: torch.Generator) -> None:
    """Make terms of x [R, K] times a weight [N, K] cancel, in place: what is left of a sum is its roundings, and 16
    bits show them all. Of terms that don't cancel they show one rounding in ten thousand, and a large bias hides it."""
    half = x.shape[1] // 2
    order = torch.randperm(half, generator=generator, device=x.device)
    x[:, half : 2 * half] = -x[:, order]
    weight[:, half : 2 * half] = weight[:, order]
    x[:, 2 * half :] = 0
