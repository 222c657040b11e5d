"""The README's tables, made from the records in bench/results, so that the two never part.

    python bench/report.py            writes them into README.md, between the two marker lines
    python bench/report.py --check    exit status 1 where they are not what the records say

A figure is shown as soon as the records that it needs are there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib.records import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN = "<!-- results: written by bench/report.py from bench/results, not by hand -->"
END = "<!-- end of results -->"
ROUND = "round-llama-3.1-8b"
OVER_TWO = f"{ROUND}-tensor-parallel"
ROUND_70B = "round-llama-3.3-70b"
OVER_TWO_70B = f"{ROUND_70B}-tensor-parallel"
DECODE = "decode-smollm2-135m"
EXCHANGE = "exchange-llama-3.1-8b"
BATCH, SHAPES = "batch-smollm2-135m", "batch-llama-3.1-8b"
OPS = "ops"


class Figure(NamedTuple):
    """A row. `records`: the names of those that it needs, the first of which says where and when it was measured.

    value and floor take these records, in this order; aim is what the project wants, floor what the bytes allow.
    """

    name: str
    records: tuple[str, ...]
    value: Callable[..., float]
    form: str
    aim: str
    floor: Callable[..., float] | None = None


def _field(name: str) -> Callable[[dict], float]:
    return lambda record: record[name]


def _ratio(name: str) -> Callable[[dict, dict], float]:
    return lambda record, base: record[name] / base[name]


def _growth(long: dict, short: dict) -> float:
    """What more context adds to a round, over the time of the bytes that it adds."""
    return (long["round_ms"] - short["round_ms"]) / (long["floor_ms"] - short["floor_ms"])


def _mean_speedup(record: dict) -> float:
    rows = [row["speedup"] for row in record["rows"] if row["temperature"] == 0]
    return sum(rows) / len(rows)


def _op(op: str, shape: str, name: str) -> Callable[[dict], float]:
    """A field of a row of bench/ops.py; a KeyError where the record has no such row."""

    def value(record: dict) -> float:
        found = {(row["op"], row["shape"]): row for row in record["rows"]}
        return found[op, shape][name]

    return value


def _share_of_texts(record: dict) -> float:
    """Of all temperatures, sizes of a batch and conversations; a KeyError where the record is older than these."""
    rows = [*record["rows"], *record["chat"]]
    return sum(row["same"] for row in rows) / sum(row["prompts"] for row in rows)


def _least_over_plain(record: dict) -> float:
    """Of all batch sizes that the pair decoded greedily."""
    return min(row["over_plain"] for row in record["pair"] if row["temperature"] == 0)


def _shapes_over_plain(batch: int) -> Callable[[dict], float]:
    """A KeyError where the record has no such batch."""
    return lambda record: {row["batch"]: row["over_plain"] for row in record["shapes"]["rows"]}[batch]


def _boundary(several: dict, one: dict) -> float:
    """What each boundary between GPUs adds to a round, in us."""
    return (several["round_ms"] - one["round_ms"]) / several["boundaries"] * 1e3


FIGURES = (
    Figure("round, 8B", (ROUND,), _field("round_ms"), "{:.2f} ms", "≤ 8.2 ms", _field("floor_ms")),
    Figure("the same in `eagenerate`'s loop", (ROUND,), _field("loop_ms"), "{:.2f} ms", "", _field("floor_ms")),
    Figure("the same by SafeAILab/EAGLE", (ROUND,), lambda r: r["upstream"]["round_ms"], "{:.1f} ms", ""),
    Figure("T=1 with top-p, over T=0", (f"{ROUND}-t1", ROUND), _ratio("round_ms"), "{:.2f} x", "≤ 1.03 x"),
    Figure("plain token, 8B", (ROUND,), _field("plain_ms"), "{:.2f} ms", "≤ 5.9 ms", _field("plain_floor_ms")),
    Figure("plain token, 8B in 8 bits", (f"{ROUND}-8bits",), _field("plain_ms"), "{:.2f} ms", "≤ 3.4 ms",
           _field("plain_floor_ms")),
    Figure("round, 8B in 8 bits", (f"{ROUND}-8bits",), _field("round_ms"), "{:.2f} ms", "≤ 5.9 ms",
           _field("floor_ms")),
    Figure("plain token, 8B in 4 bits", (f"{ROUND}-4bits",), _field("plain_ms"), "{:.2f} ms", "≤ 2.5 ms",
           _field("plain_floor_ms")),
    Figure("round, 8B in 4 bits, tree 32/6/8", (f"{ROUND}-4bits",), _field("round_ms"), "{:.2f} ms", "≤ 4.3 ms",
           _field("floor_ms")),
    Figure("the same with `lm_head` in 8 bits", (f"{ROUND}-4bits-lm-head",), _field("round_ms"), "{:.2f} ms",
           "≤ 4.1 ms", _field("floor_ms")),
    Figure("context 32k, over its bytes' time", (f"{ROUND}-32k", ROUND), _growth, "{:.2f} x", "≤ 1.25 x"),
    Figure(
        "`tree_attention`, 60 rows, context 32k", (OPS,),
        _op("tree_attention", "B=1, 60 rows, context 32000", "share_of_ceiling"), "{:.0%} of the bandwidth", "≥ 80 %",
    ),
    Figure("`compact_kv`, 32 layers, 8 rows", (OPS,), _op("compact_kv", "B=1, 32 layers, 8 rows", "us"), "{:.1f} us",
           "≤ 10 us"),
    Figure("batch 8, over batch 1", (f"{ROUND}-batch8", ROUND), _ratio("round_ms"), "{:.2f} x", "≤ 1.6 x"),
    Figure(
        "prefill of 8k tokens with the head, over the stock model's", (f"{ROUND}-8k",),
        lambda record: record["prefill_ms"] / record["stock_prefill_ms"], "{:.2f} x", "≤ 1.05 x",
    ),
    Figure("round, SmolLM2-135M", ("round-smollm2-135m",), _field("round_ms"), "{:.2f} ms", "", _field("floor_ms")),
    Figure("SmolLM2 pair over plain decoding, T=0", (DECODE,), _mean_speedup, "{:.2f} x", "≥ 1.8 x"),
    Figure("the pair at any batch of 1 to 32 over plain decoding, least", (BATCH,), _least_over_plain, "{:.2f} x",
           "≥ 1.0 x"),
    Figure("8B, 8 sequences over plain decoding, with the pair's acceptance", (SHAPES,), _shapes_over_plain(8),
           "{:.2f} x", "≥ 2.7 x"),
    Figure("8B, 32 sequences, with that acceptance", (SHAPES,), _shapes_over_plain(32), "{:.2f} x", "≥ 2.1 x"),
    Figure("8B with a head that knows nothing, time over plain decoding's", (SHAPES,),
           lambda record: record["shapes"]["random_head_over_plain"], "{:.3f} x", "≤ 1.05 x"),
    Figure("rows of logits, 8B, with a bit that is not plain decoding's", ("bits-llama-3.1-8b",), _field("differ"),
           "{:,.0f}", "0"),
    Figure("texts of the SmolLM2 pair that are plain decoding's, bfloat16", ("lossless-bfloat16",), _share_of_texts,
           "{:.1%}", "100 %"),
    Figure("the same over two GPUs, every layer on both", ("lossless-bfloat16-tensor-parallel",), _share_of_texts,
           "{:.1%}", "100 %"),
    Figure("8B, half of the layers on each of two GPUs: the boundary adds", (f"{ROUND}-2gpus", ROUND), _boundary,
           "{:.0f} us", "≤ 60 us"),
    Figure("round, 8B with every layer on two GPUs, over one", (OVER_TWO, f"{OVER_TWO}-beside"),
           _ratio("round_ms"), "{:.2f} x", "≤ 0.68 x", lambda two, one: two["floor_ms"] / one["round_ms"]),
    Figure("plain token, the same", (OVER_TWO, f"{OVER_TWO}-beside"), _ratio("plain_ms"), "{:.2f} x", "≤ 0.65 x",
           lambda two, one: two["plain_floor_ms"] / one["plain_ms"]),
    Figure("prompt of 512 tokens, the same", (OVER_TWO, f"{OVER_TWO}-beside"), _ratio("prefill_ms"), "{:.2f} x", ""),
    Figure("context 32k over two GPUs, over its bytes' time", (f"{OVER_TWO}-32k", OVER_TWO), _growth, "{:.2f} x",
           "≤ 1.5 x"),
    Figure("an exchange of 60 rows between two GPUs, in a verify of 8B", (EXCHANGE,),
           lambda record: record["table"][0]["exchange_us"], "{:.1f} us", "≤ 4 us"),
    Figure("round, 70B, half of the layers on each of two GPUs", (f"{ROUND_70B}-2gpus",), _field("round_ms"),
           "{:.1f} ms", "≤ 1.15 x the floor", _field("floor_ms")),
    Figure("round, 70B with every layer on two GPUs, over half of the layers on each",
           (OVER_TWO_70B, f"{OVER_TWO_70B}-beside"), _ratio("round_ms"), "{:.2f} x", "≤ 0.58 x",
           lambda two, shards: two["floor_ms"] / shards["round_ms"]),
)  # fmt: skip


def load(folder: Path) -> dict[str, dict]:
    """Record by file name, without its ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def figure_row(figure: Figure, records: dict[str, dict]) -> str | None:
    """A line of the table; None where a record is missing, or is older than one of its fields."""
    if any(name not in records for name in figure.records):
        return None
    taken = [records[name] for name in figure.records]
    try:
        value = figure.form.format(figure.value(*taken))
    except KeyError:
        return None
    floor = figure.form.format(figure.floor(*taken)) if figure.floor else ""
    cells = (figure.name, value, figure.aim, floor, taken[0]["hardware"].removeprefix("NVIDIA "), taken[0]["commit"])
    return f"| {' | '.join(cells)} |"


