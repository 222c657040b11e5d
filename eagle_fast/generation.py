"""The host's side of decoding: run rounds, read what each emitted, stop every sequence where it must end.

A sequence ends with the first stop token, at its token budget, or where a stopping criterion says so; what the round
emitted past that point is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from eagle_fast.processors import accept_processed
from eagle_fast.round import Round


@dataclass
class Statistics:
    """What one call did. `accepted[n]` counts the rounds, over all sequences, that accepted n drafted tokens."""

    rounds: int = 0
    accepted: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Mean tokens that a sequence got from a round: drafted tokens accepted, plus the one of the target."""
        sequence_rounds = sum(self.accepted)
        emitted = sum((drafted + 1) * times for drafted, times in enumerate(self.accepted))
        return emitted / sequence_rounds if sequence_rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(self.new_tokens) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """Result of a generating call with return_dict_in_generate=True.

    sequences [B, L + longest]: the prompts as given, then each sequence's new tokens, padded behind like transformers'.
    """

    sequences: torch.Tensor
    statistics: Statistics


@dataclass(frozen=True)
class StopRules:
    """When a sequence is done, and what may change its logits."""

    stop_ids: frozenset[int] = frozenset()
    criteria: StoppingCriteriaList | None = None
    processors: LogitsProcessorList | None = None

    def cut(self, text: list[int], new: list[int], device: torch.device) -> tuple[list[int], bool]:
        """The part of a round's `new` tokens that is kept after `text`, and whether the sequence ends with it."""
        for count, token in enumerate(new, start=1):
            if token in self.stop_ids or self._criterion(text + new[:count], device):
                return new[:count], True
        return new, False

    def _criterion(self, text: list[int], device: torch.device) -> bool:
        if not self.criteria:
            return False
        return bool(self.criteria(torch.tensor([text], device=device), None).all())  # type: ignore[arg-type]


class NaNLogitsError(RuntimeError):
    """The target's logits were NaN or infinite."""


class Generator:
    """Decodes prompts with one `Round`; iterating yields, after each round, the new tokens of every sequence."""

    def __init__(
        self, state: Round, step: Callable[[], None], prompts: list[list[int]], budgets: list[int], rules: StopRules
    ):
        self.state, self.step, self.rules = state, step, rules
        self.texts = [list(prompt) for prompt in prompts]
        self.ends = [len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True)]
        self.done = [budget == 0 for budget in budgets]
        self.statistics = Statistics(accepted=[0] * state.max_path, new_tokens=[0] * len(prompts))

    def __iter__(self) -> Iterator[list[list[int]]]:
        started = time.perf_counter()
        self._begin()
        self._synchronize()
        prefilled = time.perf_counter()
        self.statistics.prefill_seconds = prefilled - started
        while not all(self.done):
            self._advance()
            new = self._read()
            self.statistics.decode_seconds = time.perf_counter() - prefilled
            yield new
            self._switch_rope()

    def _begin(self) -> None:
        """Prefill the texts so far. With longrope, no further than the switch: past it, all keys are recomputed."""
        lengths = torch.tensor([len(text) for text in self.texts])
        tokens = torch.zeros(len(self.texts), int(lengths.max()), dtype=torch.long)
        for row, text in enumerate(self.texts):
            tokens[row, : len(text)] = torch.tensor(text)
        self.state.begin(tokens, lengths, torch.tensor([self._end(row) for row in range(len(self.texts))]))

    def _end(self, row: int) -> int:
        """The cache length at which a sequence stops for now: all of its tokens but the newest."""
        if self.done[row]:
            return 0
        end, switch = self.ends[row] - 1, self.state.target.rope_switch
        return min(end, switch) if switch is not None and len(self.texts[row]) <= switch else end

    def _switch_rope(self) -> None:
        switch = self.state.target.rope_switch
        if switch is not None and any(
            not done and len(text) == switch + 1 for text, done in zip(self.texts, self.done, strict=True)
        ):
            self._begin()

    def _advance(self) -> None:
        if self.rules.processors:
            tree, logits, features = self.state.propose()
            accepted = accept_processed(self.state, tree, logits, self.rules.processors, self.texts)
            self.state.commit(accepted, features)
        else:
            self.step()
        self.statistics.rounds += 1

    def _read(self) -> list[list[int]]:
        """The one host read of a round: what it emitted."""
        state = self.state
        packed = torch.cat([state.counts[:, None], state.emitted], 1).tolist()
        new: list[list[int]] = []
        for row, (count, *emitted) in enumerate(packed):
            emitted = emitted[:count]
            if -1 in emitted:
                position = len(self.texts[row]) + emitted.index(-1)
                raise NaNLogitsError(
                    f"sequence {row}: the target's logits for position {position} are NaN or infinite. A half-precision "
                    "overflow is the usual cause: load the model with dtype=torch.bfloat16 or torch.float32"
                )
            if count:
                self.statistics.accepted[count - 1] += 1
            kept, ended = self.rules.cut(self.texts[row], emitted, state.target.device)
            self.texts[row] += kept
            self.statistics.new_tokens[row] += len(kept)
            if not self.done[row] and (ended or len(self.texts[row]) >= self.ends[row]):
                self.done[row] = True
                state.finish(row)
            new.append(kept)
        return new

    def _synchronize(self) -> None:
        if self.state.target.device.type == "cuda":
            torch.cuda.synchronize(self.state.target.device)
