"""One graph a rank: begun together, launched together, on a machine without GPUs with graphs that only take notes."""

import contextlib
import gc

import pytest
import torch

import eagle_fast.decoding.rank_graphs as rank_graphs
from eagle_fast.decoding.rank_graphs import RankGraphs
from eagle_fast.layers.links import Links

DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]


class Notes(list):
    """What was called, in order; `fails`: calls that raise, each once."""

    def __init__(self):
        super().__init__()
        self.fails = {}

    def note(self, *call):
        self.append(call)
        if call in self.fails:
            raise self.fails.pop(call)


class Graph:
    made = 0

    def __init__(self, notes, keep_graph):
        assert keep_graph, "made executable when no capture is under way"
        self.notes, self.number = notes, Graph.made
        Graph.made += 1

    def __getattr__(self, name):
        return lambda *args, **options: self.notes.note(name, self.number)


class Stream:
    def __init__(self, device):
        self.device = device

    def wait_stream(self, other):
        pass


class TakingNotes(Links):
    def __init__(self, notes):
        super().__init__(DEVICES)
        self.notes, self.broken = notes, False

    @contextlib.contextmanager
    def whole(self):
        self.broken = True
        yield
        self.broken = False

    def settle(self):
        self.notes.note("settle", None)


@pytest.fixture
def notes(monkeypatch):
    notes, Graph.made = Notes(), 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: Graph(notes, keep_graph))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(rank_graphs, "abandon", lambda *_: notes.append(("abandon", None)))
    return notes


def graphs_over(notes):
    return RankGraphs(lambda: notes.note("step", None), TakingNotes(notes), DEVICES)


def test_ranks_are_captured_and_launched_together(notes):
    step = graphs_over(notes)
    for _ in range(4):
        step()
    assert notes == [
        ("step", None), ("step", None),  # for real
        ("settle", None), ("capture_begin", 0), ("capture_begin", 1), ("step", None), ("capture_end", 0),
        ("capture_end", 1), ("instantiate", 0), ("instantiate", 1),
        ("replay", 0), ("replay", 1), ("replay", 0), ("replay", 1),
    ]  # fmt: skip
    assert len(step.others) == 1
    step.close()
    assert step.graph is None
    assert step.others == []


def test_an_interrupt_between_two_launches_is_known_to_the_links(notes):
    step = graphs_over(notes)
    for _ in range(3):
        step()
    notes.fails = {("replay", 1): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        step()
    assert step.links.broken


@pytest.mark.parametrize("call", [("step", None), ("capture_begin", 1), ("capture_end", 0), ("instantiate", 1)])
def test_a_capture_that_fails_ends_on_all_ranks_and_rounds_run_eagerly(notes, call):
    step = graphs_over(notes)
    step(), step()
    del notes[:]
    notes.fails = {call: RuntimeError("not in a capture")}
    with pytest.warns(UserWarning, match="rounds run without CUDA graphs, which is slower: not in a capture"):
        step()
    begun, ended = ([each[1] for each in notes if each[0] == f"capture_{what}"] for what in ("begin", "end"))
    if call != ("capture_begin", 1):
        assert begun == ended == [0, 1]
    else:
        assert ended == [0]
    del notes[:]
    step()
    assert notes == [("step", None)]


def test_no_garbage_is_collected_under_a_capture(notes):
    collected = []
    step = RankGraphs(lambda: collected.append(gc.isenabled()), TakingNotes(notes), DEVICES)
    for _ in range(3):
        step()
    assert collected == [True, True, False]
    assert gc.isenabled()


def test_an_interrupt_in_a_capture_leaves_the_step_to_be_captured(notes):
    step = graphs_over(notes)
    step(), step()
    notes.fails = {("step", None): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        step()
    assert [each for each in notes if each[0] == "capture_end"] == [("capture_end", 0), ("capture_end", 1)]
    step()
    assert step.graph is not None
