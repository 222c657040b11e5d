"""What is kept of the target's distributions, for calls that ask for it: logits, scores, log-probabilities.

B sequences, A most tokens that a round emits, V vocabulary. All figures are float32.

    logits     the target's own, of every emitted token
    scores     the same after processors and warpers: what the token was chosen from
    logprobs   log_softmax(logits) at the emitted tokens, so before processors, temperature and warpers

A round that keeps them leaves the rows of its accepted nodes in buffers of fixed addresses (`Kept`, on the device), so
it is one CUDA graph like any other. The host takes them out between rounds (`Records`). Log-probabilities travel as the
reports do, with rounds under way; whole rows are copied before the next round is launched. Under processors the host
walks the tree and has every row in its hands: the state keeps nothing then.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_fast.decoding.reports import ReportRing
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.decoding.validate import check_flags

NOT_RECORDED = ("output_attentions", "output_hidden_states")
HOST = torch.device("cpu")  # whatever the default device is
ALIGNED = 4  # a softmax adds up a row that starts at no multiple of so many numbers in another order


class Keeps(Enum):
    """What a state keeps of the logits of a round."""

    NOTHING = "nothing"
    LOGPROBS = "log-probabilities"
    ROWS = "log-probabilities and rows"


@dataclass(frozen=True)
class Wanted:
    """What a call asks for, and the device that its figures go to."""

    scores: bool = False
    logits: bool = False
    logprobs: bool = False
    device: torch.device = HOST

    def __bool__(self) -> bool:
        return self.logprobs or self.rows

    @property
    def rows(self) -> bool:
        """Whether whole rows of logits are needed."""
        return self.scores or self.logits

    @property
    def keeps(self) -> Keeps:
        """What a state has to keep for it, unless the host chooses the tokens."""
        return Keeps.ROWS if self.rows else Keeps.LOGPROBS if self.logprobs else Keeps.NOTHING


def check_wanted(return_dict: bool, device: torch.device, **flags) -> Wanted:
    """The flags output_scores, output_logits, output_logprobs and those of NOT_RECORDED of a call."""
    given = [name for name, value in zip(flags, check_flags(**flags), strict=True) if value]
    refused = [name for name in NOT_RECORDED if name in given]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: not recorded, since rounds run over trees of drafts and keep neither of the tokens "
            "that they accept; call base_model.generate, or base_model on the finished text"
        )
    if given and not return_dict:
        raise ValueError(f"{', '.join(given)}: pass return_dict_in_generate=True too, ids alone cannot hold them")
    return Wanted(**{name.removeprefix("output_"): True for name in given}, device=device)


class Kept:
    """Of the tokens that a round emitted: logprobs [B, A], and logits [B, A, V] where whole rows are kept.

    What lies behind a sequence's count means nothing.
    """

    def __init__(self, keeps: Keeps, batch: int, max_path: int, vocab_size: int, device: torch.device):
        self.logprobs = torch.zeros(batch, max_path, device=device)
        self.logits = torch.zeros(batch, max_path, vocab_size, device=device) if keeps is Keeps.ROWS else None
        self.sequences = torch.arange(batch, device=device)[:, None]
        self.largest = self

    def of_paths(self, max_path: int) -> Kept:
        """The same memory for rounds that emit fewer tokens: A is then `max_path`."""
        view, whole = copy.copy(self), self.largest
        view.logprobs = _first(whole.logprobs, max_path)
        view.logits = None if whole.logits is None else _first(whole.logits, max_path)
        return view

    def take(self, logits: Tensor, path: Tensor, emitted: Tensor) -> None:
        """Within a round: logits [B, T, V] of the tree's nodes, the accepted ones [B, A], the tokens after each."""
        accepted = logits[self.sequences, path].float()
        tokens = emitted.clamp(min=0)[..., None]  # -1 stands for NaN logits
        self.logprobs.copy_(_aligned(accepted).log_softmax(-1).gather(-1, tokens)[..., 0])
        if self.logits is not None:
            self.logits.copy_(accepted)


