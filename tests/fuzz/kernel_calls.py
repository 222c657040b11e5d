"""Calls of the wrappers of kernels/ with one or two wrong arguments: refused by a ValueError that names one of them, or
right, which is what the twin in PyTorch makes of them. All else is a fault.

    python tests/fuzz/kernel_calls.py --calls 2000 --seed 3

runs calls in a worker process, so that one that hangs or ends it is found and counted. Kernels run in Triton's
interpreter, on the CPU, where a load or store out of bounds is seen; every fourth call takes the twin, as CPU tensors
do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")  # before triton is imported

import bounds
import numpy as np
import torch
from kernel_cases import CASES, Case
from torch import Tensor

VERDICTS = ("refused", "right", "raw", "wrong", "hung", "crashed")
FAULTS = VERDICTS[2:]
SECONDS = 20  # a call may take
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 100, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 10**5000, 0.0, -0.5, 0.5, 2.5, 1e-40, 1e39,
    float("nan"), float("inf"), float("-inf"), True, False, np.int64(1), np.float32(0.5), np.bool_(True),
)  # fmt: skip
OTHERS = (None, "1", b"1", [], [1], (2, 2), {}, 1j, object, Tensor, torch.float32, "cpu", np.zeros((2, 3), np.float32))


# -- changes of an argument: another value, or the same where a change does not apply ----------------------------------


def to_dtype(x: Tensor, dice: random.Random) -> Tensor:
    return x.to(dice.choice(DTYPES))


def longer(x: Tensor, dice: random.Random) -> Tensor:
    """The last along one dimension stands twice."""
    dim = dice.randrange(max(x.dim(), 1))
    return torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim) if x.numel() and x.dim() else x


def shorter(x: Tensor, dice: random.Random) -> Tensor:
    """One less along one dimension, as a view or in memory of its own."""
    dim = dice.randrange(max(x.dim(), 1))
    if not x.dim() or not x.shape[dim]:
        return x
    view = x.narrow(dim, 0, x.shape[dim] - 1)
    return view if dice.random() < 0.5 else view.contiguous()


def empty(x: Tensor, dice: random.Random) -> Tensor:
    return x.narrow(dice.randrange(x.dim()), 0, 0) if x.dim() else x[None][:0]


def more_dims(x: Tensor, dice: random.Random) -> Tensor:
    return x.unsqueeze(dice.randrange(x.dim() + 1))


def fewer_dims(x: Tensor, dice: random.Random) -> Tensor:
    return x.select(dice.randrange(x.dim()), 0) if x.numel() and x.dim() else x


def transposed(x: Tensor, dice: random.Random) -> Tensor:
    return x.transpose(*dice.sample(range(x.dim()), 2)) if x.dim() > 1 else x


def column_major(x: Tensor, dice: random.Random) -> Tensor:
    """Two dimensions the other way round in memory."""
    dims = dice.sample(range(x.dim()), 2) if x.dim() > 1 else (0, 0)
    return x.transpose(*dims).contiguous().transpose(*dims) if x.dim() > 1 else x


def strided(x: Tensor, dice: random.Random) -> Tensor:
    """Every second of twice as many along one dimension."""
    if not x.dim():
        return x
    dim = dice.randrange(x.dim())
    return torch.stack([x, x], dim + 1).flatten(dim, dim + 1)[(slice(None),) * dim + (slice(None, None, 2),)]


def expanded(x: Tensor, dice: random.Random) -> Tensor:
    """The first along one dimension for all, with a stride of 0."""
    dim = dice.randrange(max(x.dim(), 1))
    return x.narrow(dim, 0, 1).expand_as(x) if x.dim() and x.shape[dim] else x


def shifted(x: Tensor, dice: random.Random) -> Tensor:
    """One element into its memory."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x


def negated_view(x: Tensor, dice: random.Random) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def in_inference_mode(x: Tensor, dice: random.Random) -> Tensor:
    with torch.inference_mode():
        return x.clone()


CHANGES = {
    "dtype": to_dtype, "longer": longer, "shorter": shorter, "empty": empty, "more dims": more_dims,
    "fewer dims": fewer_dims, "transposed": transposed, "column major": column_major, "strided": strided,
    "expanded": expanded, "shifted": shifted, "negated view": negated_view, "inference": in_inference_mode,
    "meta": lambda x, dice: x.to("meta"),
    "sparse": lambda x, dice: x.to_sparse() if x.dim() else x,
    "nested": lambda x, dice: torch.nested.as_nested_tensor([x, x]),
    "wants grad": lambda x, dice: x.detach().requires_grad_() if x.is_floating_point() else x,
    "a list": lambda x, dice: x.tolist(),
    "numpy": lambda x, dice: x.numpy(),
    "parameter": lambda x, dice: torch.nn.Parameter(x, requires_grad=False),
}  # fmt: skip


def changed(arguments: dict[str, Any], dice: random.Random) -> tuple[dict[str, str], bool]:
    """Change one or two arguments in place: (what happened to which, whether one is of no type that has a meaning)."""
    names = dice.sample(sorted(arguments), min(len(arguments), 1 if dice.random() < 0.75 else 2))
    said, absurd = {}, False
    for name in names:
        x = arguments[name]
        if isinstance(x, Tensor) and dice.random() < 0.8:
            kind = dice.choice([*CHANGES, "another argument"])
            if kind == "another argument":
                tensors = [key for key, value in arguments.items() if isinstance(value, Tensor) and key != name]
                other = dice.choice(tensors or [name])
                arguments[name], kind = arguments[other], f"the tensor {other}"
            else:
                arguments[name] = CHANGES[kind](x, dice)
        else:
            value = dice.choice(OTHERS if isinstance(x, Tensor) or dice.random() < 0.4 else NUMBERS)
            arguments[name], kind, absurd = value, shown(value), absurd or not isinstance(value, (int, float))
        said[name] = kind
    return said, absurd


