"""`eagle-fast train`: the target and its tokenizer loaded, then `train`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.loading import TOKENIZER_OPTIONS, load_target, load_tokenizer, modern_options
from eagle_fast.loading_arguments import as_written, given, target_path
from eagle_fast.prompts import read_prompts
from eagle_fast.target.placement import STRATEGIES, resolve_device
from eagle_fast.train.options import TrainOptions
from eagle_fast.train.run import train


def run(arguments: argparse.Namespace) -> int:
    options = TrainOptions(**{field.name: getattr(arguments, field.name) for field in fields(TrainOptions)})
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    model, tokenizer = load(arguments)
    files = {"prompts": prompts, "initial": arguments.initial}
    try:
        result = train(model, tokenizer, arguments.out, options, resume=arguments.resume, **files)
    except KeyboardInterrupt:
        print(f"\nstopped; if {arguments.out}/training/state.pt is there, --resume goes on from it", file=sys.stderr)
        return 130
    if not result.finished:
        print("paused: the same command with --resume goes on")
    return 0


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """(target on one device, its tokenizer). Raises ValueError."""
    path, options = target_path(arguments), modern_options(given(arguments))
    device_map = options.pop("device_map", "auto")
    if device_map in STRATEGIES[1:] or (isinstance(device_map, dict) and set(device_map) != {""}):
        raise ValueError(f"--device-map {arguments.device_map}: training takes one device: auto, cpu, cuda or cuda:N")
    device = resolve_device(device_map, "--device-map")
    options.setdefault("dtype", torch.float32 if device.type == "cpu" else torch.bfloat16)
    bits = {name: options.pop(name, None) for name in ("target_bits", "lm_head_bits")}
    with as_written():
        model = load_target(path, device, options, name="--model", **bits)
        return model, load_tokenizer(path, {name: options[name] for name in TOKENIZER_OPTIONS if name in options})
