"""Learning from one lesson: the loss over the steps of a rollout, and how often the head agrees with the target.

J steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eagle_fast.head import DraftHead
from eagle_fast.train.loss import distil
from eagle_fast.train.rollout import rollout
from eagle_fast.train.teacher import Lesson


class Learned(NamedTuple):
    loss: Tensor  # scalar, differentiable
    losses: Tensor  # [J] mean over rows, without the steps' weights
    agreement: Tensor  # [J] share of rows whose most likely token is the target's


def learn(
    head: DraftHead, lesson: Lesson, num_steps: int, decay: float, tables: tuple[Tensor, Tensor] | None = None
) -> Learned:
    """Cross-entropy over all rows asked, step j weighted by decay ** j.

    tables: `head.rope_table` for the longest lesson, so that it is not made for each.
    """
    tables = tables or head.rope_table(lesson.features.shape[1] + num_steps)
    assert head.lm_head_bias is None
    weights = torch.full((len(lesson.asked),), 1 / len(lesson.asked), device=lesson.features.device)
    loss = torch.zeros((), device=lesson.features.device)
    losses, agreement = [], []
    for step, states in enumerate(rollout(head, lesson.tokens, lesson.features, num_steps, tables)):
        rows = states.flatten(0, 1).index_select(0, lesson.asked - 1 - step)
        distilled = distil(rows, head.lm_head_weight, lesson.targets, weights * decay**step)
        loss = loss + distilled.loss
        losses.append(distilled.losses.mean())
        agreement.append((distilled.best == lesson.best).float().mean())
    return Learned(loss, torch.stack(losses).detach(), torch.stack(agreement))


def chain_tau(agreement: list[float]) -> float:
    """Tokens a round that a chain as long as the rollout would get: 1 and the products of the steps' agreement."""
    tau = reached = 1.0
    for share in agreement:
        reached *= share
        tau += reached
    return tau
