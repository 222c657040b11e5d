"""Functions of SafeAILab/EAGLE's utils and kv_cache: those that a loop of plain decoding calls do what it needs, those
of a loop that speculates say that rounds cannot be driven from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TOPK = 10
OWN_ROUNDS = (
    "eagle_fast's rounds run as a whole, and nothing calls it: call model.eagenerate(input_ids); what each round "
    "accepted is in the Generation of return_dict_in_generate=True. A script that drives EAGLE's own rounds needs "
    "SafeAILab's package"
)
OF_ROUNDS = (
    "initialize_tree", "initialize_tree0", "tree_decoding", "evaluate_posterior", "update_inference_inputs",
    "generate_candidates",
)  # fmt: skip


def prepare_logits_processor(
    temperature: float = 0.0,
    repetition_penalty: float = 0.0,
    top_p: float | None = 0.0,
    top_k: int | None = 0,
) -> LogitsProcessorList:
    """transformers' processors for these settings, in transformers' order; empty at temperature 0.

    For a decoding loop around another model: `eagenerate` wants temperature, top_p and top_k themselves.
    """
    processors = LogitsProcessorList()
    if temperature <= 1e-5:
        return processors
    if repetition_penalty > 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k is not None and top_k > 0:
        processors.append(TopKLogitsWarper(int(top_k)))
    if top_p is not None and 0 < top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


class LoopCache(DynamicCache):
    """A cache of transformers that can be emptied, whichever release it is of."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.of = config

    def reset(self) -> None:
        vars(self).update(vars(LoopCache(self.of)))


class Lengths:
    """current_length_data of a cache: a loop zeroes it to begin anew."""

    def __init__(self, cache: LoopCache):
        self.cache = cache

    def zero_(self) -> Lengths:
        self.cache.reset()
        return self

    def __getattr__(self, name: str):
        raise AttributeError(f"current_length_data has zero_() here, and no {name}: lengths are the cache's own")


def initialize_past_key_values(
    model: Any, max_length: int | None = None, batch_size: int = 1
) -> tuple[LoopCache, list, Lengths]:
    """(past_key_values, past_key_values_data, current_length_data) for loops over `model.base_model(...)`.

    The first is a cache of transformers, which grows, so that max_length and batch_size need not be known; the second
    is empty; of the third, zero_() empties the cache.
    """
    cache = LoopCache(model.config)
    return cache, [], Lengths(cache)


def reset_past_key_values(passed_key_values: LoopCache) -> LoopCache:
    """The cache, emptied."""
    passed_key_values.reset()
    return passed_key_values


def reset_tree_mode(model: Any) -> None:
    """Nothing: a stock model attends to no tree."""


class Timer:
    """A block that prints how long it took."""

    def __init__(self, name: str):
        self.name, self.start = name, 0.0

    def __enter__(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def __exit__(self, kind, error, traceback) -> None:
        self._wait()
        print(f"{self.name} took {time.perf_counter() - self.start} seconds")

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def generate_tree_buffers(tree_choices: Sequence[Sequence[int]], device="cuda") -> dict[str, torch.Tensor]:
    """Of a fixed tree, each node given as its path of ranks [i, j, ...] with every prefix a node too, T nodes with the
    root: tree_attn_mask [1, 1, T, T], tree_position_ids [T], and retrieve_indices [leaves, longest path] of the nodes
    on the way to each leaf, -1 behind. Trees grow by the head's scores here, so that decoding makes no use of it."""
    nodes: list[tuple[int, ...]] = [
        (),
        *sorted((tuple(path) for path in tree_choices), key=lambda path: (len(path), path)),
    ]
    index = {path: number for number, path in enumerate(nodes)}
    ways = [[index[path[:length]] for length in range(len(path) + 1)] for path in nodes]
    inner = {path[:-1] for path in nodes if path}
    leaves = [way for way, path in zip(ways, nodes, strict=True) if path not in inner]
    longest = max(len(way) for way in leaves)
    mask = torch.zeros(len(nodes), len(nodes))
    for number, way in enumerate(ways):
        mask[number, way] = 1
    return {
        "tree_attn_mask": mask[None, None].to(device),
        "tree_position_ids": torch.tensor([len(path) for path in nodes]).to(device),
        "retrieve_indices": torch.tensor(sorted(way + [-1] * (longest - len(way)) for way in leaves)).to(device),
    }


def _refusing(name: str) -> Callable:
    def refuse(*args, **options):
        raise NotImplementedError(f"{name}: {OWN_ROUNDS}")

    refuse.__name__ = name
    return refuse


ROUNDS = {name: _refusing(name) for name in (*OF_ROUNDS, "KVCache")}
