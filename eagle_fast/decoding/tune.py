"""`total_token=-1`: the number of tree nodes that pays best on this machine, from measured round times."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.graph import WARMUP_STEPS, GraphedStep, SideStreams
from eagle_fast.decoding.round import Round
from eagle_fast.head import DraftHead
from eagle_fast.target import Target

SIZES = (8, 16, 24, 32, 40, 48, 60, 80)
GAIN_EXPONENT = 0.15  # accepted drafted tokens grow about as nodes ** 0.15: 2.08 at 30 nodes, 2.31 at 60, one real pair
ROUNDS = 5
PROMPT = 64


def pick_total_token(target: Target, head: DraftHead, tree: TreeConfig) -> TreeConfig:
    """`tree` with the total_token of SIZES that promises most tokens per second."""
    most = 1 + tree.num_candidates
    sizes = [size for size in SIZES if size <= most] or [most]
    streams = SideStreams()
    times = {size: round_seconds(target, head, replace(tree, total_token=size), streams) for size in sizes}
    best = max(sizes, key=lambda size: (1 + 2.31 * (size / 60) ** GAIN_EXPONENT) / times[size])
    return replace(tree, total_token=best)


@torch.no_grad()
def round_seconds(target: Target, head: DraftHead, tree: TreeConfig, streams: SideStreams | None = None) -> float:
    """Seconds of one round for one sequence after a short prompt; its text does not matter."""
    max_length = PROMPT + (WARMUP_STEPS + 2 + ROUNDS) * tree.max_path
    state = Round(target, head, tree, 1, max_length)
    step = GraphedStep(state.step, state.devices, streams)
    state.begin([[1] * PROMPT], [max_length - 1])
    for _ in range(WARMUP_STEPS + 1):
        step()
    _wait(target.device)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    _wait(target.device)
    return (time.perf_counter() - started) / ROUNDS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
