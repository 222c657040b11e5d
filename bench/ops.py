"""What every kernel takes at real shapes, against the bytes it must move and against the best way of PyTorch.

    python bench/ops.py                            all kernels, a table and one line of JSON
    python bench/ops.py --only tree_attention      one kernel; the option may be repeated
    python bench/ops.py --out results/             also ops.json and ops.png, which needs matplotlib

    us        median time of one call, in a CUDA graph of several; buffers that stream take turns, so none is in L2
    TB/s      the fewest bytes that the work must move, over that time
    ceiling   that rate as a share of what a read-only stream reaches on this GPU in the same run; small work is
              bound by its launches, and what lies in L2 can pass 100 %
    PyTorch   the time of the way named beside it

The result of a kernel is compared with PyTorch's before anything is timed. The table of cases is bench/lib/op_cases.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import triton

REPEATS = 20
CALLS = 16  # of a graph, at least: the time to launch a graph then does not show


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a kernel of the table; may be repeated")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help="graph launches (%(default)s)")
    parser.add_argument("--commit", default="", help="to note in the record")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for ops.json and ops.png")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these benches time Triton kernels on a CUDA GPU, and torch finds none here")
    if args.out and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out draws with matplotlib, which is not installed: pip install '.[plot]'")
    return args


def graph_of(call, copies: int) -> tuple[Any, int]:
    """(work for one graph, calls in it): every copy in turn, the whole round of them once or more."""
    rounds = -(-CALLS // copies)
    return lambda: [call(i) for _ in range(rounds) for i in range(copies)], rounds * copies


def agree(ours: Any, theirs: Any, tolerance: float) -> bool:
    ours, theirs = ours.double(), theirs.double()
    ours = ours.sum(0) if ours.dim() > theirs.dim() else ours
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def measure(case, rate: float, repeats: int) -> dict[str, Any]:
    from lib.timing import milliseconds

    if case.tolerance is not None and not agree(case.kernel(0), case.pytorch(0), case.tolerance):
        raise SystemExit(f"{case.op}, {case.shape}: the kernel's result is not PyTorch's")
    times = []
    for call in (case.kernel, case.pytorch):
        work, calls = graph_of(call, case.copies)
        times.append(milliseconds(work, repeats) / calls * 1e3)
    speed = case.num_bytes / times[0] * 1e6
    return {
        "op": case.op, "shape": case.shape, "us": round(times[0], 2), "bytes": case.num_bytes,
        "terabytes_per_second": round(speed / 1e12, 3), "share_of_ceiling": round(speed / rate, 3),
        "pytorch_us": round(times[1], 2), "pytorch": case.how,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    faster = row["pytorch_us"] / row["us"]
    print(
        f"{row['op']:<20}{row['shape']:<40}{row['us']:>10.2f}{row['bytes'] / 1e6:>10.2f}"
        f"{row['terabytes_per_second']:>8.2f}{row['share_of_ceiling']:>9.0%}{row['pytorch_us']:>11.2f}{faster:>8.2f}x  "
        f"{row['pytorch']}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    args = parse()
    from lib.op_cases import CASES
    from lib.plots import plot_ops
    from lib.timing import bandwidth

    names = args.only or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise SystemExit(f"no such kernel: {', '.join(unknown)}; there are {', '.join(CASES)}")
    rate, hardware = bandwidth(), torch.cuda.get_device_name()
    torch.cuda.empty_cache()
    print(f"{hardware}, a read-only stream reaches {rate / 1e12:.2f} TB/s")
    print(f"{'op':<20}{'shape':<40}{'us':>10}{'MB':>10}{'TB/s':>8}{'ceiling':>9}{'PyTorch us':>11}{'':>9}")
    rows = []
    for name in names:
        for case in CASES[name]():
            rows.append(measure(case, rate, args.repeats))
            show(rows[-1])
        torch.cuda.empty_cache()
    record = {
        "bench": "ops", "hardware": hardware, "terabytes_per_second": round(rate / 1e12, 3), "commit": args.commit,
        "torch": torch.__version__, "triton": triton.__version__, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ops.json").write_text(json.dumps(record, indent=1) + "\n")
        plot_ops(record, args.out / "ops.png")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
