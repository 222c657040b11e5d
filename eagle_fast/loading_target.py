"""Load a target: what from_pretrained is told, checked before anything is loaded, and errors that say what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from eagle_fast.head.files import can_only_be_a_path
from eagle_fast.loading_errors import loading, said
from eagle_fast.loading_options import (
    BITSANDBYTES_OPTIONS,
    CONFIG_OPTIONS,
    HUB_OPTIONS,
    check_names,
    check_names_of_loaded,
)
from eagle_fast.loading_packed import is_adapter, packed_options, packing_of
from eagle_fast.messages import listed, short, warn_user
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.devices import STRATEGIES, check_device_map, check_max_memory, resolve_device
from eagle_fast.target.kind import auto_class, check_layers, checked_dtype
from eagle_fast.target.packing import Bits, Packing, check_all_read, say_how_it_runs
from eagle_fast.target.placement import GIB, bytes_by_device, model_bytes, plan_placement, skeleton
from eagle_fast.target.quantized import bitsandbytes_config, drop_wrappers, quantization_options, without_its_warning
from eagle_fast.target.sound import check_base

TOKENIZER_OPTIONS = (*HUB_OPTIONS, "revision", "subfolder", "trust_remote_code", "gguf_file")
NAME = "base_model_path"


def modern_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of from_pretrained in the words of transformers 5: dtype, and a quantization_config for load_in_4bit.

    Raises ValueError for what is said in both words.
    """
    for name in (*BITSANDBYTES_OPTIONS, "trust_remote_code"):
        if not isinstance(options.get(name), (bool, type(None))):
            raise ValueError(f"{name}={short(options[name])}: use True or False")
    asked = [name for name in BITSANDBYTES_OPTIONS if options.get(name)]
    options = {name: value for name, value in options.items() if name not in BITSANDBYTES_OPTIONS}
    if "torch_dtype" in options:
        if "dtype" in options:
            raise ValueError("dtype and torch_dtype are the same: pass one of them")
        options["dtype"] = options.pop("torch_dtype")
    if options.get("quantization_config") is None:
        options.pop("quantization_config", None)  # given as None, packed weights would be read as if they were plain
    if not asked:
        return options
    if "quantization_config" in options:
        raise ValueError(f"{asked} beside quantization_config: say it in quantization_config alone")
    return options | {"quantization_config": bitsandbytes_config(asked)}


