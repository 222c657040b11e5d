"""Rotary embeddings whose frequencies depend on the sequence length (longrope of Phi-3, Phi-4-mini).

The stock module asks the device on every call whether the longest position passed the original training length, and a
sequence that passes it switches from short to long frequencies for all of its keys (stock `generate` recomputes the
cache there). Here the choice is a tensor, one flag per sequence, which lies beside the keys that it is true of.
"""

from __future__ import annotations

import torch
from torch import nn

from eagle_fast.target.anatomy import alpha_rope_modules, longrope_modules, longrope_tables


class LongRope(nn.Module):
    """Stands in for a stock longrope module: same cos and sin, without the host read."""

    long_inv_freq: torch.Tensor  # [D / 2]
    short_inv_freq: torch.Tensor  # [D / 2]

    def __init__(self, stock: nn.Module, switch: int):
        super().__init__()
        tables = longrope_tables(stock, switch)
        self.register_buffer("long_inv_freq", tables.long, persistent=False)
        self.register_buffer("short_inv_freq", tables.short, persistent=False)
        self.attention_scaling = tables.scaling
        self.long_rows: torch.Tensor | None = None  # [B] of the running forward; None: all are short

    @property
    def device(self) -> torch.device:
        return self.long_inv_freq.device

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [B, T, D] in x's dtype for position_ids [B, T]."""
        inv_freq = self.short_inv_freq[None].expand(position_ids.shape[0], -1)
        if self.long_rows is not None:
            inv_freq = torch.where(self.long_rows[:, None], self.long_inv_freq, inv_freq)
        angles = (inv_freq[:, :, None].float() @ position_ids[:, None, :].float()).transpose(1, 2)
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def freeze_longrope(model: nn.Module, switch: int) -> None:
    """Replace every longrope module of `model`; switch: the length past which sequences use long frequencies."""
    for parent, name, stock in longrope_modules(model):
        parent._modules[name] = LongRope(stock, switch)


def freeze_alpha_rope(model: nn.Module) -> bool:
    """Keep a twin's rotary embeddings of Hunyuan's kind as they are, see `alpha_rope_modules`; False if it has none."""
    found = list(alpha_rope_modules(model))
    for module in found:
        module.rope_type = "ntk_alpha"
    return bool(found)
