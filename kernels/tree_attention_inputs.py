"""What `tree_attention` and its kernels ask of their inputs. Shapes as there."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import BY_ROWS, FLOATS, INT64, INTEGERS, MOST_BLOCKS, tensor


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, first: int, dtypes: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    """Raise ValueError unless all shapes, dtypes, devices and strides fit."""
    num_sequences, num_heads, num_queries, head_dim = tensor("q", q, "B Hq T D", dtypes, layout=BY_ROWS)
    near, of_keys = ("q", q), (num_sequences, None, None, head_dim)
    _, num_kv_heads, num_rows, _ = tensor("k", k, "B Hkv L D", (q.dtype,), of_keys, near=near, layout=BY_ROWS)
    tensor("v", v, "B Hkv L D", (q.dtype,), k.shape, near=("k", k), layout=BY_ROWS)
    tensor("lengths", lengths, "B", INTEGERS, (num_sequences,), near=near)
    of_queries = (num_sequences, num_queries, None)
    num_words = tensor("ancestors", ancestors, "B T W", INT64, of_queries, near=near, layout=BY_ROWS)[2]
    if num_heads % num_kv_heads or num_sequences * num_kv_heads > MOST_BLOCKS:
        raise ValueError(
            f"q has Hq = {num_heads}, k has Hkv = {num_kv_heads} and B = {num_sequences}; expected Hq to be a multiple "
            f"of Hkv and B Hkv at most {MOST_BLOCKS}"
        )
    if first + num_queries > min(num_rows, 64 * num_words):
        raise ValueError(
            f"q has T = {num_queries} rows from first={first} on; expected first + T of at most L = {num_rows}, the "
            f"rows of k, and 64 W = {64 * num_words}, the bits of ancestors"
        )


def check_options(q: Tensor, first: int, depths: Tensor | None, by_position: bool, sinks: Tensor | None) -> None:
    """The same for what not every call has; `by_position`: depths are needed."""
    num_sequences, num_heads, num_queries, _ = q.shape
    if sinks is not None:
        tensor("sinks", sinks, "Hq", FLOATS, (num_heads,), near=("q", q))
    if depths is not None:
        num_slots = tensor("depths", depths, "B N", INTEGERS, (num_sequences, None), near=("q", q), layout=BY_ROWS)[1]
        if first + num_queries > num_slots:
            raise ValueError(
                f"depths has N = {num_slots} slots; expected at least first + T = {first} + {num_queries}, T as in q"
            )
    elif by_position:
        raise ValueError("depths is None, but window and chunk compare positions: pass the depths of the tree slots")
