"""Train an EAGLE-3 draft head for a causal language model, without a data set.

The model asks itself questions, from its own chat template, and answers them; the head learns to guess
those answers. Give --prompts to train for the questions that your users ask.

    eagle-fast train --model Qwen/Qwen3-0.6B --out qwen-head --minutes 60
    eagle-fast train --model smollm2 --out smollm2-head --draft-vocab 20480 --minutes 30

The folder --out then works as ea_model_path of EaModel.from_pretrained, and in SGLang and vLLM as an
EAGLE-3 head of SpecForge. --minutes is the whole of it: texts, training, and measuring the head at the
end. A run that was stopped goes on with --resume and the same arguments.

What to expect: agreement is the share of tokens that the head guesses right, given the right ones before,
for the first drafted token, the second and so on. "A chain would get" says how many tokens a round would
yield without a tree; the tree of EaModel yields about a third more. Longer is better, for hours.
"""

from __future__ import annotations

import argparse

from eagle_fast.commands.loading import TARGET, add_loading_arguments
from eagle_fast.train.options import TrainOptions

# Who needs an option: group -> option of TrainOptions -> (what stands for its value, what it is).
GROUPS = {
    "how long": {
        "minutes": ("MINUTES", "of all of it: writing texts, training, measuring the head"),
        "updates": ("N", "train this many updates instead, however long that takes; 0: go by the minutes"),
        "pause_after": ("MINUTES", "stop after so many, to go on with --resume; 0: do not"),
        "save_minutes": ("MINUTES", "between two saves that --resume can go on from"),
    },
    "a smaller or larger head": {
        "draft_vocab": ("TOKENS", "that the head can propose: the most frequent ones of the answers"),
        "intermediate": ("WIDTH", "of its MLP; 0: the model's"),
        "kv_heads": ("N", "key and value heads of its attention; 0: the model's"),
    },
    "if memory runs out": {
        "batch_tokens": ("TOKENS", "padded ones per update; fewer need less memory"),
        "rows": ("N", "texts written side by side; 0: what the memory allows"),
        "pool_tokens": ("TOKENS", "of answers written at a time, kept in the host's memory"),
    },
    "what it learns from": {
        "prompt_share": ("SHARE", "of the questions, from --prompts; the rest is the model's own"),
        "opening_share": ("SHARE", "of the model's own questions that begin with given words, to vary the topics"),
        "greedy_share": ("SHARE", "of the answers, decoded at temperature 0; the rest at 1"),
        "max_question": ("TOKENS", "of a question of its own"),
        "max_answer": ("TOKENS", "of an answer"),
        "writing_share": ("SHARE", "of the minutes, at most, for each writing"),
        "held_out": ("N", "texts kept for measuring"),
    },
    "for experiments": {
        "learning_rate": ("RATE", "peak of the schedule: warm-up, then a cosine"),
        "steps": ("N", "drafted tokens that are trained for (training-time test)"),
        "decay": ("FACTOR", "weight of each drafted token's loss over the one before"),
        "passes": ("N", "times the texts are gone through before new ones are written"),
        "seed": ("N", "of the head's first weights, the order of texts, and the texts"),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    needed = parser.add_argument_group("needed, beside --model")
    needed.add_argument("--out", required=True, metavar="FOLDER", help="where the head goes")
    add_loading_arguments(
        parser, TARGET, title="the target, and how it is loaded", required=["model"],
        device_map="; training takes one device", dtype=", on a CPU float32; not float16, which is too coarse to train",
    )  # fmt: skip
    often = parser.add_argument_group("often used")
    often.add_argument(
        "--prompts", metavar="FILE", help="users' prompts: .jsonl (messages, turns, prompt), or one per line"
    )
    often.add_argument("--resume", action="store_true", help="go on with the run that --out holds, if it holds one")
    often.add_argument(
        "--initial", metavar="HEAD", help="begin with this head, of the same target, not with a fresh one"
    )
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title)
        for name, (value, meaning) in group.items():
            default = getattr(TrainOptions, name)
            section.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, metavar=value,
                help=f"{meaning} (default {default:,})",
            )  # fmt: skip
        if "draft_vocab" in group:
            section.add_argument(
                "--share-lm-head", action="store_true",
                help="use the model's lm_head untrained: a far smaller file, which eagle_fast reads and others may not",
            )  # fmt: skip
    parser.add_argument("--log-seconds", type=float, default=TrainOptions.log_seconds, help=argparse.SUPPRESS)
