"""bench/timeline.py: which rounds it is asked for, that they run, and how what each kernel adds is counted."""

import argparse

import pytest

from eagle_fast import EaModel, TreeConfig


@pytest.fixture
def timeline(bench):
    return bench("timeline")


def test_rounds_by_their_names(timeline):
    assert timeline.round_of("8:16/5/4") == (8, TreeConfig(16, 5, 4))
    for wrong in ("8", "8:16", "8:16/5", "a:16/5/4", "8:0/5/4"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{wrong}' is no round"):
            timeline.round_of(wrong)


@pytest.mark.parametrize("plain", [False, True])
def test_rounds_of_several_sizes_run_with_one_model(bench, timeline, plain, monkeypatch):
    shapes, taken = bench("lib.shapes"), []

    def graphed(work, devices, links):
        work()
        return lambda: taken.append(work)

    monkeypatch.setattr(timeline, "graphed", graphed)
    target = shapes.build_target("tiny", "cpu")
    model = EaModel(target, shapes.build_head(target), adaptive=False)
    args = argparse.Namespace(plain=plain, context=9)
    for batch, tree in ((2, TreeConfig(8, 3, 3)), (3, TreeConfig(4, 3, 1))):
        timeline.graphed_round(model, batch, tree, args)()
        state = model.states.idle[-1].state
        assert (state.batch, state.num_nodes) == (batch, 1 if plain else tree.total_token)
        model.states.clear()
    assert len(taken) == 2


def test_what_overlaps_is_counted_once(timeline, capsys, monkeypatch):
    monkeypatch.setattr(timeline, "REPLAYS", 2)
    one = [
        timeline.Span("void a::first<int>(x)", 0, 4),
        timeline.Span("second(y)", 3, 7),
        timeline.Span("second(y)", 5, 6),
    ]
    two = [timeline.Span(name, start + 10, end + 10) for name, start, end in one]
    found = timeline.show("a round", sorted([*one, *two], key=lambda span: span.end))
    # the second replay's first kernel waits from 7 to 14
    assert found == {"first": (4 + 7) / 2, "second": (2 + 1 + 2 + 1) / 2}
    shown = capsys.readouterr().out
    assert "a round: 8 us in 3 kernels" in shown
