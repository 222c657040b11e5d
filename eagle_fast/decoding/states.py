"""Decoding states that outlive a call: caches, buffers and captured graphs are kept for the next one, within bounds.

A call leases a state and gives it back; two running calls never share one. Those that no call uses are bounded by count
and by bytes, and the least recently used go first. The one used last stays, whatever its bytes: the next call is likely
to want it, and a state dropped after each call would be built, and its graph captured, for every one.

A state belongs to its call alone from the moment it leaves `idle` until it is back in it. Where an exception comes in
between, it is let go of by whoever lets go of it last, so nothing has to be counted or undone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.graph import SideStreams, is_capturing
from eagle_fast.decoding.held import Texts
from eagle_fast.decoding.ranked_prompts import RankedPrompts
from eagle_fast.decoding.ranked_round import RankedRound, parts_for
from eagle_fast.decoding.records import Keeps
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.steps import RoundSteps
from eagle_fast.head import DraftHead
from eagle_fast.head.cut import Portrait, pass_bytes, pays, portrait
from eagle_fast.target import Target

LENGTH_STEP = 1024
MAX_IDLE = 8
MAX_SHARE = 1 / 4  # of the memory of the devices


class Lease(NamedTuple):
    """What a call has for itself."""

    state: Round
    step: RoundSteps
    speculative: bool

    @property
    def kind(self) -> tuple[bool, int, Keeps]:
        """With a head or without, its batch, and what it keeps of logits."""
        return self.speculative, self.state.batch, self.state.keeps

    @property
    def num_bytes(self) -> int:
        """Memory of caches, buffers and graphs, over all devices."""
        return self.state.num_bytes + self.step.num_bytes

    @property
    def kept(self) -> bool:
        """Whether a call asked to find here again what it left."""
        return self.state.held is not None and self.state.held.kept


class IdleStates:
    """The states that no call uses at the moment, in `idle`, the one used last at the end.

    max_count: how many there may be, 0 for none.
    max_bytes: their memory over all devices, by default a quarter of what the devices have. The one used last may
    exceed it. Both may be set at any time, and hold from the next call on.
    head_cut: whether the head is cut over ranks where the target is, and it can be; None, where that pays. From the
    next call on.
    """

    def __init__(self, target: Target, head: DraftHead, tree: TreeConfig):
        self.target, self.head, self.tree = target, head, tree
        self.idle: list[Lease] = []
        self.streams = SideStreams()
        self.prompts = self._new_prompts()
        self.head_cut: bool | None = None
        self.heads: Sequence[DraftHead] | None = None  # the parts of a head that is cut
        self._portrait: Portrait | None = None  # of what they were cut from
        self.max_count = MAX_IDLE
        self.max_bytes = int(MAX_SHARE * sum(_memory(device) for device in target.devices))

    @property
    def num_bytes(self) -> int:
        """Memory of the idle states, over all devices."""
        return sum(each.num_bytes for each in self.idle.copy())

    def clear(self) -> None:
        """Let go of all idle states, and of the graphs of prompts: their memory is free then."""
        with self.target.turn.lock:
            self._drop(self.idle.copy())
            if self.prompts is not None:
                self.prompts.close()

    def follow(self, target: Target) -> None:
        """From now on make states for another target; those of the last one are let go of, also as they come back."""
        with self.target.turn.lock:
            self.target = target
            self.prompts = self._new_prompts()
            self.heads = self._portrait = None
            self._drop(self.idle.copy())

    @contextmanager
    def lease(
        self,
        speculative: bool,
        batch: int,
        max_length: int,
        keeps: Keeps = Keeps.NOTHING,
        texts: Texts | None = None,
        trees: Sequence[TreeConfig] = (),
    ) -> Iterator[Lease]:
        """A state for `batch` sequences of up to `max_length` tokens: an idle one, or a new one in place of one too
        small. It is idle again after the block, even with a round under way: the next one comes behind it.

        texts: what is going to be prefilled, where rows of an earlier call are wanted: a state that holds as many as
        possible of them, see `Held`.
        trees: those that its rounds with the head may use; by default the model's own.
        """
        trees = tuple(trees or [self.tree]) if speculative else (ROOT_ALONE,)
        wanted = _Wanted(speculative, batch, max_length, keeps, trees)
        turn = self.target.turn
        with turn.lock, turn():
            if speculative:
                self._cut()
            leased = (texts and self._go_on(wanted, texts)) or self._take(wanted) or self._new(wanted)
        try:
            yield leased
        except (GeneratorExit, KeyboardInterrupt):  # between two steps of the host, which knows what is held
            raise
        except BaseException:
            leased.state.held = None
            raise
        finally:
            self._give_back(leased)

    def _cut(self) -> None:
        """Let `heads` be those of the head as it is now."""
        now = portrait(self.head) if self._cuts_head() else None
        if now != self._portrait:
            self.heads = self._portrait = None
            self._drop([each for each in self.idle.copy() if self._is_stale(each)])  # and those before
            self.heads, self._portrait = None if now is None else parts_for(self.head, self.target), now

    def _cuts_head(self) -> bool:
        links = self.target.links
        if links is None or self.head_cut is not None:
            return links is not None and bool(self.head_cut)
        return pays(pass_bytes(self.head), self.head.config.num_layers, len(links.devices))

    # -- taking ----------------------------------------------------------------------------------------------------

    def _alike(self, wanted: _Wanted) -> list[Lease]:
        """Idle states that differ in length at the most, the one used last first."""
        return [
            each
            for each in reversed(self.idle.copy())
            if (each.speculative, each.state.batch, each.state.keeps, each.state.trees)
            == (wanted.speculative, wanted.batch, wanted.keeps, wanted.trees)
            and not self._is_stale(each)
        ]

    def _is_stale(self, lease: Lease) -> bool:
        """Whether it belongs to another target, or to parts of a head that is no longer cut so."""
        return lease.state.target is not self.target or (lease.speculative and lease.state.heads is not self.heads)

    def _claim(self, lease: Lease) -> Lease | None:
        """Take a state out of `idle`, unless another thread was faster."""
        try:
            self.idle.remove(lease)
        except ValueError:
            return None
        return lease

    def _take(self, wanted: _Wanted) -> Lease | None:
        """An idle state that is large enough and holds nothing that a call asked to keep; else, where there is no room
        for one more, the one used least recently. Those too small are dropped if there is none."""
        alike = self._alike(wanted)
        large = [each for each in alike if each.state.max_length >= wanted.max_length]
        free = [each for each in large if not each.kept]
        if free:
            return self._claim(free[0])
        if large and self._is_full(large[-1].num_bytes):
            return self._claim(large[-1])
        self._drop([each for each in alike if not each.kept])
        return None

    def _is_full(self, num_bytes: int) -> bool:
        """Whether a further state of so many bytes would put out another one."""
        return len(self.idle) >= self.max_count or self.num_bytes + num_bytes > self.max_bytes

    def _go_on(self, wanted: _Wanted, texts: Texts) -> Lease | None:
        """The state whose caches hold most of the texts.

        It is taken itself where that is most of what it holds, and it is long enough. Else another one gets a copy of
        the rows: one that is longer, in its place, or one beside it, since the other texts may be gone on with too.
        """
        target, edits, alike = self.target, self.target.edits(), self._alike(wanted)
        found = [(each.state.held.shared(texts, target, edits), each) for each in alike if each.state.held]
        starts, best = max(found, key=lambda each: sum(each[0]), default=([0], None))
        if best is None or not any(starts):
            return None
        held = best.state.held
        goes_on = held is not None and 2 * sum(start + 1 for start in starts) >= sum(held.rows)
        if goes_on and best.state.max_length >= wanted.max_length:
            return self._claim(best)
        try:
            if goes_on:  # with room for the next turns: a new state means a new graph
                longer = max(wanted.max_length, best.state.max_length * 3 // 2)
                other = self._new(_Wanted(wanted.speculative, wanted.batch, longer, wanted.keeps, wanted.trees))
            else:
                other = self._take(wanted) or self._new(wanted)
        except torch.OutOfMemoryError:
            return None  # for two there is no room
        if other is not best:
            other.state.copy_prefix(best.state, max(starts) + 1)
        if goes_on:
            self._drop([best])
        return other

    def _new(self, wanted: _Wanted) -> Lease:
        rounded = -(-wanted.max_length // LENGTH_STEP) * LENGTH_STEP
        tree, *others = wanted.trees
        arguments = (self.target, tree, wanted.batch, rounded, wanted.keeps, others)
        state = None
        try:
            state = self._round(wanted.speculative, *arguments)
        except torch.OutOfMemoryError:
            if not self.idle and not (self.prompts and self.prompts.of_widths):
                raise
        if state is None:  # idle states of other sizes, or prompts, held the memory
            self.clear()
            torch.cuda.empty_cache()
            state = self._round(wanted.speculative, *arguments)
        return Lease(state, RoundSteps(state, self.streams), wanted.speculative)

    def _round(self, speculative: bool, target: Target, *settings) -> Round:
        if speculative and self.heads is not None:
            state: Round = RankedRound(target, self.heads, *settings)
        else:
            state = Round(target, self.head if speculative else None, *settings)
        state.prompts = self.prompts
        return state

    def _new_prompts(self) -> RankedPrompts | None:
        """On GPUs alone: elsewhere there are no graphs, and rows behind a prompt take time."""
        links = self.target.links
        return None if links is None or self.target.device.type == "cpu" else RankedPrompts(self.target, self.streams)

    # -- giving back -----------------------------------------------------------------------------------------------

    def _give_back(self, lease: Lease) -> None:
        self.idle.append(lease)
        if not is_capturing():  # a generator may be collected anywhere; nothing is freed under a capture
            with self.target.turn.lock:
                self._trim()

    def _trim(self) -> None:
        """Keep to the bounds, and let go of what belongs to another target or head."""
        self._drop([each for each in self.idle.copy() if self._is_stale(each)])
        while len(self.idle) > max(self.max_count, 0) or (len(self.idle) > 1 and self.num_bytes > self.max_bytes):
            self._drop(self.idle[:1])

    def _drop(self, leases: list[Lease]) -> None:
        """Let go of idle states, their memory and their graphs."""
        for each in leases:
            if self._claim(each):
                each.step.close()


class _Wanted(NamedTuple):
    """What a call needs."""

    speculative: bool
    batch: int
    max_length: int
    keeps: Keeps
    trees: tuple[TreeConfig, ...]


def _memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
