"""A tiny pair in folders, and the command `eagle-fast` run with it."""

import os
import subprocess
import sys

from chatty import END, make_tokenizer
from often_right import write_often_right_head
from zoo import make

COMMAND = [sys.executable, "-m", "eagle_fast"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
TREE = ["--tree", "16", "3", "4", "--no-adaptive"]


def write_pair(root, stops=True, chat=True, stop_strings=False):
    """Arguments that name the pair. stops: answers end at a token; else they go on for ever. stop_strings: of the
    tokenizer, see there."""
    model = make("llama")
    if stops:
        model.generation_config.eos_token_id = END
    model.save_pretrained(root / "target")
    make_tokenizer(chat, stop_strings=stop_strings).save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return ["--model", str(root / "target"), "--head", str(root / "head"), *TREE, "--device-map", "cpu"]


def eagle_fast(*arguments, stdin=""):
    """The finished process."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, env=os.environ | ENVIRONMENT,
        timeout=300,
    )  # fmt: skip
