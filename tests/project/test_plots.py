"""What benches draw: numbers lie inside of the picture and on no other one, axes of bars are linear and begin at 0."""

import itertools
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
pytest.importorskip("matplotlib")


@pytest.fixture
def plots(bench):
    return bench("lib.plots")


def drawn(plots, monkeypatch, name):
    """The figure of a record, instead of a file."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda pyplot, figure, path: figures.append(figure))
    draw = {"ops": plots.plot_ops, "decode-smollm2-135m": plots.plot_decode}[name]
    draw(json.loads((BENCH / "results" / f"{name}.json").read_text()), Path("unused.png"))
    (figure,) = figures
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("name", ["ops", "decode-smollm2-135m"])
def test_bars_and_their_numbers(plots, monkeypatch, name):
    figure = drawn(plots, monkeypatch, name)
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel()
    bars = figure.axes[0]
    assert bars.get_xscale() == "linear"
    assert bars.get_xlim()[0] == 0
    assert len(bars.texts) == len(bars.patches) > 0
    assert bars.get_legend() is None
    boxes = [text.get_window_extent() for text in bars.texts]
    edge = bars.get_window_extent()
    for text, box in zip(bars.texts, boxes, strict=True):
        assert "x " in text.get_text()
        assert edge.x0 < box.x0 < box.x1 <= edge.x1, text.get_text()
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    longest = max(bar.get_width() for bar in bars.patches)
    assert bars.get_xlim()[1] < 2.5 * longest, "bars, not blanks, fill the picture"
