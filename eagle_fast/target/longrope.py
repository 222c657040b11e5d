"""Rotary embeddings whose frequencies depend on the sequence length (longrope of Phi-3, Phi-4-mini).

The stock module asks the device on every call whether the longest position passed the original training length, and a
sequence that passes it switches from short to long frequencies for all of its keys (stock `generate` recomputes the
cache there). Here the choice is a tensor, one flag a sequence, which the decoding loop sets when it prefills.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def rope_types(config) -> set[str]:
    """The rope types that a config names, for all layers or per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not isinstance(parameters, dict):
        return set()
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each["rope_type"]) for each in [parameters, *nested] if "rope_type" in each}


class LongRope(nn.Module):
    """Stands in for a stock longrope module: same cos and sin, without the host read."""

    long_inv_freq: torch.Tensor  # [D / 2]
    short_inv_freq: torch.Tensor  # [D / 2]

    def __init__(self, stock: Any, switch: int):
        super().__init__()
        device = stock.inv_freq.device
        probe = torch.zeros(1, device=device)
        stock(probe, torch.tensor([[switch]], device=device))
        self.register_buffer("long_inv_freq", stock.inv_freq.clone(), persistent=False)
        stock(probe, torch.zeros(1, 1, dtype=torch.long, device=device))
        self.register_buffer("short_inv_freq", stock.inv_freq.clone(), persistent=False)
        self.attention_scaling = stock.attention_scaling
        self.long_rows: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [B, T, D] in x's dtype for position_ids [B, T]."""
        inv_freq = self.short_inv_freq[None].expand(position_ids.shape[0], -1)
        if self.long_rows is not None:
            inv_freq = torch.where(self.long_rows[:, None], self.long_inv_freq, inv_freq)
        angles = (inv_freq[:, :, None].float() @ position_ids[:, None, :].float()).transpose(1, 2)
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def freeze_longrope(model: nn.Module, config) -> int:
    """Replace every longrope module of `model`; returns the length past which sequences use long frequencies."""
    switch = int(config.rope_parameters["original_max_position_embeddings"])
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and getattr(child, "rope_type", None) == "longrope":
                module._modules[name] = LongRope(child, switch)
    return switch
