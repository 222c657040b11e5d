"""What choices inside the kernels give: a round and a plain token with each of them changed, in one process.

    python bench/ablation.py llama-3.1-8b

Times are medians of CUDA graphs, tree 60/7/10, T=0.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from eagle_fast_kernels import linear, lm_head_topk, rms_norm, tree_attention
from lib.shapes import SHAPES, build_head, build_target
from lib.timing import milliseconds
from round import prompt, repeatable

from eagle_fast import EaModel, TreeConfig
from eagle_fast.decoding.round import Round

REPEATS = 20


@contextlib.contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's attribute replaced for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def variants() -> Iterator[tuple[str, Any]]:
    """(what is changed, the change)."""
    yield "as it is", contextlib.nullcontext()
    yield "no prefetch of a product's own weight", changed(linear, "PREFETCHED", 0)
    yield "long caches attended to as short ones", changed(tree_attention, "HOPPER_CACHE", 2**40)
    yield (
        "attention launched after what is before",
        changed(tree_attention, "dependent_launch", lambda _: {"PDL": False}),
    )
    yield "norms with twice the warps", changed(rms_norm, "num_warps", lambda block: min(32, max(1, block // 256)))
    for sizes in ((16, 64, 128, 4, 6), (16, 64, 256, 4, 3), (16, 128, 128, 4, 5), (16, 128, 256, 8, 4)):
        tile = lm_head_topk.Tile(*sizes)
        yield f"draft lm_head tile {sizes}", changed(lm_head_topk, "topk_tile", lambda *_, tile=tile: tile)
    yield "as it is, again", contextlib.nullcontext()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="whose shapes the target has")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache")
    args = parser.parse_args()
    tree, target = TreeConfig(60, 7, 10), build_target(args.shape, "cuda")
    model = EaModel(target, build_head(target), tree=tree, adaptive=False)
    tokens = prompt(model, 1, args.context)
    states = [Round(model.target, head, tree, 1, args.context + tree.max_path) for head in (model.ea_layer, None)]
    for state in states:
        state.begin(tokens.tolist(), [state.max_length - 1])
    print(f"{'':<44}{'round':>9}{'plain':>9}{'draft':>9}  ms")
    for name, change in variants():
        with change:
            times = [milliseconds(work, REPEATS) for work in (*map(repeatable, states), states[0].draft)]
        print(f"{name:<44}{times[0]:>9.3f}{times[1]:>9.3f}{times[2]:>9.3f}", flush=True)


if __name__ == "__main__":
    main()