def known_path(name: str, path: Any) -> str:
    """A hub name or the path of a folder, given as argument `name`. A path to no folder is a ValueError."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(path, os.DirEntry):
        raise ValueError(f"{name}={short(path)}: pass a hub name like 'owner/name' or a folder")
    expanded = os.path.expanduser(os.fspath(path))
    if not isinstance(expanded, str) or not expanded:
        raise ValueError(f"{name}={short(path)}: pass a hub name like 'owner/name' or a folder")
    if os.path.isfile(expanded):
        raise ValueError(
            f"{name}={str(path)!r} is a file, there is no such folder: pass the folder that holds config.json and the "
            "weights; of a GGUF file its folder, with gguf_file="
        )
    if can_only_be_a_path(expanded) and not os.path.isdir(expanded):
        raise ValueError(
            f"{name}={str(path)!r}: there is no such folder; pass a folder or a hub name like 'owner/name'"
        )
    return expanded


def load_target(
    path_or_model: Any,
    device_map,
    options: dict[str, Any],
    max_memory: dict | None = None,
    target_bits: int | None = None,
    lm_head_bits: int | None = None,
    *,
    name: str = NAME,
) -> PreTrainedModel:
    """The target: a model as it is, or one from the hub or a folder with options of transformers' from_pretrained.

    target_bits: 8 or 4, that the weights of its layers are rounded to while they are loaded; lm_head_bits: 8, the same
    of lm_head and embedding. name: of the argument that it is given as. Raises ValueError, among them UnsupportedModel,
    for what cannot be loaded or decoded, as far as that is known here.
    """
    if isinstance(path_or_model, nn.Module):  # a PreTrainedModel, or a wrapper of one as PEFT's
        check_base(path_or_model, name)
        check_names_of_loaded(path_or_model, options)
        more = {"device_map": device_map, "max_memory": max_memory}
        given = options | more | {"target_bits": target_bits, "lm_head_bits": lm_head_bits}
        names = sorted(key for key, value in given.items() if key in options or value is not None)
        if names:
            raise ValueError(f"{names} cannot change a model that is loaded already: pass them where you load it")
        return cast(PreTrainedModel, path_or_model)
    path = known_path(name, path_or_model)
    check_device_map(device_map)
    check_max_memory(max_memory)
    gguf_file = options.get("gguf_file")
    if not isinstance(gguf_file, (str, os.PathLike, type(None))):
        raise ValueError(f"gguf_file={short(gguf_file)}: give the name of a file in the folder")
    if "dtype" in options:
        options = options | {"dtype": checked_dtypes(options["dtype"])}
    device = _one_device(device_map, max_memory)
    config = read_config(path, options, name)
    what = f"{name}={path!r}"
    packing, reason = packing_of(config, path, options, Bits(target_bits, lm_head_bits), what, stated_dtype(options))
    if packing is None:
        options = quantization_options(config, options, what, reason)
    trusted = bool(options.get("trust_remote_code"))
    auto = AutoModelForCausalLM if config is None else auto_class(config, trusted, what)
    check_names(auto, config, options)
    if config is not None:
        known = options.get("config") is None and "num_hidden_layers" in options
        check_layers(options["num_hidden_layers"] if known else Anatomy(config).stated_layers, what)
    _check_attention(options.get("attn_implementation"))
    placement = _placement(config, device, device_map, max_memory, options, packing)
    try:
        with loading(name, path, options), without_its_warning():
            given = options if packing is None else packed_options(packing, path, options, config)
            model, missing, unexpected = _load(auto, path, given | placement)
    except ValueError as error:
        if not reason:
            raise
        raise ValueError(f"{error}. Its library was asked since {reason}") from error
    drop_wrappers(model, options)
    is_plain = config is not None and "quantization_config" not in options and not Anatomy(config).is_quantized
    if is_plain or packing is not None:  # else its library answers for what it reads
        check_all_read(unexpected, packing, what)
    if missing:
        beside = f" with {said(options)}" if options else ""
        raise ValueError(
            f"{what}{beside} lacks tensors of {type(model).__name__}, which would be random: "
            f"{listed(missing)}; is it complete, no draft head, and its config.json its own?"
        )
    check_base(model, name)
    say_how_it_runs(model, what, packing, reason)
    if Anatomy(model).softcap and "attn_implementation" not in options:
        model.set_attn_implementation("eager")  # the default, SDPA, leaves the softcap out
    return model


def _check_attention(name: Any) -> None:
    if isinstance(name, str) and name.startswith("paged|"):
        raise ValueError(
            f"attn_implementation={name!r}: paged attention is of transformers' continuous batching, and caches are "
            f"kept otherwise here; use {name.removeprefix('paged|')!r}, or leave it out"
        )


def _load(auto: Any, path: str, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str], list[str]]:
    """(model, tensors that its checkpoint lacks, those that it has and the model has not)."""
    try:
        model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    except AttributeError:
        if not is_adapter(path):
            raise
        return (
            auto.from_pretrained(path, **options),
            [],
            [],
        )  # transformers 5.4 gives no account of a model with an adapter
    return model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"])


def load_tokenizer(path: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a target: one of transformers'."""
    with loading("the tokenizer of base_model_path", path, options, tokenizer=True):
        return AutoTokenizer.from_pretrained(path, **options)


def checked_dtypes(dtype: Any) -> Any:
    """A dtype as transformers takes it: one, or one by the part of a model with several ('text_config', '')."""
    if isinstance(dtype, dict):
        return {part: checked_dtype(each) or "auto" for part, each in dtype.items()}
    return checked_dtype(dtype) or dtype


