"""How a written head does where it counts: decoding, with the tree, on prompts that it was not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.request import pad_left
from eagle_fast.decoding.statistics import Statistics
from eagle_fast.decoding.worth import USUAL, DraftCounts, chances
from eagle_fast.model import EaModel

MAX_BATCH = 32
LEANS = 8.0  # tries that what is usual counts for


def measure_decoding(
    model: PreTrainedModel,
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    seconds: float = float("inf"),
) -> dict[float, Statistics]:
    """What rounds of the head in `folder` brought over all prompts (token ids), for each temperature.

    seconds: of decoding; what is not done by then is left out, but at least a round for each temperature.
    """
    decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(folder), adaptive=False)
    found, started = {}, time.monotonic()
    for number, temperature in enumerate(temperatures, start=1):
        total, until = Statistics(), started + seconds * number / len(temperatures)
        for first in range(0, len(prompts), MAX_BATCH):
            if first and time.monotonic() >= until:
                break
            batch = pad_left(prompts[first : first + MAX_BATCH])
            rounds = decoder.ea_generate(
                batch["input_ids"], attention_mask=batch["attention_mask"], temperature=temperature, seed=1,
                max_new_tokens=max_new_tokens, max_length=batch["input_ids"].shape[1] + max_new_tokens,
                return_dict_in_generate=True,
            )  # fmt: skip
            for out in rounds:  # noqa: B007  # the last one has all
                if time.monotonic() >= until:
                    break
            rounds.close()
            total += out.statistics
        found[temperature] = total
    return found


def acceptance_table(drafts: DraftCounts) -> list[list[float]]:
    """Chances of drafts by depth and rank, for as many as the default tree has: what a head's config.json says of them.

    Where little was counted, they lean on what is usual.
    """
    tree = TreeConfig()
    return chances(drafts, USUAL, LEANS)[: tree.depth + 1, : tree.top_k].round(3).tolist()
