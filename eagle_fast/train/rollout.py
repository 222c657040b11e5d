"""The head run as drafting runs it, step after step on its own hidden states (training-time test, EAGLE-3, 3.2).

B sequences, T rows, J steps, H hidden size, D head size, Hq/Hkv heads, G = Hq / Hkv.

Row i of step 0 reads the target's features of token i and the embedding of token i + 1. Row i of step j reads the
output of row i of step j - 1 and the embedding of token i + 1 + j; it stands at position i + j and predicts token
i + 2 + j. It is the j-th drafted token under a root at i + 1: it sees rows 0..i of step 0, which the drafter has
absorbed, and row i of each later step, its own ancestors. `DraftHead.forward` does the rest, as when drafting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from eagle_fast_kernels.draft_head import rope_ref
from eagle_fast_kernels.rms_norm import given_norm_ref
from torch import Tensor

from eagle_fast.head import DraftHead


def rollout(
    head: DraftHead, tokens: Tensor, features: Tensor, num_steps: int, tables: tuple[Tensor, Tensor]
) -> Iterator[Tensor]:
    """Yield, for each step, the states [B, T, H] that lm_head reads.

    tokens [B, >= T + num_steps]; features [B, T, F] of the first T of them; tables: `head.rope_table` of T + num_steps
    positions or more.
    """
    batch, count = features.shape[:2]
    rows = torch.arange(count, device=features.device).expand(batch, count)
    hidden = head.embed_features(features)
    earlier: dict[int, list[Tensor]] = {index: [] for index in range(head.config.num_layers)}

    def attend(index, layer, qkv, positions):
        query, key, value = _rotated(head, layer, qkv, positions, tables)
        earlier[index] += key, value
        out = _StepAttention.apply(query, layer.scale, *earlier[index])
        return out.transpose(1, 2).flatten(2)

    for step in range(num_steps):
        hidden, states = head(tokens[:, step + 1 : step + 1 + count], hidden, rows + step, attend)
        yield states


def _rotated(head: DraftHead, layer, qkv: Tensor, positions: Tensor, tables) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Hq, T, D], keys and values [B, Hkv, T, D] as the drafter writes them to its cache."""
    config = head.config
    heads = qkv.view(*qkv.shape[:2], -1, config.head_dim)
    query, key, value = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 2)
    query, key = given_norm_ref(query, layer.q_norm, layer.eps), given_norm_ref(key, layer.k_norm, layer.eps)
    query, key = (rope_ref(x, positions, *tables, config.rope_interleaved) for x in (query, key))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _StepAttention(torch.autograd.Function):
    """Causal attention to step 0, joined in one softmax with each row's own keys of later steps.

    Only inputs and the log-sum-exp are kept for the backward, which computes the probabilities again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, scale: float, *earlier: Tensor) -> Tensor:
        query, keys, values = _by_kv_head(query, earlier)
        scores = _causal_scores(query, keys[0], scale)
        own = _own_scores(query, keys[1:], scale)
        peak = torch.maximum(_wide(scores.amax(-1)), own.amax(-1)) if keys[1:] else _wide(scores.amax(-1))
        weights = (scores - peak[..., None]).exp_()
        own_weights = (own - peak[..., None]).exp_()
        total = weights.sum(-1) + own_weights.sum(-1)
        out = _wide(_joined(weights.to(query.dtype), values[0]))
        for step, value in enumerate(values[1:]):
            out.addcmul_(own_weights[..., step, None], _wide(value)[:, :, None])
        out = (out / total[..., None]).to(query.dtype)
        ctx.save_for_backward(query, peak + total.log(), out, *earlier)
        ctx.scale = scale
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        query, lse, out, *earlier = ctx.saved_tensors
        keys, values, scale = earlier[0::2], earlier[1::2], ctx.scale
        grad = gradients[0].reshape(out.shape)
        delta = (_wide(grad) * _wide(out)).sum(-1)
        weights = (_causal_scores(query, keys[0], scale) - lse[..., None]).exp_()
        grad_scores = (_outer(grad, values[0]) - delta[..., None]).mul_(weights).to(query.dtype)
        grad_query = _wide(_joined(grad_scores, keys[0]))
        grads = [_gathered(grad_scores, query) * scale, _gathered(weights.to(query.dtype), grad)]
        own_weights = (_own_scores(query, keys[1:], scale) - lse[..., None]).exp_()
        for step, (key, value) in enumerate(zip(keys[1:], values[1:], strict=True)):
            weight = own_weights[..., step, None]
            grad_own = weight * ((grad * value[:, :, None]).sum(-1, keepdim=True, dtype=delta.dtype) - delta[..., None])
            grad_query.addcmul_(grad_own, _wide(key)[:, :, None])
            grads += (grad_own * query).sum(2).to(key.dtype) * scale, (weight * grad).sum(2).to(value.dtype)
        grad_query = (grad_query * scale).to(query.dtype).flatten(1, 2)
        return grad_query, None, *grads


def _by_kv_head(query: Tensor, earlier: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The query as [B, Hkv, G, T, D], beside the keys and the values."""
    return query.unflatten(1, (earlier[0].shape[1], -1)).contiguous(), earlier[0::2], earlier[1::2]


def _causal_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, Hkv, G, T, T] of the query with keys [B, Hkv, T, D], -inf above the diagonal."""
    count = key.shape[2]
    hidden = torch.ones(count, count, dtype=torch.bool, device=key.device).triu_(1)
    return _outer(query * scale, key).masked_fill_(hidden, float("-inf"))


def _own_scores(query: Tensor, keys, scale: float) -> Tensor:
    """[B, Hkv, G, T, J] fp32: each row with its own key of every later step."""
    if not keys:
        return _wide(query[..., :0])
    wide = torch.promote_types(query.dtype, torch.float32)
    return scale * torch.stack([(query * key[:, :, None]).sum(-1, dtype=wide) for key in keys], -1)


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x [B, Hkv, G, T, D] times y [B, Hkv, T, D] over D: [B, Hkv, G, T, T]."""
    return (x.flatten(2, 3) @ y.transpose(-1, -2)).view(*x.shape[:4], y.shape[2])


def _joined(weights: Tensor, y: Tensor) -> Tensor:
    """weights [B, Hkv, G, T, T] times y [B, Hkv, T, D]: [B, Hkv, G, T, D]."""
    return (weights.flatten(2, 3) @ y).view(*weights.shape[:4], y.shape[3])


def _gathered(weights: Tensor, x: Tensor) -> Tensor:
    """weights [B, Hkv, G, T, T'] times x [B, Hkv, G, T, D] over G and T: [B, Hkv, T', D]."""
    return weights.flatten(2, 3).transpose(-1, -2) @ x.flatten(2, 3)