def read_config(path: str, options: dict[str, Any], name: str) -> PreTrainedConfig | None:
    """The checkpoint's config, or that given as config=; None where a GGUF file stands for it."""
    given, hub = options.get("config"), {key: options[key] for key in CONFIG_OPTIONS if key in options}
    if given is not None:
        if not isinstance(given, PreTrainedConfig):
            raise ValueError(f"config={given!r}: pass a config of transformers, or leave it out")
        _check_width(given, path, hub, name)
        return given
    if options.get("gguf_file") is not None:
        return None
    with loading(name, path, options):
        try:
            return AutoConfig.from_pretrained(path, **hub)
        except (OSError, ValueError):
            base = _base_of_adapter(path, {key: options[key] for key in (*HUB_OPTIONS, "revision") if key in options})
            if base is None:
                raise
            return AutoConfig.from_pretrained(base, **hub | {"revision": None})


def _check_width(given: PreTrainedConfig, path: str, hub: dict[str, Any], name: str) -> None:
    """A config of another width than the checkpoint's own is of another model, and all weights would be made up."""
    try:
        own = AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError):
        return  # it has none, and its weights will tell
    widths = [Anatomy(each).stated_width for each in (given, own)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"config= is of a model of width {widths[0]} (hidden_size), and that of {name}={path!r} is {widths[1]}: "
            "pass the checkpoint's own config with what you change in it, or leave it out"
        )


def _base_of_adapter(path: str, hub: dict[str, Any]) -> str | None:
    """Of an adapter alone, the model that it is for: transformers loads both."""
    file = find_adapter_config_file(path, **hub)
    if file is None or os.path.isfile(os.path.join(path, "config.json")):
        return None
    return json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")


def _one_device(device_map, max_memory: dict | None) -> torch.device | None:
    """The device that everything goes to, if that is known before the model is."""
    strategy = isinstance(device_map, str) and device_map in STRATEGIES
    several = isinstance(device_map, dict) and set(device_map) != {""}
    if several or (strategy and (torch.cuda.is_available() or max_memory)):
        return None
    return torch.device("cpu") if strategy else resolve_device(device_map)


def _placement(
    config: PreTrainedConfig | None,
    device: torch.device | None,
    device_map,
    max_memory,
    options: dict[str, Any],
    packing: Packing | None,
) -> dict[str, Any]:
    """What to tell transformers about devices: nothing for the CPU, else a map that was checked."""
    if device is not None:
        if device.type == "cpu":
            return {}
        device_map = {"": device}
    if packing is not None:
        model = packing.model
    elif config is None or "quantization_config" in options or Anatomy(config).is_quantized:
        return {"device_map": device_map, "max_memory": max_memory}  # sizes are only known to those who load them
    else:
        model = skeleton(config, stated_dtype(options), trust_remote_code=bool(options.get("trust_remote_code")))
    placement = plan_placement(model, device_map, max_memory)
    if "disk" in placement.values() and "offload_folder" not in options:
        whole, left = model_bytes(model), bytes_by_device(model, placement)["disk"]
        raise ValueError(
            f"device_map={device_map!r} finds no room for {left / GIB:.1f} of {whole / GIB:.1f} GiB of weights "
            f"(max_memory={max_memory}): use more GPUs, a smaller dtype or 'balanced'; or keep that part on disk with "
            "offload_folder="
        )
    if (
        packing is not None
        and len(set(placement.values())) > 1
        and {"disk", torch.device("cpu")} & {*placement.values()}
    ):
        raise ValueError(
            f"device_map={device_map!r} leaves a part of {model_bytes(model) / GIB:.1f} GiB of packed weights off the "
            f"GPUs (max_memory={max_memory}), from where they are not fetched: use more GPUs"
        )
    if device_map == "auto" and set(placement) == {""} and torch.cuda.device_count() > 1:
        warn_user(f"the model fits on one GPU and is on {placement['']} alone; 'balanced' spreads it")
    return {"device_map": {name: _as_accelerate(device) for name, device in placement.items()}}


def _as_accelerate(device: torch.device | str) -> int | str:
    """A device as accelerate writes it: it compares them with "cpu" and "disk"."""
    return str(device) if isinstance(device, str) or device.index is None else device.index


def stated_dtype(options: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the weights will have; None for the checkpoint's own."""
    dtype = options.get("dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get("text_config", dtype.get(""))
    return dtype if isinstance(dtype, torch.dtype) else None
