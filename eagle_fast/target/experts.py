"""Which of transformers' expert implementations a verify takes.

"grouped_mm", the default, needs no host read in bfloat16; in other precisions torch falls back to a loop that asks the
device for the group sizes, which no CUDA graph can hold. "batched_mm" gathers the weights of every (row, expert) pair
instead: fine for the rows of a tree while that copy is small.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import Anatomy, expert_weights

MAX_GATHERED_BYTES = 2**30


class ExpertChoice:
    """Switches the experts of one model (a twin, with a config of its own) for the time of a verify."""

    def __init__(self, model: PreTrainedModel):
        self.model_config, self.stock = model.config, getattr(model.config, "_experts_implementation", None)
        self.bytes_per_row = 0
        experts = next((each for each in model.modules() if expert_weights(each)), None)
        if experts is None or self.stock != "grouped_mm":
            return
        weights = expert_weights(experts)
        if weights[0].is_cuda and weights[0].dtype != torch.bfloat16:
            picked = Anatomy(model).experts_per_token
            self.bytes_per_row = picked * sum(weight[0].numel() * weight.element_size() for weight in weights)

    def for_rows(self, num_rows: int) -> None:
        """Set up for a verify of so many rows."""
        if self.bytes_per_row and num_rows * self.bytes_per_row <= MAX_GATHERED_BYTES:
            self.model_config._experts_implementation = "batched_mm"

    def restore(self) -> None:
        """The model's own choice, which prompts take."""
        if self.bytes_per_row:
            self.model_config._experts_implementation = self.stock
