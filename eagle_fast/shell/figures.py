"""What `eagle-fast bench` found, as a table and as a plot."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

WAYS = ("head", "plain", "stock")  # with the draft head, without it, transformers alone
TITLES = {"head": "with head", "plain": "plain", "stock": "stock generate"}
COLOURS = {"head": "#0f8b6d", "plain": "#9aa5ab", "stock": "#c98a2b"}  # of all plots of this project
COLUMNS = {"tau": 5, "head": 7, "plain": 7, "stock": 7, "x plain": 7, "x stock": 7, "same": 8}  # name -> characters
Row = dict[str, Any]


def speed(rows: list[Row], way: str) -> float | None:
    """Tokens a second over the rows that were decoded so; None where none was."""
    timed = [row[way] for row in rows if way in row]
    seconds = sum(each["seconds"] for each in timed)
    return sum(each["tokens"] for each in timed) / seconds if seconds else None


def speedup(rows: list[Row], way: str) -> float | None:
    """Of the head over another way, over the rows that were decoded in both."""
    both = [row for row in rows if way in row]
    ours, other = speed(both, "head"), speed(both, way)
    return None if not ours or not other else ours / other


def title(prompt: Any, width: int = 40) -> str:
    """A prompt in a few words."""
    text = " ".join((prompt if isinstance(prompt, str) else str(prompt[-1]["content"])).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _label(row: Row) -> str:
    return f"{title(row['prompt'])}, T={row['temperature']:g}".replace("$", r"\$")  # which would begin a formula


def table(rows: list[Row], temperature: float, width: int) -> Table:
    """A line for each prompt, and one for all, of so many characters."""
    found = Table(title=f"tokens/s at T={temperature:g}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    left = max(min(width - sum(2 + each for each in COLUMNS.values()) - 4, 60), 12)
    found.add_column("prompt", no_wrap=True)
    for name, width in COLUMNS.items():
        found.add_column(name, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        found.add_row(Text(title(row["prompt"], left)), *_cells([row]), "yes" if row["same"] else "NO")
    found.add_section()
    found.add_row("all", *_cells(rows), f"{sum(row['same'] for row in rows)} of {len(rows)}", style="bold")
    return found


def mean_tau(rows: list[Row]) -> float:
    """Tokens over rounds, of all rows together."""
    rounds = sum(row["head"]["tokens"] / row["tau"] for row in rows if row["tau"])
    return sum(row["head"]["tokens"] for row in rows) / rounds if rounds else 0.0


def _cells(rows: list[Row]) -> list[str]:
    speeds = [speed(rows, way) for way in WAYS]
    gains = [speedup(rows, way) for way in WAYS[1:]]
    return [
        f"{mean_tau(rows):.2f}",
        *("" if each is None else f"{each:,.1f}" for each in speeds),
        *("" if each is None else f"{each:.2f}" for each in gains),
    ]


def plot(record: dict[str, Any], path: Path) -> None:
    """Speeds by prompt, and acceptance by depth. Needs matplotlib."""
    figure = draw(record)
    try:
        figure.savefig(path, dpi=140)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: {error}") from error


def draw(record: dict[str, Any]) -> Any:
    """The plot, a matplotlib Figure."""
    from matplotlib.figure import Figure

    rows = record["rows"]
    figure = Figure(figsize=(11, 2 + 0.5 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for place, way in enumerate(WAYS):
        timed = [(index, row) for index, row in enumerate(rows) if way in row]
        if timed:
            speeds = [speed([row], way) or 0.0 for _, row in timed]
            where = [index + 0.27 * (place - 1) for index, _ in timed]
            bars = left.barh(where, speeds, 0.25, label=TITLES[way], color=COLOURS[way])
            gains = [speedup([row], "plain") if way == "head" else None for _, row in timed]
            numbers = [f"{each:,.1f}" for each in speeds]
            notes = [
                text if gain is None else f"{text}, {gain:.2f}x" for text, gain in zip(numbers, gains, strict=True)
            ]
            left.bar_label(bars, notes, padding=2, fontsize=7)
    left.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.25)  # for the numbers
    left.set_xlabel("tokens/s, and times as fast as plain")
    left.set_title(_gains(rows), fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=len(WAYS), fontsize=8)
    temperatures = sorted({row["temperature"] for row in rows if row["acceptance"]})
    for temperature, style in zip(temperatures, cycle(("-o", "--o", ":o", "-.o")), strict=False):
        chosen = [row["acceptance"] for row in rows if row["temperature"] == temperature]
        depths = range(max(map(len, chosen), default=0))
        known = [[shares[depth] for shares in chosen if depth < len(shares)] for depth in depths]
        means = [sum(shares) / len(shares) for shares in known]
        right.plot([depth + 1 for depth in depths], means, style, label=f"T={temperature:g}", color=COLOURS["head"])
    right.set(xlabel="depth of the draft", ylabel="share that was right, mean over prompts", ylim=(0, 1))
    right.set_title("Drafts that were right", fontsize=9)
    if temperatures:
        right.legend(fontsize=8)
    figure.suptitle(f"{record['model']}, {record['dtype']}, {record['hardware']}", fontsize=10)
    return figure


def _gains(rows: list[Row]) -> str:
    found = [f"{gain:.2f}x {TITLES[way]}" for way in WAYS[1:] if (gain := speedup(rows, way))]
    return f"With the head: {', '.join(found)}" if found else "Speed"
