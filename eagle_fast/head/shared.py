"""What a head takes from its target where its checkpoint has none of its own: the embedding, and lm_head.

The target's matrices are floats, or packed (`kernels/packed.py`).
"""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

import torch
from eagle_fast_kernels.embedding import embedding_rows
from eagle_fast_kernels.packed import Packed, unpack
from eagle_fast_kernels.packed_layout import unstripe
from torch import Tensor

from eagle_fast.layers.embedding import PackedEmbedding, int8_rows
from eagle_fast.layers.packed import PackedLinear

Matrix: TypeAlias = Tensor | Packed


def targets_rows(what: str, given: Matrix | None, rows: int, columns: int) -> Matrix:
    """The first rows of one of the target's matrices, of which it may have more. ValueError if it does not fit."""
    if not usable(given, rows, columns):
        found = "none" if given is None else f"{list(shape_of(given))} {_held(given)}"
        raise ValueError(f"the head shares the target's {what}: pass it as {[rows, columns]} floats, got {found}")
    if not isinstance(given, Packed):
        return given.detach()[:rows]
    zeros = None if given.zeros is None else given.zeros[:, :rows]
    return given._replace(words=given.words[:rows], scales=given.scales[:, :rows], zeros=zeros)


def targets_if_same(own: Tensor, given: Matrix | None, dtype: torch.dtype, device: torch.device) -> Matrix:
    """EAGLE-1 files often repeat the target's matrices: use the target's then, and save the memory."""
    if not usable(given, *own.shape):
        return own
    if isinstance(given, Packed):
        shared, rounded = targets_rows("", given, *own.shape), int8_rows(own)
        assert isinstance(shared, Packed)
        same = shared.kind == "int8" and torch.equal(rounded.words.to(shared.words.device), shared.words)
        return shared if same and torch.equal(rounded.scales.to(shared.scales.device), shared.scales) else own
    shared = given.detach()[: len(own)].to(device, dtype)
    return shared if torch.equal(own, shared) else own


def usable(matrix: Matrix | None, rows: int, columns: int) -> TypeGuard[Matrix]:
    """Whether these are that many rows of floats, or more, that can be read."""
    if matrix is None:
        return False
    first, *others = shape_of(matrix)
    fits = first >= rows and others == [columns]
    return fits and (isinstance(matrix, Packed) or (matrix.is_floating_point() and not matrix.is_meta))


def shape_of(matrix: Matrix) -> tuple[int, ...]:
    return (matrix.out_features, matrix.in_features) if isinstance(matrix, Packed) else tuple(matrix.shape)


def rows_of(matrix: Matrix, rows: range, dtype: torch.dtype) -> Tensor:
    """Some rows as floats, on the CPU."""
    if not isinstance(matrix, Packed):
        return matrix[rows.start : rows.stop].detach().to("cpu", dtype)
    return embedding_rows(torch.tensor(rows, device=matrix.words.device), matrix, dtype).cpu()


def embedding_over(matrix: Packed, dtype: torch.dtype, device: torch.device) -> PackedEmbedding:
    """An embedding of the same tensors, where they are there already."""
    return PackedEmbedding(PackedLinear.of(matrix, None, dtype)).to(device)


def as_lm_head(matrix: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], scales [V]) of a packed lm_head: int8, or floats in dtype without scales. Copies: `lm_head_topk`
    reads rows as they are."""
    if matrix.kind != "int8" or len(matrix.scales) > 1 or matrix.zeros is not None or matrix.order is not None:
        return unpack(matrix, dtype), None
    codes = unstripe(matrix.words, matrix.kind, matrix.in_features)
    return (codes ^ 128).view(torch.int8), matrix.scales[0].float()


def _held(matrix: Matrix) -> str:
    return f"{matrix.kind} packed" if isinstance(matrix, Packed) else f"{matrix.dtype} on {matrix.device}"
