"""Check this machine: GPUs, how fast they read and copy, whether kernels run, and where a model would go.

Everything shown is reported by the software or measured on the spot. Exit code 1 if a kernel or a copy is wrong.

    eagle-fast doctor                                              # the machine
    eagle-fast doctor --model meta-llama/Llama-3.3-70B-Instruct    # and where this model would go; loads nothing
    eagle-fast doctor --model TARGET --head HEAD --batch 1 8       # and what each tree of drafts brings, timed
    eagle-fast doctor --json > machine.json
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import PAIR, add_loading_arguments

PLANNED = [name for name in PAIR if name != "adaptive"]  # which it is where rounds are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[], metavar="B",
        help="load model and head, and time rounds of so many sequences: tokens a second of each tree, the best marked",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens in the cache (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text: bytes and seconds")
    add_loading_arguments(
        parser, PLANNED, title="the pair to plan for, and how it would be loaded",
        model="; a config.json is enough, unless --batch is given", head="; counted in, and what its trees are worth",
        device_map="; without it, each strategy is planned", tensor_parallel="; planned beside the strategies",
    )  # fmt: skip
