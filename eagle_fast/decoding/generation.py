"""The host's side of decoding: launch rounds, read what each emitted, stop every sequence where it must end.

A sequence ends with the first stop token, at its token budget, or where a stopping criterion says so. On a GPU the host
runs ahead: it launches a round before it has read the one before, so it learns of a stop token while one more round is
under way; whatever was emitted past the end is dropped. Budgets the device knows itself.

Logits processors and stopping criteria are Python code of the user: they see one sequence at a time, once for every
token that is kept and in order, as in transformers' own loop. With them, a round is read before the next is launched.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.cost import Timer
from eagle_fast.decoding.held import Held, are_long
from eagle_fast.decoding.hooks import processed, verdict
from eagle_fast.decoding.processors import copies_for_rows, walk_processed
from eagle_fast.decoding.records import Records
from eagle_fast.decoding.reports import ReportRing
from eagle_fast.decoding.request import Request
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.statistics import Statistics
from eagle_fast.decoding.steps import RoundSteps
from eagle_fast.decoding.tree import Tree, Walked
from eagle_fast.decoding.worth import DraftCounts

ROUNDS_UNDER_WAY = 2  # one that the host waits for, and one to keep the device busy meanwhile


@dataclass
class Generation(ModelOutput):
    """Result of a generating call with return_dict_in_generate=True.

    sequences [B, L + longest]: the prompts as given, then each sequence's new tokens, padded behind like transformers'.
    The others where they were asked for, float32, on the device of the sequences:
        scores    a tensor [B, V] for each of the longest new tokens: what each token was chosen from, after processors,
                  temperature and warpers; -inf is what they removed
        logits    the same of the target's own logits
        logprobs  [B, longest]: log_softmax(logits) at each new token, so of the target's own distribution whatever
                  the token was chosen by
    Behind a sequence's end its pad token has score and logit 0 and all others -inf, and its logprob is 0: padding is
    certain, and adds nothing to sums.
    """

    sequences: torch.Tensor
    statistics: Statistics = None  # type: ignore[assignment]  # ModelOutput wants a default of None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    logprobs: torch.Tensor | None = None


class Launched(NamedTuple):
    """A round under way: the state under its tree, the tokens that it promised, and whether its time tells."""

    view: Round
    promised: float
    tells: bool


class NaNLogitsError(RuntimeError):
    """The target's logits were NaN or infinite, or a logits processor left no token."""


def rounds_under_way(request: Request, device: torch.device) -> int:
    """How many rounds may be launched before the first of them is read."""
    host_decides = bool(request.processors or request.criteria)
    return 1 if host_decides or request.record.rows or device.type == "cpu" else ROUNDS_UNDER_WAY


