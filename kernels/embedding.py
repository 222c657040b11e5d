"""Rows of a table in int8 with a scale a row, packed as a weight that an lm_head may read as well (`packed_layout.py`).

    embedding_rows   out[..., :] = codes[tokens] * scale[tokens], in fp32, rounded once

R tokens, E embedding width, V rows of the table. Bytes: R E read, R E written in the dtype asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import ANY, FLOATS, HALVES, INT64, described, tensor
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch
from .packed_layout import Packed, unstripe
from .rms_norm import num_warps


@triton.jit
def packed_columns(row_ptr, scale, i, mask, DTYPE: tl.constexpr):
    """Columns i of a row of signed bytes that lies packed at row_ptr, times its scale."""
    # column of a step of 128: 32 words, in pairs; which word of a pair, which byte of its half, which half
    place = i // 128 * 128 + i % 32 // 2 * 8 + i % 128 // 64 * 4 + i % 64 // 32 + i % 2 * 2
    return (tl.load(row_ptr + place, mask=mask, other=0).to(tl.float32) * scale).to(DTYPE)


@triton.jit
def _embedding_kernel(
    tokens_ptr, bytes_ptr, scale_ptr, out_ptr, stride, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row)
    x = packed_columns(bytes_ptr + token * stride, tl.load(scale_ptr + token), i, i < E, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * E + i, x, mask=i < E)


def check_table(name: str, table: Packed) -> torch.Size:
    """The shape [V, E] of a packed table. ValueError unless it is int8 with a scale a row."""
    if not isinstance(table, Packed):
        raise ValueError(f"{name} is {described(table)}; expected a weight as `pack` makes it")
    if table.kind != "int8" or len(table.scales) != 1 or table.zeros is not None or table.order is not None:
        raise ValueError(
            f"{name} is packed as {table.kind}, {len(table.scales)} scales a row; expected int8 with one, and neither "
            "zero points nor an order of columns"
        )
    return torch.Size((table.out_features, table.in_features))


def embedding_rows(tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """Rows [..., E] in dtype of tokens [...]."""
    check_table("table", table)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(map(str, FLOATS))}")
    tensor("tokens", tokens, "...", INT64, near=("table.words", table.words), layout=ANY, empty=True)
    if not tokens.numel():
        return table.scales.new_empty(*tokens.shape, table.in_features, dtype=dtype)
    if dtype not in (*HALVES, torch.float32) or not use_triton(table.words):
        return embedding_rows_ref(tokens, table, dtype)
    tokens = tokens.contiguous()
    out = table.words.new_empty(*tokens.shape, table.in_features, dtype=dtype)
    block = triton.next_power_of_2(table.in_features)
    with device_guard(tokens):
        _embedding_kernel[(tokens.numel(),)](
            tokens, *bytes_and_scales(table), out, table.words.stride(0) * 4, E=table.in_features, BLOCK=block,
            num_warps=num_warps(block), **dependent_launch(tokens.device),
        )  # fmt: skip
    return out


def bytes_and_scales(table: Packed) -> tuple[Tensor, Tensor]:
    """What `packed_columns` reads: signed bytes [V, steps * 128], fp32 [V]."""
    return table.words.view(torch.int8), table.scales[0].float()


def embedding_rows_ref(tokens: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """`embedding_rows` in plain PyTorch."""
    ids = tokens.reshape(-1)
    wide = torch.promote_types(dtype, torch.float32)
    rows = unstripe(table.words[ids], table.kind, table.in_features).to(wide) - 128
    rows *= table.scales[0, ids, None].to(wide)
    return rows.to(dtype).view(*tokens.shape, table.in_features)
