"""What goes wrong over ranks on GPUs, and that their text is one device's again in the next calls."""

from __future__ import annotations

import itertools

import pytest
import torch
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
    with torch.cuda.device(1):
        torch.cuda._sleep(8_000_000_000)  # about four seconds: other tests may have turns on that GPU
    with pytest.raises(OutOfStepError, match=r"rank 0 \(cuda:0\) waited in vain for rank 1 \(cuda:1\)"):
        text.decode()
    text.check(2)
