"""The ends of a target, embedding and lm_head, plain or packed: a row for every token, which the draft head reads too.

V rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from eagle_fast_kernels.packed import Packed
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.layers.embedding import PackedEmbedding
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.target.twin import stored_weight


def ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """(embedding, lm_head)"""
    return model.get_input_embeddings(), model.get_output_embeddings()


def is_packed(end: nn.Module) -> bool:
    return isinstance(end, (PackedEmbedding, PackedLinear))


def matrix(end: Any) -> Tensor | Packed:
    """[V, H], wherever it is stored while no forward runs."""
    return end.packed if is_packed(end) else stored_weight(end)


def dense_matrix(end: Any) -> Tensor:
    """[V, H] in floats; a copy of one that is packed."""
    if is_packed(end):
        return (end.rows if isinstance(end, PackedEmbedding) else end).dense()
    return end.weight.detach()


def num_rows(end: Any) -> int:
    return end.packed.out_features if is_packed(end) else end.weight.shape[0]


def dtype_of(end: Any) -> torch.dtype:
    """Of what it computes."""
    return end.dtype if is_packed(end) else end.weight.dtype


def device_of(end: Any) -> torch.device:
    """That it is stored on while no forward runs."""
    return end.device if is_packed(end) else stored_weight(end).device


def are_tied(embedding: Any, lm_head: Any) -> bool:
    """Whether both read one weight."""
    return _held(embedding) is _held(lm_head)


def _held(end: Any) -> Tensor:
    end = end.rows if isinstance(end, PackedEmbedding) else end
    return end.words if hasattr(end, "words") else getattr(end, "weight", end)  # what is yet to be packed may have none
