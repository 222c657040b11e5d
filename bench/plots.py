"""Every plot anew, from the records in bench/results: needs no GPU, but matplotlib (pip install '.[plot]').

python bench/plots.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from batch import FIXED, name_of
from lib.plots import plot_batch, plot_decode, plot_ops
from lib.records import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of the records (default: bench/results)")
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        plot = path.with_suffix(".png")
        match record.get("bench"):
            case "ops":
                plot_ops(record, plot)
            case "decode":
                plot_decode(record, plot)
            case "batch":
                plot_batch(record, plot, [*map(name_of, FIXED)])
            case _:
                continue
        print(plot)


if __name__ == "__main__":
    main()
