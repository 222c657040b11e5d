"""Which of transformers' expert implementations a verify takes.

"grouped_mm", the default, needs no host read in bfloat16; in other precisions torch falls back to a loop that asks the
device for the group sizes, which no CUDA graph can hold. "batched_mm" gathers the weights of every (row, expert) pair
instead: fine for the rows of a tree while that copy is small.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

MAX_GATHERED_BYTES = 2**30


class ExpertChoice:
    """Switches the experts of one model (a twin, with a config of its own) between prefill and verify."""

    def __init__(self, model: PreTrainedModel, config):
        self.model_config, self.stock = model.config, getattr(model.config, "_experts_implementation", None)
        self.bytes_per_row = 0
        experts = next((each for each in model.modules() if _expert_weights(each)), None)
        if experts is None or self.stock != "grouped_mm":
            return
        weights = _expert_weights(experts)
        if weights[0].is_cuda and weights[0].dtype != torch.bfloat16:
            picked = int(getattr(config, "num_experts_per_tok", 1))
            self.bytes_per_row = picked * sum(weight[0].numel() * weight.element_size() for weight in weights)

    def for_rows(self, num_rows: int | None) -> None:
        """Set up for a verify of so many rows, or for a prefill (None)."""
        if self.bytes_per_row:
            small = num_rows is not None and num_rows * self.bytes_per_row <= MAX_GATHERED_BYTES
            self.model_config._experts_implementation = "batched_mm" if small else self.stock


def _expert_weights(module: nn.Module) -> list[torch.Tensor]:
    """The stacked weights [experts, out, in] of a module of experts, empty for other modules."""
    named = (module._parameters.get(name) for name in ("gate_up_proj", "up_proj", "down_proj"))
    found: list[torch.Tensor] = [weight for weight in named if weight is not None and weight.dim() == 3]
    return found if len(found) >= 2 else []
