"""`eagle-fast doctor`: the machine examined, and a model on it."""

from __future__ import annotations

import argparse
import json

from eagle_fast.config import TreeConfig, check_positive
from eagle_fast.doctor.findings import as_json, examine
from eagle_fast.doctor.plan import Setting
from eagle_fast.doctor.report import lines
from eagle_fast.loading_arguments import as_written, given, target_path


def run(args: argparse.Namespace) -> int:
    """Returns 0 if nothing is broken, with or without a GPU."""
    with as_written():
        machine, placements = examine(_setting(args))
    if args.json:
        print(json.dumps(as_json(machine, placements), indent=1))
    else:
        print("\n".join(lines(machine, placements)))
    return 0 if machine.healthy else 1


def _setting(args: argparse.Namespace) -> Setting | None:
    options = given(args)
    if args.model is None:
        if args.head or args.batch or options:
            raise ValueError("--head, --batch and options of loading are about a model: name it with --model")
        return None
    if args.batch and not args.head:
        raise ValueError("--batch is about rounds with a draft head: name it with --head")
    check_positive(context=args.context)
    for number in args.batch:
        check_positive(batch=number)
    apart = {name: options.pop(name, None) for name in ("dtype", "max_memory")}
    return Setting(
        target_path(args), apart["dtype"], args.context, TreeConfig(*args.tree), args.head, apart["max_memory"],
        tuple(args.batch), options,
    )  # fmt: skip
