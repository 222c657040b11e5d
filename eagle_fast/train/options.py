"""What a user of `eagle-fast train` can set. Frozen, checked once at construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are for a GPU of the H100's class; `for_device` makes them smaller for a CPU. 0 means: choose for me."""

    minutes: float = 60.0  # of writing texts and training, the learning rate's schedule over all of it
    updates: int = 0  # train so many updates instead
    pause_after: float = 0.0  # minutes after which to stop for now, resumable

    draft_vocab: int = 32000
    intermediate: int = 0  # of the head's MLP; 0: the target's
    kv_heads: int = 0  # of the head's attention; 0: the target's
    share_lm_head: bool = False  # use the target's, untrained: a smaller file that other readers do not take

    steps: int = 7  # of the rollout
    decay: float = 0.8  # weight of a step's loss over that of the step before
    learning_rate: float = 1e-3
    batch_tokens: int = 16384  # padded tokens per update
    passes: int = 3  # over the texts before new ones are written

    pool_tokens: int = 6_000_000  # of answers, written at a time
    writing_share: float = 0.1  # of the minutes, at most, for each writing
    rows: int = 0  # texts written side by side
    max_question: int = 192
    max_answer: int = 384
    prompt_share: float = 1.0  # of the questions, if prompts are given
    opening_share: float = 0.6
    greedy_share: float = 0.5
    held_out: int = 64  # texts kept for measuring

    seed: int = 0
    save_minutes: float = 3.0
    log_seconds: float = 15.0

    def __post_init__(self) -> None:
        positive = ("minutes", "draft_vocab", "steps", "learning_rate", "batch_tokens", "passes", "pool_tokens")
        for name in (*positive, "max_question", "max_answer", "held_out", "decay", "writing_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use a positive number")
        for name in ("updates", "pause_after", "intermediate", "kv_heads", "rows", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use 0 or a positive number")
        for name in ("prompt_share", "opening_share", "greedy_share", "decay", "writing_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a share from 0 to 1")
        longest = self.max_question + self.max_answer
        if self.batch_tokens < longest:
            raise ValueError(f"batch_tokens={self.batch_tokens}: use at least max_question + max_answer = {longest}")

    def for_device(self, device: torch.device) -> TrainOptions:
        """On a CPU, a fraction of the defaults that were left as they are."""
        if device.type == "cuda":
            return self
        smaller = {"batch_tokens": 1024, "pool_tokens": 20_000, "held_out": 8}
        left = {name: value for name, value in smaller.items() if getattr(self, name) == getattr(TrainOptions, name)}
        return replace(self, **left)  # type: ignore[arg-type]
