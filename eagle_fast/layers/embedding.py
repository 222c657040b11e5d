"""Embeddings over rows in int8, packed as an lm_head's weight is: a tied weight is stored once, and both read it."""

from __future__ import annotations

import torch
from eagle_fast_kernels.embedding import embedding_rows
from eagle_fast_kernels.packed import Packed, pack
from torch import Tensor, nn

from .linear import quantize
from .packed import PackedLinear


class PackedEmbedding(nn.Module):
    """What nn.Embedding is, over the rows of a packed weight [V, E], which may be an lm_head's: frozen."""

    def __init__(self, rows: PackedLinear):
        super().__init__()
        self.rows = rows

    @property
    def packed(self) -> Packed:
        return self.rows.packed

    @property
    def num_embeddings(self) -> int:
        return self.rows.out_features

    @property
    def embedding_dim(self) -> int:
        return self.rows.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of what it returns."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> [..., E]."""
        return embedding_rows(input.long(), self.packed, self.dtype)


def int8_rows(weight: Tensor) -> Packed:
    """weight [N, K] in int8 with a scale for each row, see `quantize`."""
    numbers, scales = quantize(weight)
    return pack(numbers.view(torch.uint8) ^ 128, scales[:, None], kind="int8")
