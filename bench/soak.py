"""Does decoding stay right, and its memory flat, whatever comes? Thousands of requests, in several threads.

    python bench/soak.py --device cpu --out bench/results/soak-cpu.json
    python bench/soak.py --device cuda --out bench/results/soak-gpu.json

A tiny model with random weights gets requests of one to four prompts, greedy and sampled, with and without the head, as
whole texts and as streams, with processors, criteria and stop tokens, as turns of conversations. One in six ends early:
in an exception out of a processor, in a KeyboardInterrupt at any moment, as a stream that is closed. Between parts of
the run a hook, an adapter or another weight comes or goes, which the target follows, and idle states are let go of, as
also now and then in the middle. Every text is held against a table that was made before, by stock `generate` where
it can.

After each part, idle states are let go of and memory is measured: what the process has on a CPU, what torch has
allocated and reserved on a GPU. It is called flat if none of these, nor threads and open files, have grown from the
second fifth of the points to the last one (medians) by more than 2 %, or by 8 MB where that is more (threads, files:
not at all). The exit status says whether the run was flat and every text right.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lib import records
from lib.soaking import Soak, verdict
from tqdm import tqdm

POINTS = 25


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=10000, metavar="N", help="how many in all (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=3, metavar="N", help="that send them (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and requests (default %(default)s)"
    )
    parser.add_argument("--commit", default="", help="for the record, where there is no git checkout to ask")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to this file")
    args = parser.parse_args()
    if args.requests < POINTS or args.threads < 1:
        parser.error(f"take {POINTS} requests or more, and a thread or more")
    return args


def main() -> int:
    args = parse()
    started = time.perf_counter()
    soak = Soak(args.device, args.seed)
    print(
        f"{len(soak.cases)} right texts of {len(soak.changes)} models, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    points = [soak.measure()]
    with tqdm(total=args.requests, unit="request", disable=None) as bar:
        for part in range(POINTS):
            count = args.requests * (part + 1) // POINTS - args.requests * part // POINTS
            soak.run(count, args.threads, part, bar.update)
            points.append(soak.measure())
    if soak.device.type == "cuda" and soak.graphs_dropped == 0:
        soak.wrong.append("no graph was captured")
    found = verdict(points)
    record = {
        "bench": "soak", "device": args.device, "requests": args.requests, "threads": args.threads, "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1), "kinds": dict(sorted(soak.kinds.items())),
        "wrong": len(soak.wrong), "most_idle_states": soak.most_idle, "most_idle_mb": round(soak.most_bytes / 2**20, 1),
        "graphs_dropped": soak.graphs_dropped, "flat": not found, "grown": found, "points": points,
        **records.environment(args.commit),
    }  # fmt: skip
    if args.device == "cpu":
        record["hardware"] = "cpu"
    show(record, soak)
    if args.out:
        records.write(record, args.out)
    return 0 if record["flat"] and not soak.wrong else 1


def show(record: dict, soak: Soak) -> None:
    names = list(record["points"][0])
    print("".join(f"{name:>14}" for name in names))
    for point in record["points"][:: max(1, len(record["points"]) // 12)]:
        print("".join(f"{point[name]:>14,}" for name in names))
    print(", ".join(f"{name} {count:,}" for name, count in record["kinds"].items()))
    print(f"at most {record['most_idle_states']} idle states with {record['most_idle_mb']} MB, "
          f"{record['graphs_dropped']} graphs let go of at ends of parts, {record['seconds']:.0f} s")  # fmt: skip
    for each in soak.wrong[:5]:
        print(f"WRONG: {each}")
    flat = "flat" if record["flat"] else "not flat: " + "; ".join(record["grown"])
    print(f"memory {flat}; {record['wrong']} of {record['requests']:,} wrong")


if __name__ == "__main__":
    sys.exit(main())
