"""Which names SafeAILab/EAGLE's modules have here."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eagle_fast.model import EaModel
from eagle_fast.multi_gpu import run_multi_gpu_inference, setup_multi_gpu_inference
from eagle_fast.upstream.loops import (
    ROUNDS,
    TOPK,
    Timer,
    generate_tree_buffers,
    initialize_past_key_values,
    prepare_logits_processor,
    reset_past_key_values,
    reset_tree_mode,
)
from eagle_fast.upstream.variants import EAGLE, AcceptLengths, Lists, MaskByPosition, OfSpecBench

# Scripts do `from eagle.model.utils import *` and then use torch, random, ... without importing them.
FUNCTIONS: dict[str, Any] = ROUNDS | {
    "prepare_logits_processor": prepare_logits_processor, "generate_tree_buffers": generate_tree_buffers,
    "reset_tree_mode": reset_tree_mode, "reset_past_key_values": reset_past_key_values,
    "initialize_past_key_values": initialize_past_key_values,
}  # fmt: skip
STAR: dict[str, Any] = {
    "copy": copy, "random": random, "time": time, "torch": torch, "np": np, "List": list, "Tuple": tuple, "TOPK": TOPK,
    "Timer": Timer, "LogitsProcessorList": LogitsProcessorList,
    "RepetitionPenaltyLogitsProcessor": RepetitionPenaltyLogitsProcessor,
    "TemperatureLogitsWarper": TemperatureLogitsWarper, "TopKLogitsWarper": TopKLogitsWarper,
    "TopPLogitsWarper": TopPLogitsWarper,
}  # fmt: skip


def package(model: type[EaModel]) -> dict[str, dict[str, Any]]:
    """Contents of the modules beside an ea_model with this EaModel; choices is data, taken from what it replaces."""
    return {
        "ea_model": STAR | FUNCTIONS | {"EaModel": model, "setup_multi_gpu_inference": setup_multi_gpu_inference},
        "utils": STAR | {name: each for name, each in FUNCTIONS.items() if name != "initialize_past_key_values"},
        "kv_cache": {name: FUNCTIONS[name] for name in ("initialize_past_key_values", "KVCache")},
        "choices": {},
    }


def modules(accept_lengths: bool = False) -> dict[str, dict[str, Any]]:
    """Module -> its contents; packages are empty. accept_lengths: `eagenerate(log=True)` gives a fourth value."""
    several = {
        "run_multi_gpu_inference": run_multi_gpu_inference, "setup_multi_gpu_inference": setup_multi_gpu_inference,
    }  # fmt: skip
    places = {
        "eagle.model": AcceptLengths if accept_lengths else EaModel,
        "eagle.modelbsne1": Lists,
        "model": AcceptLengths if accept_lengths else MaskByPosition,
        **{f"model.{name}": OfSpecBench for name in ("eagle", "eagle2", "eagle3")},
    }
    found: dict[str, dict[str, Any]] = {"eagle": {}, **{place: {} for place in places}}
    for place, model in places.items():
        found |= {f"{place}.{name}": contents for name, contents in package(model).items()}
    found["eagle.model.multi_gpu_inference"] = several
    found["eagle.modeling_eagle"] = {"EAGLE": EAGLE}
    return found
