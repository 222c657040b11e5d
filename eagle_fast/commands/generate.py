"""Answer prompts with the draft head: given here, in files, or on stdin.

    eagle-fast generate "Name three uses of a brick."
    eagle-fast generate --model TARGET --head HEAD --temperature 0.7 --seed 1 "Write a haiku." "Write another."
    eagle-fast generate < question.txt                                # all of stdin is one prompt
    eagle-fast generate --file prompts.jsonl --json > answers.jsonl   # a line of JSON for each
    eagle-fast generate --compare "Why is the sky blue?"              # plainly too: same text? how much faster?
    eagle-fast generate --raw "Once upon a time"                      # goes on with the text, without a chat template

A file of prompts is .jsonl with an object a line (messages, turns, prompt or text), or has a prompt a line. Texts go to
stdout, how fast they came to stderr. With --compare the exit code is 1 if a text differs from plain decoding's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_fast.commands.loading import DEMO_PAIR, add_loading_arguments
from eagle_fast.shell.settings import add_sampling_arguments, add_template_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer; - or nothing: what stdin holds")
    parser.add_argument(
        "--file", nargs="+", type=Path, default=[], metavar="FILE", dest="files", help="files of prompts"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt, when it is answered")
    parser.add_argument("--compare", action="store_true", help="decode plainly as well, and compare texts and speed")
    parser.add_argument("--raw", action="store_true", help="continue prompts as they stand, without the chat template")
    parser.add_argument("--colors", action="store_true", help="show accepted drafts in green, on a terminal")
    add_template_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=512, seed=0)
    add_loading_arguments(parser, **DEMO_PAIR)
