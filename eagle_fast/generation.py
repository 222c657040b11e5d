"""The host's side of decoding: run rounds, read what each emitted, stop every sequence where it must end.

A sequence ends with the first stop token, at its token budget, or where a stopping criterion says so; what the round
emitted past that point is dropped. Logits processors and stopping criteria are Python code of the user: they see one
sequence at a time, once for every token that is kept and in order, as in transformers' own loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.utils import ModelOutput

from eagle_fast.processors import copies_for_rows, walk_processed
from eagle_fast.request import Request
from eagle_fast.round import Round


@dataclass
class Statistics:
    """What one call did. `accepted[n]` counts the rounds, over all sequences, that gave a sequence n + 1 tokens: n
    drafted ones that were accepted and one of the target's own. Tokens dropped behind a stop are not counted."""

    rounds: int = 0
    accepted: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Mean tokens that a sequence got from a round: drafted tokens accepted, plus the one of the target."""
        sequence_rounds = sum(self.accepted)
        return sum(self.new_tokens) / sequence_rounds if sequence_rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(self.new_tokens) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation(ModelOutput):
    """Result of a generating call with return_dict_in_generate=True.

    sequences [B, L + longest]: the prompts as given, then each sequence's new tokens, padded behind like transformers'.
    """

    sequences: torch.Tensor
    statistics: Statistics = None  # type: ignore[assignment]  # ModelOutput wants a default of None


class NaNLogitsError(RuntimeError):
    """The target's logits were NaN or infinite, or a logits processor left no token."""


class Generator:
    """Decodes one request with a `Round`: `begin`, then `advance` until `finished`.

    texts: prompt and new tokens of each sequence. done: which sequences have ended.
    """

    def __init__(self, state: Round, step: Callable[[], None], request: Request):
        self.state, self.step, self.request = state, step, request
        batch = len(request.prompts)
        self.texts = [list(prompt) for prompt in request.prompts]
        self.starts = [len(prompt) for prompt in request.prompts]
        self.ends = [start + budget for start, budget in zip(self.starts, request.budgets, strict=True)]
        self.done = [budget == 0 for budget in request.budgets]
        self.padding = request.padding or [[] for _ in range(batch)]
        self.processors = copies_for_rows(request.processors, batch)
        self.criteria = copies_for_rows(request.criteria, batch)
        self.statistics = Statistics(accepted=[0] * state.max_path, new_tokens=[0] * batch)

    @property
    def finished(self) -> bool:
        return all(self.done)

    @property
    def new_tokens(self) -> list[list[int]]:
        """Each sequence's text so far, without its prompt."""
        return [text[start:] for text, start in zip(self.texts, self.starts, strict=True)]

    def begin(self) -> None:
        """Load the sampling settings and prefill."""
        started = time.perf_counter()
        self.state.sampling.load(self.request.sampling, self.request.shared_noise)
        self._prefill()
        if self.state.target.device.type == "cuda":
            torch.cuda.synchronize(self.state.target.device)
        self.statistics.prefill_seconds = time.perf_counter() - started

    def advance(self) -> None:
        """One round: every sequence that is not done gets at least one token."""
        started = time.perf_counter()
        before = [len(text) for text in self.texts]
        if self.processors:
            tree, logits, features = self.state.propose()
            accepted = walk_processed(self.state, tree, logits, self._process, self._take)
            self.state.commit(accepted, features)
        else:
            self.step()
            self._read()
        statistics = self.statistics
        statistics.rounds += 1
        for row, (text, length) in enumerate(zip(self.texts, before, strict=True)):
            count = len(text) - length
            statistics.new_tokens[row] += count
            if count:
                statistics.accepted[count - 1] += 1
                if self.done[row]:
                    self.state.finish(row)
        self._switch_rope()
        statistics.decode_seconds += time.perf_counter() - started

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
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
            self._prefill()

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """The one host read of a round: what it emitted."""
        packed = torch.cat([self.state.counts[:, None], self.state.emitted], 1).tolist()
        for row, (count, *emitted) in enumerate(packed):
            for token in emitted[:count]:
                if not self._take(row, token):
                    break

    def _take(self, row: int, token: int) -> bool:
        """Append a token to a sequence; False where that ends it."""
        text = self.texts[row]
        if token == -1:
            raise NaNLogitsError(_nan_message(row, len(text), bool(self.processors)))
        text.append(token)
        stopped = token in self.request.stop_ids
        if self.criteria:
            stopped |= bool(self.criteria[row](self._seen(row), None).all())  # type: ignore[arg-type]
        self.done[row] = stopped or len(text) >= self.ends[row]
        return not self.done[row]

    def _process(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """logits [1, V] of a sequence's next token after its processors."""
        assert self.processors is not None
        scores = self.processors[row](self._seen(row), logits)  # type: ignore[arg-type]
        if scores.shape != logits.shape:
            raise ValueError(
                f"the logits processors made scores of shape {list(scores.shape)} from {list(logits.shape)}: they see "
                "one sequence at a time; decode the prompts one by one if they need the whole batch"
            )
        return scores

    def _seen(self, row: int) -> torch.Tensor:
        """[1, length]: a sequence as processors and criteria see it."""
        return torch.tensor([self.padding[row] + self.texts[row]], device=self.state.target.device)


def _nan_message(row: int, position: int, processed: bool) -> str:
    if processed:
        return (
            f"sequence {row}: the scores for position {position} are NaN, +inf or all -inf after the logits "
            "processors: a processor must leave at least one token, with a finite score"
        )
    return (
        f"sequence {row}: the target's logits for position {position} are NaN or infinite. A half-precision overflow "
        "is the usual cause: load the model with dtype=torch.bfloat16 or torch.float32"
    )
