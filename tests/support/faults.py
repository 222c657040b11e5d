"""What goes wrong over ranks on GPUs, and that their text is one device's again in the next calls."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from eagle_fast_kernels.exchange import LOOKS as LOOKS_OF_SECONDS
from eagle_fast_kernels.exchange import Mailbox, await_pushes
from ranked import Pair, prompts

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.layers.links import OutOfStepError

NEW = 60
LOOKS = 100_000  # of a wait that is to run out: some tens of milliseconds


class Killed(Exception):
    pass


def killing(function, call, error):
    """The function, whose call of this number raises, after it has run."""
    calls = itertools.count(1)

    def wrapped(*args, **options):
        out = function(*args, **options)
        if next(calls) == call:
            raise error
        return out

    return wrapped


class OneText:
    """A prompt, and what one device says to it."""

    def __init__(self, pair: Pair):
        self.ranked = pair.ranked
        self.ids = prompts(1, self.ranked.target.device)["input_ids"]
        self.expected = pair.single.eagenerate(self.ids, max_new_tokens=NEW)

    def decode(self):
        return self.ranked.eagenerate(self.ids, max_new_tokens=NEW)

    def check(self, times: int = 1) -> None:
        for _ in range(times):
            assert torch.equal(self.decode(), self.expected)


def check_a_killed_stage(pair: Pair, kind, stage: str, call: int, error, monkeypatch) -> None:
    """kind: the class of the rounds, whose stage raises at that call."""
    text = OneText(pair)
    with monkeypatch.context() as patch:
        patch.setattr(kind, stage, killing(getattr(kind, stage), call, error))
        with pytest.raises(error):
            text.decode()
    text.check(2)


def check_an_interrupted_launch(pair: Pair, where: str, call: int, monkeypatch) -> None:
    """where: of the launches in `peer_links`, after one of which no other rank's follows."""
    text = OneText(pair)
    pair.ranked.target.links.looks = LOOKS
    text.check()
    pair.ranked.states.clear()
    with monkeypatch.context() as patch:
        patch.setattr(peer_links, where, killing(getattr(peer_links, where), call, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            text.decode()
    text.check(2)


def check_a_rank_held_up(pair: Pair) -> None:
    text = OneText(pair)
    pair.ranked.target.links.looks = LOOKS
    text.check()
    said = r"rank 0 \(cuda:0\) waited in vain for rank 1 \(cuda:1\)"
    with held_up(torch.device("cuda", 1)), pytest.raises(OutOfStepError, match=said):
        text.decode()
    text.check(2)


@contextlib.contextmanager
def held_up(device):
    """In this block, of half a minute at most, nothing that is launched on this GPU runs."""
    counters = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(2)]
    nobody = Mailbox(
        1, counters[0], (), torch.zeros(1, dtype=torch.int32, device=device), counters[0].cpu().pin_memory()
    )
    aside = torch.cuda.Stream(device)
    await_pushes(*counters, 1, nobody, 0, looks=10 * LOOKS_OF_SECONDS)
    try:
        yield
    finally:
        with torch.cuda.stream(aside):
            counters[0].fill_(1)
