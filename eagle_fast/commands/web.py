"""A chat in the browser. Tokens that the head drafted and the target accepted are marked, speed and acceptance are
shown while the answer grows, and speculation can be turned off: the text stays the same.

    eagle-fast web                                       # a small model, made on the first run; then open the page
    eagle-fast web --model meta-llama/Llama-3.1-8B-Instruct --head yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    eagle-fast web --host 0.0.0.0 --port 8080            # for other machines too: the page asks nobody for a password

Needs gradio: pip install 'gradio>=6,<7', in a checkout pip install '.[web]'.
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import DEMO_PAIR, add_loading_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default %(default)s")
    add_loading_arguments(parser, **DEMO_PAIR)
