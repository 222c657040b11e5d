"""What the wrappers of `draft_head` ask of their inputs. Shapes as there."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import (
    ANY,
    BY_ROWS,
    FLOAT32,
    FLOATS,
    HUGE,
    INT64,
    MOST_BLOCKS,
    given_together,
    number,
    tensor,
    written,
)
from .embedding import check_table
from .packed_layout import Packed
from .rms_norm import MOST_COLUMNS

INT32 = (torch.int32,)


def check_head_input(
    tokens: Tensor, hidden: Tensor, embedding: Tensor | Packed, embed_norm: Tensor | None, hidden_norm: Tensor | None,
    eps: float, rows: Tensor | None,
) -> float:  # fmt: skip
    """Raise ValueError unless all of them fit; eps comes back."""
    num_hidden, hidden_size = tensor("hidden", hidden, "N H", FLOATS, layout=BY_ROWS)
    near = ("hidden", hidden)
    if isinstance(embedding, Packed):
        embed_size = check_table("embedding", embedding)[1]
        given = "embedding.words", embedding.words
        tensor(*given, "V W", INT32, near=near)
    else:
        given = "embedding", embedding
        embed_size = tensor(*given, "V E", FLOATS, near=near, layout=BY_ROWS)[1]
    if rows is None:
        tensor("tokens", tokens, "N", INT64, (num_hidden,), near=near)
    else:
        num_rows = tensor("tokens", tokens, "R", INT64, near=near)[0]
        tensor("rows", rows, "R", INT64, (num_rows,), near=("tokens", tokens))
    if embed_norm is not None:
        tensor("embed_norm", embed_norm, "E", FLOATS, (embed_size,), near=given)
    if hidden_norm is not None:
        tensor("hidden_norm", hidden_norm, "H", FLOATS, (hidden_size,), near=near)
    if max(embed_size, hidden_size) > MOST_COLUMNS:
        raise ValueError(f"embedding has E = {embed_size}, hidden H = {hidden_size}; expected at most {MOST_COLUMNS}")
    return number("eps", eps, 0, HUGE)


def check_rope_append(
    qkv: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, k_slab: Tensor, v_slab: Tensor, slots: Tensor,
    num_heads: int, num_kv_heads: int, q_norm: Tensor | None, k_norm: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError unless all of them fit, and nothing lies in memory where keys and values are written."""
    in_parts = isinstance(qkv, Tensor) and qkv.dim() == 4
    dims, dtypes = ("S B T (Hq+2Hkv)D", FLOAT32) if in_parts else ("B T (Hq+2Hkv)D", FLOATS)
    num_sequences, num_rows, width = tensor("qkv", qkv, dims, dtypes, layout=BY_ROWS)[-3:]
    near, of_slab = ("qkv", qkv), (num_sequences, None, None, None)
    slab_shape = tensor("k_slab", k_slab, "B Hkv L D", FLOATS, of_slab, near=near, layout=BY_ROWS)
    _, slab_heads, capacity, head_dim = slab_shape
    tensor("v_slab", v_slab, "B Hkv L D", (k_slab.dtype,), slab_shape, near=("k_slab", k_slab), layout=BY_ROWS)
    num_positions, rotary_dim = tensor("cos", cos, "P R", FLOATS, near=near)
    tensor("sin", sin, "P R", FLOATS, cos.shape, near=("cos", cos))
    tensor("slots", slots, "B", INT64, (num_sequences,), near=near)
    if positions is not None:
        tensor("positions", positions, "B T", INT64, (num_sequences, num_rows), near=near, layout=ANY)
    if given_together(q_norm=q_norm, k_norm=k_norm):
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            tensor(name, norm, "D", FLOATS, (head_dim,), near=("k_slab", k_slab))
    num_parts = num_heads + 2 * num_kv_heads
    if slab_heads != num_kv_heads or width != num_parts * head_dim or num_parts > MOST_BLOCKS:
        raise ValueError(
            f"qkv has rows of {width}, k_slab Hkv = {slab_heads} and D = {head_dim}; expected, with num_heads = "
            f"{num_heads} and num_kv_heads = {num_kv_heads}, rows of (Hq + 2 Hkv) D = {num_parts * head_dim}, Hkv = "
            f"{num_kv_heads} and at most {MOST_BLOCKS} heads"
        )
    if rotary_dim % 2 or rotary_dim > head_dim or head_dim > MOST_COLUMNS:
        raise ValueError(
            f"cos has R = {rotary_dim} columns, k_slab D = {head_dim}; expected an even R, R <= D and D of at most "
            f"{MOST_COLUMNS}"
        )
    if num_rows > capacity:
        raise ValueError(f"qkv has T = {num_rows} rows; expected at most L = {capacity}, the rows of k_slab")
    if positions is None and num_sequences * num_rows > num_positions:
        raise ValueError(
            f"positions is None and qkv has B T = {num_sequences * num_rows} rows; expected at most P = "
            f"{num_positions}, the rows of cos"
        )
    others = {"positions": positions, "cos": cos, "sin": sin, "slots": slots, "q_norm": q_norm, "k_norm": k_norm}
    written([("k_slab", k_slab), ("v_slab", v_slab)], [near, *others.items()])
