"""`eagle-fast demo`: one prompt with speculation, without it, and by transformers' own `generate`; then what they took,
and whether the three texts are the same.

The target is SmolLM2-135M-Instruct (`pairs.smollm2_target`), the head the one that this package ships. The model is
made in ~/.cache/eagle_fast on the first run: 98 MB are downloaded, 517 MB kept.

    eagle-fast demo
    eagle-fast demo "Write a haiku about rain." --temperature 0.8 --seed 3

On a terminal, tokens that the head drafted and the target accepted are green. `eagle-fast generate --compare` compares
texts of any pair, `eagle-fast bench` speeds.
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import OF_HUB, PAIR, add_loading_arguments

PROMPT = "Explain why the sky is blue in three sentences."
NOT_ASKED = ("model", "head", "trust_remote_code", *OF_HUB)  # the pair comes from nowhere else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what to ask (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="for --temperature above 0 (default %(default)s)")
    add_loading_arguments(parser, [name for name in PAIR if name not in NOT_ASKED])
