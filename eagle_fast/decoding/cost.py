"""What rounds take on this machine: by batch, tree and context, as rounds of real calls were timed.

A call's own rounds are timed, on the device by two events and on a CPU by the clock, so nothing runs for the sake of
its time, and times follow the context, the machine's load and its clocks. Buckets of context double from 1,024 on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from eagle_fast.config import TreeConfig

FIRST_BUCKET = 1024
SURE = 2  # times after which a round's is known
FOLLOWS = 1 / 8  # weight of a new time
OUTLIER = 2.0  # a time counts as no more than so many of what is known


class Place(NamedTuple):
    """Where rounds cost alike. on_host: the host chooses their tokens, for logits processors."""

    batch: int
    bucket: int
    on_host: bool = False


def place_of(batch: int, context: float, on_host: bool = False) -> Place:
    """context: tokens of a text, as the mean of the batch."""
    return Place(batch, (int(context) // FIRST_BUCKET).bit_length(), on_host)


class Costs:
    """Seconds of rounds, each of one model."""

    def __init__(self) -> None:
        self.seconds: dict[Place, dict[TreeConfig, float]] = {}
        self.numbers: dict[tuple[Place, TreeConfig], int] = {}

    def note(self, place: Place, tree: TreeConfig, seconds: float) -> None:
        """A round took so long. The first few times count by the least of them, since the first may be late."""
        known, number = self.seconds.setdefault(place, {}), self.numbers.get((place, tree), 0)
        self.numbers[place, tree] = number + 1
        before = known.get(tree, seconds)
        if number < SURE:
            known[tree] = min(before, seconds)
        else:
            known[tree] = before + FOLLOWS * (min(seconds, OUTLIER * before) - before)

    def is_sure(self, place: Place, tree: TreeConfig) -> bool:
        """Whether enough rounds were timed at this batch, whatever their context."""
        return any(
            number >= SURE
            for (there, other), number in list(self.numbers.items())
            if other == tree and _alike(there, place)
        )

    def of(self, place: Place, trees: Iterable[TreeConfig]) -> dict[TreeConfig, float]:
        """Seconds of those of the trees that were timed at this batch: at this context, or else at the nearest, and as
        much more or less as the trees took that were timed at both."""
        found = {}
        here = self.seconds.get(place, {})
        near = sorted((p for p in list(self.seconds) if _alike(p, place)), key=lambda p: abs(p.bucket - place.bucket))
        for tree in trees:
            there = next((self.seconds[p] for p in near if tree in self.seconds[p]), None)
            if there is not None:
                more = [here[other] - there[other] for other in here if other in there]
                found[tree] = max(there[tree] + (statistics.fmean(more) if more else 0.0), there[tree] / 2)
        return found


def _alike(one: Place, other: Place) -> bool:
    return (one.batch, one.on_host) == (other.batch, other.on_host)


class Timer:
    """Times one round after another, up to `slots` of them under way; what is read is what was launched first.

    device: where the rounds run; None: the host's clock, for rounds that are over when their call returns.
    """

    def __init__(self, device: torch.device | None, slots: int):
        self.device = device
        self.events = [] if device is None else [_pair() for _ in range(slots)]
        self.clocks = [0.0] * slots
        self.num_started = self.num_read = 0

    def start(self) -> None:
        slot = self.num_started % len(self.clocks)
        self.num_started += 1
        if self.device is None:
            self.clocks[slot] = time.perf_counter()
        else:
            self.events[slot][0].record(torch.cuda.current_stream(self.device))

    def stop(self) -> None:
        """Of the round that was started last."""
        slot = (self.num_started - 1) % len(self.clocks)
        if self.device is None:
            self.clocks[slot] = time.perf_counter() - self.clocks[slot]
        else:
            self.events[slot][1].record(torch.cuda.current_stream(self.device))

    def read(self) -> float:
        """Seconds of the oldest round, which is over."""
        slot = self.num_read % len(self.clocks)
        self.num_read += 1
        if self.device is None:
            return self.clocks[slot]
        start, end = self.events[slot]
        return start.elapsed_time(end) / 1e3


def _pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
