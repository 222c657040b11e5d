"""Linear layers for the few rows of a tree: `nn.Linear` in everything but the product that it calls."""

from __future__ import annotations

import copy

import torch
from eagle_fast_kernels.linear import few_rows_matmul
from torch import nn


class FewRowsLinear(nn.Linear):
    """nn.Linear whose products of a few rows on a CPU take the fast way; elsewhere it is nn.Linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        out = few_rows_matmul(input, self.weight)
        return out if self.bias is None else out + self.bias


def use_few_rows_linear(model: nn.Module) -> None:
    """Replace every plain nn.Linear of `model` by one that shares its weight. Subclasses (quantised ones) stay."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Linear:
                clone = copy.copy(child)
                clone.__class__ = FewRowsLinear
                module._modules[name] = clone
