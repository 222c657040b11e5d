"""How far training is: its budget, the lines that it prints, and the log that it keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from eagle_fast.train.learn import chain_tau
from eagle_fast.train.options import TrainOptions

LEAST_FOR_THE_END = 5.0  # seconds


class Budget:
    """Time and updates spent, over all parts of a run that was paused and resumed.

    reserve: seconds of the minutes that are kept for the end, when the head is written and measured.
    """

    reserve = 0.0

    def __init__(self, options: TrainOptions, clock: Callable[[], float] = time.monotonic):
        self.options, self.clock = options, clock
        self.updates = 0
        self.earlier = 0.0  # seconds of the parts before
        self.started = clock()

    @property
    def seconds(self) -> float:
        return self.earlier + self.clock() - self.started

    @property
    def fraction(self) -> float:
        """Of training that is done."""
        if self.options.updates:
            return self.updates / self.options.updates
        return self.seconds / self._whole

    @property
    def _whole(self) -> float:
        """Seconds of writing and training, where minutes are the budget."""
        return 60 * self.options.minutes - self.reserve

    @property
    def left_for_the_end(self) -> float:
        """Seconds for measuring the head: what is left of the minutes, a few at least; as many as it takes where they
        are not the budget, or the run is only paused."""
        if self.options.updates or self.fraction < 1:
            return float("inf")
        return max(LEAST_FOR_THE_END, 60 * self.options.minutes - self.seconds)

    @property
    def left(self) -> float | None:
        """Seconds until training is done; None while nobody can tell."""
        if not self.options.updates:
            return max(0.0, self._whole - self.seconds)
        return self.seconds * (1 / self.fraction - 1) if self.updates else None

    @property
    def paused(self) -> bool:
        pause = 60 * self.options.pause_after
        return bool(pause) and self.clock() - self.started >= pause

    @property
    def spent(self) -> bool:
        return self.fraction >= 1 or self.paused


class Log:
    """Lines for people on the terminal, records for programs in log.jsonl."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: print(line, flush=True)):
        self.path, self.say = folder / "log.jsonl", say

    def record(self, kind: str, **values) -> None:
        rounded = {name: _rounded(value) for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **rounded}) + "\n")

    def update(self, budget: Budget, rate: float, losses: list[float], agreement: list[float], speed: float) -> None:
        self.record(
            "update", updates=budget.updates, seconds=budget.seconds, learning_rate=rate, losses=losses,
            agreement=agreement, tokens_per_second=speed,
        )  # fmt: skip
        self.say(
            f"{_bar(budget)}  update {budget.updates}  lr {rate:.1e}  loss {losses[0]:.2f}  "
            f"agrees {_shares(agreement)}  {amount(speed)} tokens/s"
        )

    def held_out(self, budget: Budget, losses: list[float], agreement: list[float]) -> None:
        self.record("held out", updates=budget.updates, seconds=budget.seconds, losses=losses, agreement=agreement)
        self.say(
            f"{_bar(budget)}  held out: loss {losses[0]:.3f}  agrees {_shares(agreement)}  "
            f"a chain would get {chain_tau(agreement):.2f} tokens per round"
        )


def _bar(budget: Budget, width: int = 20) -> str:
    fraction = min(1.0, budget.fraction)
    full = int(width * fraction)
    left = "" if budget.left is None else f" {duration(budget.left):>4} left"
    return f"[{'#' * full}{'.' * (width - full)}] {100 * fraction:3.0f}%{left}"


def duration(seconds: float) -> str:
    """In hours, minutes or seconds, whichever says enough."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.0f}m" if seconds >= 90 else f"{seconds:.0f}s"


def amount(number: float) -> str:
    """In millions, thousands or as it is, whichever says enough."""
    if number >= 1e5:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def _shares(values: list[float]) -> str:
    return " ".join(f"{value:.3f}".lstrip("0") for value in values)


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6)
    return [_rounded(each) for each in value] if isinstance(value, list) else value
