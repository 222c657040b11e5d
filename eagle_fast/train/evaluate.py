"""How a written head does where it counts: decoding, with the tree, on prompts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from eagle_fast.model import EaModel

MAX_BATCH = 32


def measure_tau(
    model: PreTrainedModel,
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
) -> dict[float, float]:
    """Tokens a round of the head in `folder`, over all rounds of all prompts (token ids), for each temperature."""
    decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(folder))
    found = {}
    for temperature in temperatures:
        rounds = emitted = 0
        for first in range(0, len(prompts), MAX_BATCH):
            ids, mask = padded_before(prompts[first : first + MAX_BATCH])
            out = decoder.eagenerate(
                ids, attention_mask=mask, temperature=temperature, seed=1, max_new_tokens=max_new_tokens,
                max_length=ids.shape[1] + max_new_tokens, return_dict_in_generate=True,
            )  # fmt: skip
            accepted = out.statistics.accepted
            rounds += sum(accepted)
            emitted += sum(times * (drafted + 1) for drafted, times in enumerate(accepted))
        found[temperature] = emitted / max(rounds, 1)
    return found


def padded_before(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [B, longest], padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
