"""Talk to a model in the terminal, decoded with its draft head.

    eagle-fast chat                                      # a small model, made on the first run
    eagle-fast chat --model meta-llama/Llama-3.1-8B-Instruct --head yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    eagle-fast chat --colors                             # what the head guessed right is green
    eagle-fast chat --temperature 0.7 --top-p 0.9 --system "Answer in one sentence."
    printf 'Name a bird.\\nAnother one.\\n' | eagle-fast chat > answers.txt

After each answer a line says how fast it came, how many tokens a round of the target brought (tau), and which share of
the drafts was right, by depth. Each turn goes on from what the turns before left in the cache. Ctrl-C stops an answer,
Ctrl-D leaves; /help lists what else a line can say: /set temperature 0.7, /retry, /undo, /colors, /plain and others.

Out of a pipe, every line is a turn. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import DEMO_PAIR, add_loading_arguments
from eagle_fast.shell.settings import add_sampling_arguments, add_template_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--colors", action="store_true", help="show accepted drafts in green; /colors switches")
    add_template_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=1024, seed=None)
    add_loading_arguments(parser, **DEMO_PAIR)
