"""Check this machine: GPUs, how fast they read and copy, whether kernels run, and where a model would go.

Everything shown is reported by the software or measured on the spot. Exit code 1 if a kernel or a copy is wrong.

    eagle-fast doctor                                              # the machine
    eagle-fast doctor --model meta-llama/Llama-3.3-70B-Instruct    # and where this model would go; loads nothing
    eagle-fast doctor --model TARGET --head HEAD --batch 1 8       # and what each tree of drafts brings, timed
    eagle-fast doctor --json > machine.json
"""

from __future__ import annotations

import argparse
import json

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.validate import check_positive
from eagle_fast.doctor.findings import as_json, examine
from eagle_fast.doctor.plan import Setting
from eagle_fast.doctor.report import lines
from eagle_fast.loading_arguments import dtype_of, memory_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tree = TreeConfig()
    parser.add_argument(
        "--model", metavar="NAME", help="hub name or folder (config.json is enough): plan its placement"
    )
    parser.add_argument(
        "--head", metavar="NAME", help="its draft head, to be counted in; also says what trees of its drafts are worth"
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=int,
        default=[],
        metavar="B",
        help="load model and head, and time rounds of so many sequences: tokens a second of each tree, the best marked",
    )
    parser.add_argument("--dtype", help="of the weights; default: the config's, else bfloat16")
    parser.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens in the cache (default %(default)s)"
    )
    parser.add_argument(
        "--tree",
        nargs=3,
        type=int,
        default=[tree.total_token, tree.depth, tree.top_k],
        metavar=("NODES", "DEPTH", "TOP_K"),
        help="default %(default)s",
    )
    parser.add_argument("--max-memory", metavar="LIST", help='of each GPU, as "70GiB,70GiB"; default: what is free')
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text: bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if nothing is broken, with or without a GPU."""
    machine, placements = examine(_setting(args))
    if args.json:
        print(json.dumps(as_json(machine, placements), indent=1))
    else:
        print("\n".join(lines(machine, placements)))
    return 0 if machine.healthy else 1


def _setting(args: argparse.Namespace) -> Setting | None:
    if args.model is None:
        if args.head or args.max_memory or args.batch:
            raise ValueError("--head, --max-memory and --batch are about a model: name it with --model")
        return None
    if args.batch and not args.head:
        raise ValueError("--batch is about rounds with a draft head: name it with --head")
    check_positive(context=args.context)
    for number in args.batch:
        check_positive(batch=number)
    tree, memory = TreeConfig(*args.tree), memory_of(args.max_memory)
    return Setting(args.model, dtype_of(args.dtype), args.context, tree, args.head, memory, tuple(args.batch))
