"""A CPU on which no row depends on how many others there are: every product takes one row, attention one query."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_fast.layers import attention
from eagle_fast.layers.linear import FewRowsLinear


def compute_row_by_row(monkeypatch) -> None:
    for name in ("forward", "sums", "gated"):
        monkeypatch.setattr(FewRowsLinear, name, _each_row(getattr(FewRowsLinear, name)))
    monkeypatch.setattr(attention, "tree_attention", _each_query)


def _each_row(product):
    def of_rows(self: FewRowsLinear, x: Tensor) -> Tensor:
        rows = [product(self, row.clone()[None]) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).view(*x.shape[:-1], -1)

    return of_rows


def _each_query(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, *, scale: float, **_) -> Tensor:
    """Of a tree's nodes, over the prefix and their ancestors alone; for models without windows and the like."""
    out = torch.empty_like(q).transpose(1, 2).contiguous()  # [B, T, Hq, D]
    groups = q.shape[1] // k.shape[1]
    for b, t in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[2])).tolist():
        length = int(lengths[b])
        rows = [*range(length), *(length + j for j in range(q.shape[2]) if int(ancestors[b, t, 0]) >> j & 1)]
        keys, values = (each[b][:, rows].repeat_interleave(groups, 0) for each in (k, v))
        weights = ((keys * q[b, :, t, None]).sum(-1) * scale).softmax(-1)
        out[b, t] = (weights[..., None] * values).sum(1)
    return out