def shown(value: Any) -> str:
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**63 else repr(value)


# -- one call ----------------------------------------------------------------------------------------------------------


def verdict(name: str, seed: int) -> tuple[str, str]:
    """(one of VERDICTS, what was called and what came of it)."""
    case = CASES[name]
    dice = random.Random(f"{name} {seed}")
    arguments, expected = case.arguments(), case.arguments()
    said, absurd = changed(arguments, dice)
    changed(expected, random.Random(f"{name} {seed}"))
    os.environ["EAGLE_FAST_KERNELS"] = "ref" if seed % 4 == 0 else "triton"
    call = f"{name} (seed {seed}) with {said}"
    try:
        result = case.function(**arguments)
    except (ValueError, TypeError) as error:
        named = any(re.search(rf"\b{key}\b", str(error)) for key in said)
        if named and (isinstance(error, ValueError) or absurd):
            return "refused", f"{call}: {error}"
        return "raw", f"{call}: {type(error).__name__}: {error}"
    except Exception as error:
        return "raw", f"{call}: {type(error).__name__}: {error}"
    try:
        twin = case.twin(**expected)
    except Exception as error:
        return "wrong", f"{call}: the twin does not take it: {type(error).__name__}: {error}"
    for key in arguments:  # what is written in place
        problem = difference(arguments[key], expected[key])
        if problem:
            return "wrong", f"{call}: afterwards {key} is off: {problem}"
    problem = difference(result, twin)
    return ("wrong", f"{call}: {problem}") if problem else ("right", call)


def unchanged(name: str) -> str:
    """What is wrong with the valid call, if anything is."""
    case: Case = CASES[name]
    os.environ["EAGLE_FAST_KERNELS"] = "triton"
    arguments, expected = case.arguments(), case.arguments()
    return difference([case.function(**arguments), arguments], [case.twin(**expected), expected])


def difference(mine: Any, theirs: Any) -> str:
    """In words, "" if there is none."""
    if isinstance(mine, dict):
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, (tuple, list)) and not isinstance(mine, torch.Size):
        if len(mine) != len(theirs):
            return f"{len(mine)} results, {len(theirs)} of the twin"
        return next(filter(None, (difference(a, b) for a, b in zip(mine, theirs, strict=True))), "")
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return ""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return f"{mine.dtype} {list(mine.shape)}, {theirs.dtype} {list(theirs.shape)} of the twin"
    if mine.is_meta or mine.is_nested or mine.layout is not torch.strided:
        return ""
    if not mine.is_floating_point():
        return "" if torch.equal(mine, theirs) else f"{mine.tolist()}, {theirs.tolist()} of the twin"
    tolerance = 2e-2 if mine.element_size() == 2 else 1e-4
    mine, theirs = mine.detach().double(), theirs.detach().double()
    close = torch.isclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    return "" if close.all() else f"off by {(mine - theirs).abs().nan_to_num().max():.3g}"


# -- many, in a worker that may hang or end ----------------------------------------------------------------------------


def work(connection: Connection) -> None:
    while True:
        connection.send(verdict(*connection.recv()))


class Worker:
    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")  # there at once; this process has no threads
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, name: str, seed: int) -> tuple[str, str]:
        try:
            self.connection.send((name, seed))
            if not self.connection.poll(SECONDS):
                return "hung", f"{name} (seed {seed}): no answer after {SECONDS} s"
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return "crashed", f"{name} (seed {seed}): the process ended with {self.process.exitcode}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--calls", type=int, default=2000, help="how many, over all wrappers in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the others count on from it")
    parser.add_argument("--only", default="", help="wrappers whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print every call, not only the faults")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bounds.watch()
    names = [name for name in CASES if arguments.only in name]
    if not names:
        parser.error(f"--only {arguments.only}: no such wrapper; there are {', '.join(CASES)}")
    broken = [f"{name}: the valid call is wrong: {problem}" for name in names if (problem := unchanged(name))]
    print("\n".join(broken) or f"{len(names)} valid calls are right")

    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    worker, started = Worker(), time.monotonic()
    for index in range(arguments.calls):
        name = names[index % len(names)]
        found, what = worker(name, arguments.seed + index // len(names))
        counts[name][found] += 1
        if found in FAULTS or arguments.verbose:
            print(f"{found.upper()}: {what}", flush=True)
        if found in ("hung", "crashed"):
            worker.stop()
            worker = Worker()
        if (index + 1) % 500 == 0:
            print(f"{index + 1} of {arguments.calls} calls, {time.monotonic() - started:.0f} s", flush=True)
    worker.stop()

    total = sum(counts.values(), Counter())
    width = max(map(len, names))
    print(f"\n{'':{width}}" + "".join(f"{each:>9}" for each in VERDICTS))
    for name, found in [*counts.items(), ("all", total)]:
        print(f"{name:{width}}" + "".join(f"{found[each]:9}" for each in VERDICTS))
    return int(bool(broken) or any(total[each] for each in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
