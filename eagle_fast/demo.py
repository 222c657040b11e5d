"""`eagle-fast demo`: one prompt with and without speculation, and whether the two texts are the same.

The target is SmolLM2-135M-Instruct (`pairs.smollm2_target`), the head the one that this package ships.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from eagle_fast.config import TreeConfig
from eagle_fast.generation import Statistics
from eagle_fast.model import EaModel
from eagle_fast.pairs import SMOLLM2, smollm2_head, smollm2_target

PROMPT = "Explain in a few paragraphs how a bicycle stays upright while it is moving."
CPU_TREE = TreeConfig(total_token=8, depth=3, top_k=3)  # verifying a row costs a CPU far more than it costs a GPU


class Typewriter(BaseStreamer):
    """Prints text as its tokens arrive; what does not end a whole character waits."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what to ask (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="for --temperature above 0 (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; default: the first GPU if there is one")


def load(device_name: str) -> tuple[EaModel, object]:
    """The SmolLM2 pair: fp32 on a CPU, bfloat16 on a GPU."""
    from eagle_fast.placement import resolve_device

    device = resolve_device(device_name)
    folder = smollm2_target()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    tree = CPU_TREE if device.type == "cpu" else TreeConfig()
    model = EaModel.from_pretrained(
        base_model_path=target,
        ea_model_path=str(smollm2_head()),
        total_token=tree.total_token,
        depth=tree.depth,
        top_k=tree.top_k,
    )
    return model, AutoTokenizer.from_pretrained(folder)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def run(args: argparse.Namespace) -> int:
    """Returns 0 if both texts are the same."""
    started = time.perf_counter()
    model, tokenizer = load(args.device)
    chat = [{"role": "user", "content": args.prompt}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)  # type: ignore[attr-defined]
    ids = encoded["input_ids"]
    print(f"{SMOLLM2} on {hardware(model.target.device)}, loaded in {time.perf_counter() - started:.1f} s\n")
    model.warmup(max_length=ids.shape[1] + args.max_new_tokens)
    texts, statistics = {}, {}
    for name, decode in (("with EAGLE", model.stream), ("without", model.naive_stream)):
        print(f"--- {name}\n")
        texts[name], statistics[name] = decode(
            ids, Typewriter(tokenizer), temperature=args.temperature, seed=args.seed, max_new_tokens=args.max_new_tokens
        )
        print()
    same = torch.equal(texts["with EAGLE"], texts["without"])
    _table(statistics["with EAGLE"], statistics["without"], same)
    return 0 if same else _explain(model.target.dtype)


def _table(fast: Statistics, plain: Statistics, same: bool) -> None:
    speedup = fast.tokens_per_second / plain.tokens_per_second
    rows = [
        ("", "with EAGLE", "without"),
        ("tokens", f"{sum(fast.new_tokens)}", f"{sum(plain.new_tokens)}"),
        ("tokens a round (tau)", f"{fast.tau:.2f}", f"{plain.tau:.2f}"),
        ("tokens a second", f"{fast.tokens_per_second:.1f}", f"{plain.tokens_per_second:.1f}"),
        ("speed-up", f"{speedup:.2f}x", "1.00x"),
        ("same text", "yes" if same else "NO", ""),
    ]
    for label, left, right in rows:
        print(f"{label:<22}{left:>12}{right:>12}")


def _explain(dtype: torch.dtype) -> int:
    print(
        f"\nThe texts differ. In {dtype} a tree of rows and a single row round differently, so the choice between two "
        "nearly equal logits may flip; in float32 the texts are the same.",
        file=sys.stderr,
    )
    return 1
