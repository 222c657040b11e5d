"""AdamW on fp32 master weights, for a head that computes in 16 bit; and how its learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

WARM_UP = 100  # steps, if they are less than a twentieth of the training
FINAL = 0.02  # of the peak learning rate


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Linear warm-up, over WARM_UP steps or the first twentieth, then a cosine over the `fraction` that is done."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    warm = min(1.0, max((step + 1) / WARM_UP, 20 * fraction))
    return peak * warm * (FINAL + (1 - FINAL) * cosine)


class MasterAdamW:
    """Steps fp32 copies of the parameters and rounds them back; parameters that are fp32 are their own masters."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float = 0.01, max_norm: float = 1.0):
        self.parameters, self.max_norm = list(parameters), max_norm
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        decayed = [master for master in self.masters if master.dim() > 1]
        others = [master for master in self.masters if master.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=self.masters[0].is_cuda)

    def step(self, rate: float) -> torch.Tensor:
        """One step along the parameters' gradients, which are then gone; returns their norm."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self.masters, self.max_norm)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._round()
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> dict:
        return {"masters": [master.detach() for master in self.masters], "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for master, stored in zip(self.masters, state["masters"], strict=True):
            master.copy_(stored)
        self.adam.load_state_dict(state["adam"])
        self._round()
