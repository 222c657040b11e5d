"""What fuzzers share: calls made in worker processes, so that those that hang or end theirs are found; their verdicts,
and the command with its table.

A fuzzer is a module with these functions, found by its name in the workers:

    prepare()                what a worker does first
    outcome(seed, number)    an `Outcome`: the call of this number, made and judged
    describe(seed, number)   (method, note) of the call without making it
    SECONDS                  that a call may take, if other than here
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

VERDICTS = ("refused", "right", "vague", "raw", "wrong", "hung", "crashed")
FAULTS = VERDICTS[2:]
SECONDS = 60  # a call may take
MEMORY = 12 * 2**30  # address space of a worker


class Outcome(NamedTuple):
    verdict: str
    method: str
    note: str


def work(pipe: Connection, name: str, seed: int) -> None:
    """A worker: numbers come in, outcomes go out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    fuzzer = importlib.import_module(name)
    fuzzer.prepare()
    pipe.send("ready")
    while True:
        number = pipe.recv()
        pipe.send(tuple(fuzzer.outcome(seed, number)))


class Worker:
    """A process with the number that it is at, since when; the time that it takes to start does not count."""

    def __init__(self, name: str, seed: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, name, seed), daemon=True)
        self.process.start()
        there.close()
        self.number: int | None = None
        self.since = 0.0
        self.ready = False

    def give(self, number: int) -> None:
        if not self.ready:
            self.ready = bool(self.pipe.recv())
        self.pipe.send(number)
        self.number, self.since = number, time.monotonic()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def judged(name: str, seed: int, numbers: list[int], jobs: int):
    """(number, outcome) of every call of a fuzzer, as they come."""
    fuzzer = importlib.import_module(name)
    describe, seconds = fuzzer.describe, getattr(fuzzer, "SECONDS", SECONDS)
    left = numbers[::-1]
    workers = [Worker(name, seed) for _ in range(jobs)]
    while left or any(each.number is not None for each in workers):
        for place, each in enumerate(workers):
            if each.number is not None and time.monotonic() - each.since > seconds:
                yield each.number, Outcome("hung", *describe(seed, each.number))
                each.end()
                workers[place] = Worker(name, seed)
            elif each.number is None and left:
                each.give(left.pop())
        for ready in wait([each.pipe for each in workers if each.number is not None], timeout=1.0):
            place = next(n for n, each in enumerate(workers) if each.pipe is ready)
            number = workers[place].number
            workers[place].number = None
            try:
                yield number, Outcome(*workers[place].pipe.recv())
            except EOFError:
                yield number, Outcome("crashed", *describe(seed, number))
                workers[place].end()
                workers[place] = Worker(name, seed)
    for each in workers:
        each.end()


def main(name: str, text: str) -> int:
    """The command of a fuzzer: calls, then a table of verdicts. text: what --help says."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="how many calls (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other calls (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default 1)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call (default 0)")
    parser.add_argument("--only", type=int, help="make the call of this number alone, in this process")
    parser.add_argument(
        "--show", nargs="*", default=FAULTS, choices=VERDICTS, help="verdicts to print, by default faults"
    )
    args = parser.parse_args()
    if args.only is not None:
        fuzzer = importlib.import_module(name)
        fuzzer.prepare()
        print(*fuzzer.outcome(args.seed, args.only), sep="\n")
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    started = time.monotonic()
    numbers = list(range(args.first, args.first + args.calls))
    for done, (number, found) in enumerate(judged(name, args.seed, numbers, args.jobs), 1):
        counts[found.method, found.verdict] += 1
        if found.verdict in args.show:
            print(f"\r{found.verdict}  --seed {args.seed} --only {number}  {found.note}", flush=True)
        if done % 20 == 0 or done == args.calls:
            filled = 40 * done // args.calls
            bar = "#" * filled + "." * (40 - filled)
            print(
                f"\r[{bar}] {done}/{args.calls} {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True
            )
    print(file=sys.stderr)
    print(f"{'':16}" + "".join(f"{verdict:>9}" for verdict in VERDICTS))
    methods = list(dict.fromkeys(method for method, _ in counts))
    for method in methods:
        print(f"{method:16}" + "".join(f"{counts[method, verdict]:9}" for verdict in VERDICTS))
    totals = {verdict: sum(counts[method, verdict] for method in methods) for verdict in VERDICTS}
    print(f"{'all':16}" + "".join(f"{total:9}" for total in totals.values()))
    return int(any(totals[verdict] for verdict in FAULTS))


def assert_no_fault(outcome, numbers, seed: int = 11) -> None:
    """None of these calls is a fault; what is said of one makes it again."""
    for number in numbers:
        found = outcome(seed, number)
        assert found.verdict not in FAULTS, f"--seed {seed} --only {number}: {found.verdict} {found.note}"
