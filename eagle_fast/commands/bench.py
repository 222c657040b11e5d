"""Measure the speed-up on this machine: with the draft head, plainly by the same engine, and by stock generate.

    eagle-fast bench                                                   # the small pair of `eagle-fast demo`
    eagle-fast bench --model meta-llama/Llama-3.1-8B-Instruct --head yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    eagle-fast bench --model TARGET --head HEAD --prompts mine.jsonl --limit 20 --temperature 0 1
    eagle-fast bench --stock 0 --json > bench.json                     # no stock generate, JSON instead of the table
    eagle-fast bench --out bench.json --plot bench.png                 # the plot needs matplotlib

Prompts are twelve short ones of this package, or --prompts: .jsonl with an object a line (messages, turns, prompt or
text), or a prompt a line. One at a time, each in all three ways after the other. Tokens a second are of whole calls,
with the prefill of the prompt. tau: tokens that a round of the target brought. same: whether the text is that of plain
decoding; the exit code is 1 if one is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_fast.commands.loading import DEMO_PAIR, add_loading_arguments
from eagle_fast.shell.settings import add_template_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts (default: twelve of our own)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts (default: all)")
    parser.add_argument(
        "--stock", type=int, metavar="N", help="stock generate for N of them, 0 for none (default: all)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each text (default 128)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0], metavar="T", help="one or several (0)")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0 (default 0)")
    parser.add_argument("--json", action="store_true", help="the record on stdout, as one line of JSON, and no table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot, as .png, .pdf or .svg")
    add_template_argument(parser)
    add_loading_arguments(parser, **DEMO_PAIR)
