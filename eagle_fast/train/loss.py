"""What the head is trained on: cross-entropy of its logits to the target's distribution over the draft vocabulary.

R rows, H hidden size, Vd draft vocabulary. Logits exist for a block of rows at a time: the gradient is computed in the
forward, in place of them, and only its products with lm_head and with the states are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from eagle_fast_kernels.soft_cross_entropy import soft_cross_entropy
from torch import Tensor

BLOCK = 8192  # rows whose logits exist at a time


class Distilled(NamedTuple):
    loss: Tensor  # the weighted sum, differentiable
    losses: Tensor  # [R] fp32
    best: Tensor  # [R] the head's most likely draft id


def distil(states: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Distilled:
    """Loss of states [R, H] through lm_head weight [Vd, H] to targets [R, Vd]; weights [R] of the rows."""
    return Distilled(*_Distil.apply(states, weight, targets, weights))


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, weights: Tensor):
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        losses, best = [], []
        for first in range(0, len(states), BLOCK):
            rows = slice(first, first + BLOCK)
            logits = states[rows] @ weight.T
            found = soft_cross_entropy(logits, targets[rows], weights[rows])
            losses.append(found.losses)
            best.append(found.best)
            if grad_states is not None:
                grad_states[rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ states[rows]
        ctx.grads = grad_states, None if grad_weight is None else grad_weight.to(weight.dtype)
        all_losses = torch.cat(losses)
        chosen = torch.cat(best)
        ctx.mark_non_differentiable(all_losses, chosen)
        return (all_losses * weights).sum(), all_losses, chosen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        grad_states, grad_weight = ctx.grads
        by = gradients[0]
        return (
            None if grad_states is None else grad_states * by,
            None if grad_weight is None else grad_weight * by,
            None,
            None,
        )
