"""What benches draw, from their records alone: one system of colours, units on every axis, numbers on every bar.

Bars show a speed-up: over PyTorch for kernels, over plain decoding for a pair; their axes begin at 0 and are linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_fast.shell.figures import COLOURS

OURS, PLAIN, OTHERS = COLOURS["head"], COLOURS["plain"], (COLOURS["stock"], "#5b7db1", "#a8577e", "#7a6f9b", "#4f9fa8")
INK = "#24302c"
SETS = {"mt_bench": "MT-bench", "gsm8k": "GSM8K", "humaneval": "HumanEval"}


def pyplot() -> Any:
    """matplotlib without a display, in this project's colours. ModuleNotFoundError where it is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    found.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
        "axes.labelcolor": INK, "text.color": INK, "axes.prop_cycle": found.cycler(color=[OURS, *OTHERS]),
        "legend.frameon": False, "figure.dpi": 130,
    })  # fmt: skip
    return found


def bars(axes: Any, labels: Sequence[str], factors: Sequence[float], notes: Sequence[str], over: str) -> None:
    """Horizontal bars of speed-ups with their numbers, and what they are made of as a note behind."""
    places = range(len(labels))
    axes.barh(places, factors, 0.62, color=[OURS if factor >= 1 else PLAIN for factor in factors])
    texts = [
        axes.text(factor, place, f" {factor:.2f}x  {note}", va="center", fontsize=8, in_layout=False)
        for place, factor, note in zip(places, factors, notes, strict=True)
    ]
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(
        yticks=list(places),
        yticklabels=labels,
        xlim=(0, max(factors)),
        ylim=(-0.6, len(labels) - 0.4),
        xlabel=f"times as fast as {over}",
    )
    axes.invert_yaxis()
    axes.figure.draw_without_rendering()  # from then on widths are known
    room = axes.get_window_extent().width
    widths = [text.get_window_extent().width / room for text in texts]
    axes.set_xlim(0, 1.02 * max(factor / (1 - width) for factor, width in zip(factors, widths, strict=True)))


def plot_ops(record: dict, path: Path) -> None:
    """Every kernel and shape of a record of ops.py, over PyTorch."""
    rows, plots = record["rows"], pyplot()
    figure, axes = plots.subplots(figsize=(10, 1.4 + 0.25 * len(rows)), layout="constrained")
    notes = [
        f"{row['us']:.1f} us, PyTorch {row['pytorch_us']:.1f} us, {row['share_of_ceiling']:.0%} of the bandwidth"
        for row in rows
    ]
    labels = [f"{row['op']}: {row['shape']}" for row in rows]
    bars(axes, labels, [row["pytorch_us"] / row["us"] for row in rows], notes, "PyTorch")
    axes.set_title(f"Kernels over PyTorch, {record['hardware']} ({record['terabytes_per_second']:.2f} TB/s)")
    save(plots, figure, path)


def plot_decode(record: dict, path: Path) -> None:
    """Of a record of decode.py: speed-up over plain decoding, and how many drafts rounds accept."""
    rows, plots = record["rows"], pyplot()
    timed = [row for row in rows if "speedup" in row]
    figure, panels = plots.subplots(1, 1 + bool(timed), figsize=(11, 4) if timed else (6, 4), layout="constrained")
    model = Path(record["model"]).name
    if timed:
        labels = [f"{name_of(row)}, T={row['temperature']:g}" for row in timed]
        notes = [f"{row['tokens_per_second']:,.0f} tokens/s, tau {row['tau']:.2f}" for row in timed]
        bars(panels[0], labels, [row["speedup"] for row in timed], notes, "plain decoding")
        panels[0].set_title(f"{model}, {record['hardware']}, one sequence")
    depths = panels[-1] if timed else panels
    colours = {name: (OURS, *OTHERS)[place] for place, name in enumerate(dict.fromkeys(map(name_of, rows)))}
    for row in rows:
        shares = row["accepted_at_least"]
        style = "-" if row["temperature"] == 0 else "--" if row["temperature"] < 1 else ":"
        label = f"{name_of(row)}, T={row['temperature']:g}"
        depths.plot(range(1, len(shares) + 1), shares, style, color=colours[name_of(row)], label=label)
    depths.set(xlabel="drafted tokens accepted, at least", ylabel="share of rounds", ylim=(0, 1))
    depths.set_title("Accepted drafts of a round")
    depths.legend(fontsize=7)
    save(plots, figure, path)


def plot_batch(record: dict, path: Path, trees: Sequence[str]) -> None:
    """Of a record of batch.py: tokens a second over plain decoding's, by sequences: lines, with doubling as a step."""
    plots = pyplot()
    where = record["hardware"].removeprefix("NVIDIA ")
    tables = {f"the pair, {where}": [row for row in record["pair"] if row["temperature"] == 0]}
    if record["shapes"]:
        tables[f"{record['shapes']['shape']} with the pair's acceptance, {where}"] = record["shapes"]["rows"]
    tables = {title: rows for title, rows in tables.items() if rows}
    figure, panels = plots.subplots(
        1, len(tables), figsize=(5.6 * len(tables), 4.2), squeeze=False, layout="constrained"
    )
    for axes, (title, rows) in zip(panels[0], tables.items(), strict=True):
        batches = [row["batch"] for row in rows]
        for place, name in enumerate([*trees, "adaptive"]):
            speeds = [row["tokens_per_second"] for row in rows]
            dashes = ("-", "--", ":")[place // len(OTHERS) % 3]
            style = {"color": OTHERS[place % len(OTHERS)], "linestyle": dashes}
            if name == "adaptive":
                style = {"linewidth": 3, "color": OURS}
            factors = [each[name] / each["plain"] for each in speeds]
            axes.plot(batches, factors, label=name, marker="o", markersize=3, **{"linewidth": 1, **style})
            if name == "adaptive":
                for batch, factor in zip(batches, factors, strict=True):
                    axes.annotate(f"{factor:.2f}x", (batch, factor), (0, 5), textcoords="offset points", fontsize=7)
        axes.axhline(1.0, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, map(str, batches))
        axes.set(xlabel="sequences", ylabel="times the tokens/s of plain decoding", title=title, ylim=(0, None))
        axes.legend(fontsize=7)
    save(plots, figure, path)


def name_of(row: dict) -> str:
    return SETS.get(row["prompts"], row["prompts"])


def save(plots: Any, figure: Any, path: Path) -> None:
    figure.savefig(path)
    plots.close(figure)