class Records:
    """The figures of every token that was taken, by sequence, in the order of its tokens.

    slots: rounds that may be under way; one, where whole rows are wanted.
    """

    def __init__(self, wanted: Wanted, kept: Kept | None, sampling: SamplingTensors, batch: int, slots: int):
        self.wanted, self.sampling = wanted, sampling
        self.names = [name for name in ("scores", "logits", "logprobs") if getattr(wanted, name)]
        self.ring = ReportRing(kept.largest.logprobs, slots) if kept and wanted.logprobs else None
        # of each sequence: rows [V] of scores and logits, numbers of logprobs
        self.figures: dict[str, list[list]] = {name: [[] for _ in range(batch)] for name in self.names}
        self.fetched: dict[str, list] = {}  # the same of the last round
        self.settled: dict[str, list[Tensor]] = {name: [] for name in self.names}  # steps [B, V] that stay as they are

    def send(self, kept: Kept | None) -> None:
        """Behind the report of the round that was launched last, what it kept."""
        if self.ring is not None and kept is not None:
            self.ring.send(kept.logprobs)

    def fetch(self, counts: list[int], emitted: Tensor, kept: Kept | None) -> None:
        """Take out what the oldest round kept of the first counts [B] tokens of each sequence.

        emitted [B, A] of that round, on the device, and what it kept. Where whole rows are wanted, no later round is
        under way.
        """
        if self.ring is not None:
            self.fetched["logprobs"] = self.ring.read()
        if kept is not None and kept.logits is not None:
            rows = {"logits": kept.logits} if self.wanted.logits else {}
            if self.wanted.scores:
                rows["scores"] = self.sampling.warp(kept.logits, emitted.clamp(min=0))
            for name, figures in rows.items():
                parts = zip(figures, counts, strict=True)
                self.fetched[name] = [part[:count].to(self.wanted.device, copy=True) for part, count in parts]

    def take(self, row: int, place: int) -> None:
        """Add token number `place` of a sequence's tokens of the round that was fetched."""
        for name in self.names:
            self.figures[name][row].append(self.fetched[name][row][place])

    def take_processed(self, row: int, logits: Tensor, scores: Tensor, token: int) -> None:
        """Add a token that the host chose from the scores [1, V] that processors made of logits [1, V]."""
        token = max(token, 0)  # -1 stands for NaN
        if self.wanted.logprobs:
            self.figures["logprobs"][row].append(float(logits[0].log_softmax(-1)[token]))
        if self.wanted.logits:
            self.figures["logits"][row].append(logits[0].to(self.wanted.device, copy=True))
        if self.wanted.scores:
            warped = self.sampling.warp_row(scores, row, token)
            self.figures["scores"][row].append(warped[0].to(self.wanted.device, copy=True))

    def scores_of(self, row: int) -> tuple[Tensor, ...] | None:
        """A sequence's scores so far, as stopping criteria see them: [1, V] each, None where they aren't wanted."""
        return tuple(scores[None] for scores in self.figures["scores"][row]) if self.wanted.scores else None

    # -- results ---------------------------------------------------------------------------------------------------

    def results(self, done: list[bool], pad: int) -> dict[str, Any]:
        """Fields of `Generation`, laid out as its sequences are: done [B] are those that have ended, pad the token that
        follows them, with certainty."""
        return {name: self._steps(name, done, pad) if name != "logprobs" else self._logprobs() for name in self.names}

    def _logprobs(self) -> Tensor:
        """[B, longest]"""
        figures = self.figures["logprobs"]
        out = torch.zeros(len(figures), max(map(len, figures)))
        for row, numbers in enumerate(figures):
            out[row, : len(numbers)] = torch.tensor(numbers)
        return out.to(self.wanted.device)

    def _steps(self, name: str, done: list[bool], pad: int) -> tuple[Tensor, ...]:
        """A tensor [B, V] for each step. Steps that all sequences have made are put together once: a call may be asked
        for its results after every round."""
        figures, settled = self.figures[name], self.settled[name]
        made = [len(rows) for rows, ended in zip(figures, done, strict=True) if not ended]
        longest = max(map(len, figures))
        for step in range(len(settled), min(made) if made else longest):
            settled.append(_step(figures, step, pad))
            for row, rows in enumerate(figures):
                if step < len(rows):
                    rows[step] = settled[step][row]  # the memory is held once
        return (*settled, *(_step(figures, step, pad) for step in range(len(settled), longest)))


def _first(values: Tensor, most: int) -> Tensor:
    """[B, most, ...] without gaps, in the memory of values [B, A, ...]."""
    shape = values.shape[0], most, *values.shape[2:]
    return values.flatten()[: math.prod(shape)].view(shape)


def _aligned(rows: Tensor) -> Tensor:
    """rows [..., V], with -inf behind up to a multiple of ALIGNED: a row has the same bits wherever it lies."""
    spare = -rows.shape[-1] % ALIGNED
    return F.pad(rows, (0, spare), value=float("-inf")) if spare else rows


def _step(figures: list[list[Tensor]], step: int, pad: int) -> Tensor:
    """[B, V] of one step; of sequences without it, 0 at the pad token and -inf at all others."""
    if len(figures) == 1:
        return figures[0][step][None]
    example = next(rows[step] for rows in figures if step < len(rows))
    padding = torch.full_like(example, float("-inf"))
    padding[min(max(pad, 0), len(padding) - 1)].zero_()
    return torch.stack([rows[step] if step < len(rows) else padding for rows in figures])
