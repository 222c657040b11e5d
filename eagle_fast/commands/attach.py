"""`eagle-fast attach`: a model's folder with a draft head in it, for tools that load models by themselves.

FOLDER gets links to the files of MODEL, links to those of HEAD in FOLDER/eagle_head, and a few lines in
FOLDER/custom_generate/generate.py, which transformers runs in the place of its own `generate` where a tool loads the
folder with trust_remote_code=True. Nothing is copied. Both may be folders or names on the hub.

    eagle-fast attach meta-llama/Llama-3.1-8B-Instruct yuhuili/EAGLE3-LLaMA3.1-Instruct-8B llama-with-head

    transformers serve llama-with-head --trust-remote-code             # any OpenAI client in front
    lm_eval --model hf --model_args pretrained=llama-with-head,trust_remote_code=True --tasks gsm8k

    model = AutoModelForCausalLM.from_pretrained("llama-with-head", trust_remote_code=True)
    model.generate(**inputs)                                           # with the head, the same text
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import OF_HUB, add_loading_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the target: a folder, or a name on the hub")
    parser.add_argument("head", metavar="HEAD", help="its draft head: a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", help="where to; must not be there yet, or be empty")
    add_loading_arguments(parser, OF_HUB, title="names on the hub")
    add_loading_arguments(parser, ("draft_int8", "adaptive", "tree"), title="how the folder decodes")