def figures_table(records: dict[str, dict]) -> list[str]:
    rows = [row for figure in FIGURES if (row := figure_row(figure, records))]
    benches = "`round`, `decode`, `ops`, `bits`, `lossless`, `batch` in `bench/`"
    head = f"| {benches} | measured | aim | floor (bytes) | hardware | commit |"
    return [head, "| --- | --- | --- | --- | --- | --- |", *rows] if rows else []


def decode_table(records: dict[str, dict]) -> list[str]:
    record = records.get(DECODE)
    if record is None:
        return []
    lines = [
        f"| {record['model']} and the shipped head, {record['max_new_tokens']} new tokens | T | tokens per round "
        "| tokens/s | plain, same engine |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(record["rows"], key=lambda row: (row["temperature"], row["prompts"])):
        speeds = (f"{row[name]:,.0f}" for name in ("tokens_per_second", "plain_tokens_per_second"))
        lines.append(f"| {row['prompts']} | {row['temperature']:g} | {row['tau']:.2f} | {' | '.join(speeds)} |")
    return lines


def render(readme: str, folder: Path = RESULTS) -> str:
    """The README's text with the tables of the records in `folder`."""
    for marker in (BEGIN, END):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md must have this line once: {marker}")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    records = load(folder)
    tables = [table for table in (figures_table(records), decode_table(records)) if table]
    body = "\n\n".join("\n".join(table) for table in tables)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the README is up to date")
    args = parser.parse_args()
    text = README.read_text()
    wanted = render(text)
    if args.check:
        changes = difflib.unified_diff(text.splitlines(), wanted.splitlines(), "README.md", "records", lineterm="", n=0)
        print("\n".join(changes))
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
