"""Load a target whose layers are cut over several GPUs (tensor_parallel): what it is told, checked, and its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from eagle_fast.loading_errors import loading
from eagle_fast.loading_options import CONFIG_OPTIONS, HUB_OPTIONS
from eagle_fast.loading_packed import is_adapter, packing_of
from eagle_fast.loading_target import NAME, checked_dtypes, known_path, read_config, stated_dtype
from eagle_fast.target.anatomy import Anatomy, UnsupportedModel
from eagle_fast.target.formats.arriving import make_room
from eagle_fast.target.kind import auto_class, check_layers
from eagle_fast.target.packing import Bits, Packing, say_how_it_runs
from eagle_fast.target.placement import GIB, free_bytes, skeleton
from eagle_fast.target.rank_files import load_ranks
from eagle_fast.target.ranks import INSTEAD, cut_bytes, cuts_for
from eagle_fast.target.sound import check_base

TAKEN = (*CONFIG_OPTIONS, "config", "dtype")  # options of from_pretrained
FILES = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")


class Plan(NamedTuple):
    """A target that can be cut, before its weights are read. model: its skeleton, and stored: the same with room for
    what the files have packed, or is packed as it comes (packing)."""

    name: str
    model: PreTrainedModel
    stored: PreTrainedModel
    packing: Packing | None
    options: dict[str, Any]

    @property
    def what(self) -> str:
        """For messages."""
        return f"{NAME}={self.name!r}"


def load_cut_target(
    path: Any, devices: Sequence[torch.device], options: dict[str, Any], beside: dict[str, Any],
    bits: Bits = Bits(),  # noqa: B008  # immutable
) -> PreTrainedModel:  # fmt: skip
    """The skeleton of a target, whose weights are on these devices. options: those of from_pretrained. beside: other
    arguments that say how a target is loaded, None where they were not given. bits: that the weights of layers, and of
    lm_head and embedding, are rounded to. ValueError for what cannot be cut."""
    check_beside(path, options, beside)
    return load_plan(plan_of(path, options, bits), devices)


def load_plan(plan: Plan, devices: Sequence[torch.device]) -> PreTrainedModel:
    """See `load_cut_target`."""
    name, model, options = plan.name, plan.model, plan.options
    check_room(plan.stored, devices)
    with loading(NAME, name, options):
        folder = _folder(name, options)
    load_ranks(model, plan.stored, folder, devices, plan.what, plan.packing)
    if plan.packing is not None:
        say_how_it_runs(plan.packing.model, plan.what, plan.packing, "")
    if (folder / "generation_config.json").is_file():
        with loading(NAME, name, options):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    check_base(model, NAME)
    return model


def plan_of(path: Any, options: dict[str, Any], bits: Bits) -> Plan:
    """See `load_cut_target`, whose arguments these are: nothing but the config is read. ValueError."""
    name = known_path(NAME, path)
    what = f"{NAME}={name!r}"
    if "dtype" in options:
        options = options | {"dtype": checked_dtypes(options["dtype"])}
    if is_adapter(name):
        raise ValueError(f"{what} is an adapter, which tensor_parallel cannot follow: merge it into its model first")
    config = read_config(name, options, NAME)
    assert config is not None, "a GGUF file was refused"
    trusted, dtype = bool(options.get("trust_remote_code")), stated_dtype(options)
    if auto_class(config, trusted, what) is not AutoModelForCausalLM:
        raise ValueError(f"tensor_parallel: {what} is no plain causal language model: {INSTEAD}")
    check_layers(Anatomy(config).stated_layers, what)
    packing, reason = packing_of(config, name, options, bits, what, dtype)
    if packing is None and Anatomy(config).is_quantized:
        raise UnsupportedModel(f"tensor_parallel: the weights of {what} are packed, and {reason}: {INSTEAD}")
    model = stored = skeleton(config, dtype, trust_remote_code=trusted)
    if packing is not None:
        stored = skeleton(config, dtype, trust_remote_code=trusted)
        make_room(stored, packing.format, packing.asked.lm_head_bits)
    return Plan(name, model, stored, packing, options)


def check_beside(path: Any, options: dict[str, Any], beside: dict[str, Any]) -> None:
    """ValueError for arguments that tensor_parallel does not go with, each by its name."""
    if isinstance(path, nn.Module):
        raise ValueError(
            f"{NAME} is a loaded model, and tensor_parallel cuts weights while they are loaded: pass its hub name or "
            "its folder"
        )
    given = not_taken(options, beside)
    if given:
        raise ValueError(f"tensor_parallel does not go with {', '.join(given)} yet: leave one of them out")


def not_taken(options: dict[str, Any], beside: dict[str, Any]) -> list[str]:
    """Names of what was given and does not go with tensor_parallel."""
    given = sorted(name for name, value in beside.items() if value is not None)
    return given + sorted(name for name in options if name not in TAKEN and options[name] is not None)


def check_room(model: PreTrainedModel, devices: Sequence[torch.device]) -> None:
    """ValueError, with the numbers, where a GPU cannot hold its share of a skeleton's weights."""
    shares = cut_bytes(model, cuts_for(model, len(devices)))
    for device, share in zip(devices, shares, strict=True):
        if device.type == "cuda" and share > free_bytes(device):
            raise ValueError(
                f"tensor_parallel: {device} would have to hold {share / GIB:.1f} GiB of weights and has room for "
                f"{free_bytes(device) / GIB:.1f} GiB: use a smaller dtype, or more GPUs"
            )


def _folder(name: str, options: dict[str, Any]) -> Path:
    """Where the checkpoint's files are: the folder, or what the hub gives."""
    inside = str(options.get("subfolder") or "")
    if os.path.isdir(name):
        return Path(name) / inside
    hub = {key: options[key] for key in (*HUB_OPTIONS, "revision") if key in options}
    patterns = [f"{inside}/{each}" if inside else each for each in FILES]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub)) / inside