class Decoding:
    """Decodes one request with a `Round`: `begin`, then `advance` until `finished`.

    chooser: of the tree of each round; without one they all have the state's first.
    texts: prompt and new tokens of each sequence. done: which sequences have ended.
    """

    def __init__(self, state: Round, step: RoundSteps, request: Request, chooser: TreeChooser | None = None):
        self.state, self.step, self.request, self.turn = state, step, request, state.target.turn
        self.chooser = chooser
        batch = len(request.prompts)
        self.texts = [list(prompt) for prompt in request.prompts]
        self.starts = [len(prompt) for prompt in request.prompts]
        self.ends = [start + budget for start, budget in zip(self.starts, request.budgets, strict=True)]
        self.limits = self.ends  # text lengths at which the device stops by itself, for now
        self.done = [budget == 0 for budget in request.budgets]
        self.stopped: list[int] = []  # sequences that ended earlier, and that the device does not know of
        self.ahead = rounds_under_way(request, state.report.device)
        self.reports = ReportRing(state.largest_report, self.ahead)
        on_device = state.report.is_cuda and not request.processors
        self.timer = Timer(state.report.device if on_device else None, self.ahead)
        self.under_way: deque[Launched] = deque()
        self.records = Records(request.record, state.kept, state.sampling, batch, self.ahead)
        self.padding = request.padding or [[] for _ in range(batch)]
        self.processors = copies_for_rows(request.processors, batch)
        self.criteria = copies_for_rows(request.criteria, batch)
        longest = max(tree.max_path for tree in state.trees)
        self.statistics = Statistics(accepted=[0] * longest, new_tokens=[0] * batch)
        self.statistics.reused_tokens = [0] * batch

    @property
    def finished(self) -> bool:
        return all(self.done)

    @property
    def new_tokens(self) -> list[list[int]]:
        """Each sequence's text so far, without its prompt."""
        return [text[start:] for text, start in zip(self.texts, self.starts, strict=True)]

    def result(self, sequences: torch.Tensor, pad: int) -> Generation:
        """What there is so far: sequences [B, L + longest], padded behind with pad."""
        return Generation(sequences, copy.deepcopy(self.statistics), **self.records.results(self.done, pad))

    def begin(self) -> None:
        """Load the sampling settings and prefill."""
        started = time.perf_counter()
        with self.turn.lock, self.turn():
            self.state.sampling.load(self.request.sampling, self.request.shared_noise)
            self.statistics.reused_tokens = self._prefill()
        device = self.state.target.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self.state.target.check()
        self.statistics.prefill_seconds = time.perf_counter() - started

    def advance(self) -> bool:
        """Take in one more round; False where it brought nothing, else some sequence got at least one token."""
        started = time.perf_counter()
        lengths = [len(text) for text in self.texts]
        with self.turn.lock, self.turn():
            self._settle()
            if self.processors:
                self._launch_round()
            else:
                self._launch()
        launched = self._take_in() if self.processors else self._read()
        self._note_rows()
        counts = [len(text) - length for text, length in zip(self.texts, lengths, strict=True)]
        self.statistics.count(launched.view.tree, counts, launched.promised)
        self.statistics.decode_seconds += time.perf_counter() - started
        return any(counts)

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[int]:
        """Prefill the prompts; returns from which token on each. With longrope, texts run to the switch for now."""
        ends = [self._end(row) for row in range(len(self.texts))]
        state, target, kept = self.state, self.state.target, self.request.reuse_cache
        edits = target.edits()
        starts = state.held.shared(self.texts, target, edits) if kept and state.held else [0] * len(self.texts)
        state.begin(self.texts, ends, starts)
        state.held = Held(self.texts, [0] * len(self.texts), are_long(self.texts, target), edits, kept)
        self._note_rows()
        self.limits = [end + 1 for end in ends]
        return starts

    def _prefill_past_switch(self, row: int) -> None:
        """Prefill a text that stands at longrope's switch: past it, all of its keys are recomputed."""
        held, end = self.state.held, self._end(row)
        if held is not None:
            held.rows[row], held.long[row] = 0, True
        self.state.begin_row(row, self.texts[row], end)
        self._note_rows()
        self.limits[row] = end + 1

    def _note_rows(self) -> None:
        """What the caches hold after a prefill or a whole round: all tokens that were read but the newest."""
        if self.state.held is not None:
            self.state.held.rows = [len(text) - 1 for text in self.texts]

    def _end(self, row: int) -> int:
        """The cache length at which a sequence stops for now: all of its tokens but the newest."""
        if self.done[row]:
            return 0
        end, switch = self.ends[row] - 1, self.state.target.rope_switch
        return min(end, switch) if switch is not None and len(self.texts[row]) <= switch else end

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Before more is launched: tell the device which sequences ended, and prefill again where longrope switches.

        A live sequence without room is one that stands at the switch.
        """
        for row in self.stopped:
            self.state.finish(row)
        self.stopped.clear()
        for row in [row for row, room in self._rooms().items() if room == 0 and not self.reports]:
            self._prefill_past_switch(row)

    def _launch(self) -> None:
        """Launch rounds until enough are under way. Each brings every live sequence a token or more, so none is
        launched where those under way end all of them for certain, nor where longrope's switch is due."""
        rooms = self._rooms().values()
        while len(self.reports) < self.ahead and min(rooms) > 0 and max(rooms) > len(self.reports):
            view = self._launch_round()
            self.reports.send(view.sent)
            self.records.send(view.kept)

    def _launch_round(self) -> Round:
        """Launch one, under the tree that pays; with processors it is over then."""
        chooser, tree, promised = self.chooser, self.state.tree, 0.0
        if chooser is not None:
            tree = chooser.next(sum(map(len, self.texts)) / len(self.texts))
            promised = chooser.promise(tree)
        accept = self._accept_processed if self.processors else None
        self.view = self.state.under(tree)
        tells = self.step.is_ready(tree) or accept is not None
        self.step(tree, self.timer, accept)
        self.under_way.append(Launched(self.view, promised, tells))
        if chooser is not None:
            chooser.choose()
        return self.view

    def _rooms(self) -> dict[int, int]:
        """Of every live sequence, how many tokens its text lacks to the length at which the device stops it."""
        return {row: self.limits[row] - len(text) for row, text in enumerate(self.texts) if not self.done[row]}

    def _read(self) -> Launched:
        """Take in the oldest round under way. What it emitted for a sequence that had ended is dropped."""
        launched = self.under_way[0]
        view, numbers = launched.view, self.reports.read()
        self.state.target.check()
        width, split = 1 + view.max_path, view.report.numel()
        reports = [numbers[start : start + width] for start in range(0, split, width)]
        if self.request.record:
            with self.turn.lock, self.turn():
                self.records.fetch([count for count, *_ in reports], view.emitted, view.kept)
        self._learn(launched, self._walked(reports, numbers[split:]))
        for row, (count, *emitted) in enumerate(reports):
            if not self.done[row]:
                for place, token in enumerate(emitted[:count]):
                    self.records.take(row, place)
                    if not self._take(row, token):
                        break
        return self.under_way.popleft()

    def _walked(self, reports: list[list[int]], ranks: list[int]) -> Walked:
        """What a round reported, before its tokens are taken."""
        counts, longest = [count for count, *_ in reports], len(reports[0]) - 1
        full = [
            self.done[row] or len(text) + count >= self.limits[row]
            for row, (text, count) in enumerate(zip(self.texts, counts, strict=True))
        ]
        return Walked(counts, [ranks[start : start + longest] for start in range(0, len(ranks), longest)], full)

    def _take_in(self) -> Launched:
        """What is left to do after a round whose tokens the host has chosen."""
        self._learn(self.under_way[0], self.walked)
        return self.under_way.popleft()

    def _learn(self, launched: Launched, walked: Walked) -> None:
        """From a round that is over."""
        seconds, drafts = self.timer.read(), DraftCounts()
        for path, count in zip(walked.ranks, walked.counts, strict=True):
            drafts.take(path[:count])
        self.statistics.drafts += drafts
        if self.chooser is not None:
            self.chooser.take(launched.view.tree, walked, drafts, seconds if launched.tells else None)

    def _accept_processed(self, tree: Tree, logits: torch.Tensor) -> torch.Tensor:
        """`Round.accept` with logits processors, which choose every token on the host."""
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()
        self.state.target.check()
        path, self.walked = walk_processed(self.view, tree, logits, self._process, self._take_processed)
        return path

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _take(self, row: int, token: int) -> bool:
        """Append a token to a sequence; False where that ends it."""
        text = self.texts[row]
        if token == -1:
            raise NaNLogitsError(_nan_message(row, len(text), bool(self.processors)))
        text.append(token)
        stopped = token in self.request.stop_ids
        if self.criteria:
            stopped |= verdict(self.criteria[row], self._seen(row), self.records.scores_of(row), self.state.batch)
        full = len(text) >= self.ends[row]  # which the device knows
        if stopped and not full:
            self.stopped.append(row)
        self.done[row] = stopped or full
        return not self.done[row]

    def _take_processed(self, row: int, token: int) -> bool:
        """`_take` of a token that was chosen from what `_process` gave last."""
        if self.request.record:
            self.records.take_processed(row, *self.processed, token)
        return self._take(row, token)

    def _process(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """logits [1, V] of a sequence's next token after its processors."""
        assert self.processors is not None
        own = logits.clone() if self.request.record else logits  # processors may work in place
        scores = processed(self.processors[row], self._seen(row), logits)
        self.processed = own, scores
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
