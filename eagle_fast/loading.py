"""Load a target and a head that fit each other."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from eagle_fast.head import DraftHead, read_head
from eagle_fast.head.checkpoint import check_folder
from eagle_fast.head.checks import NUMBER, plain
from eagle_fast.head.files import can_only_be_a_path
from eagle_fast.head.inference import Overrides
from eagle_fast.messages import listed, warn_user
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.placement import (
    GIB,
    STRATEGIES,
    bytes_by_device,
    model_bytes,
    plan_placement,
    resolve_device,
    skeleton,
)
from eagle_fast.target.twin import stored_weight

HEAD_OPTIONS = ("feature_layers", "norm_before_residual", "norm_output", "rope_theta", "rope_interleaved")
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
CONFIG_OPTIONS = (*HUB_OPTIONS, "revision", "subfolder", "trust_remote_code")
BITSANDBYTES_OPTIONS = ("load_in_4bit", "load_in_8bit")
TOKENIZER_OPTIONS = (*HUB_OPTIONS, "revision", "subfolder", "trust_remote_code", "gguf_file")


def modern_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of from_pretrained in the words of transformers 5: dtype, and a quantization_config for load_in_4bit.

    Raises ValueError for what is said in both words.
    """
    asked = [name for name in BITSANDBYTES_OPTIONS if options.get(name)]
    options = {name: value for name, value in options.items() if name not in BITSANDBYTES_OPTIONS}
    if "torch_dtype" in options:
        if "dtype" in options:
            raise ValueError("dtype and torch_dtype are the same: pass one of them")
        options["dtype"] = options.pop("torch_dtype")
    if not asked:
        return options
    if options.get("quantization_config") is not None:
        raise ValueError(f"{asked} beside quantization_config: say it in quantization_config alone")
    return options | {"quantization_config": BitsAndBytesConfig(**dict.fromkeys(asked, True))}


def known_path(name: str, path: Any) -> str:
    """A hub name or the path of a folder, given as argument `name`. A path to no folder is a ValueError."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(f"{name}={path!r}: pass a hub name like 'owner/name' or a folder")
    expanded = os.path.expanduser(os.fspath(path))
    if can_only_be_a_path(expanded) and not os.path.isdir(expanded):
        raise ValueError(
            f"{name}={str(path)!r}: there is no such folder; pass a folder or a hub name like 'owner/name'"
        )
    return expanded


def load_target(
    path_or_model: Any, device_map, options: dict[str, Any], max_memory: dict | None = None
) -> PreTrainedModel:
    """The target: a model as it is, or one from the hub or a folder with options of AutoModelForCausalLM."""
    if isinstance(path_or_model, nn.Module):  # a PreTrainedModel, or a wrapper of one as PEFT's
        given = options | {"device_map": device_map, "max_memory": max_memory}
        names = sorted(name for name, value in given.items() if name in options or value is not None)
        if names:
            raise ValueError(f"{names} cannot change a model that is loaded already: pass them where you load it")
        return cast(PreTrainedModel, path_or_model)
    path = known_path("base_model_path", path_or_model)
    placement = _placement(path, device_map, max_memory, options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options, **placement)
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if info["missing_keys"]:
        raise ValueError(
            f"base_model_path={path!r} lacks tensors of {type(model).__name__}, which would be random: "
            f"{listed(sorted(info['missing_keys']))}; is it complete, and no draft head?"
        )
    if Anatomy(model).softcap and "attn_implementation" not in options:
        model.set_attn_implementation("eager")  # the default, SDPA, leaves the softcap out
    return model


def _placement(path: str, device_map, max_memory: dict | None, options: dict[str, Any]) -> dict[str, Any]:
    """What to tell AutoModelForCausalLM about devices: nothing for the CPU, else a map that was checked."""
    strategy = isinstance(device_map, str) and device_map in STRATEGIES
    several = isinstance(device_map, dict) and set(device_map) != {""}
    if not (several or (strategy and (torch.cuda.is_available() or max_memory))):
        device = torch.device("cpu") if strategy else resolve_device(device_map)
        if device.type == "cpu":
            return {}
        device_map = {"": device}
    if "gguf_file" in options or "quantization_config" in options:  # sizes are only known to those who load them
        return {"device_map": device_map, "max_memory": max_memory}
    hub = {key: options[key] for key in CONFIG_OPTIONS if key in options}
    config = options.get("config") or AutoConfig.from_pretrained(path, **hub)
    if Anatomy(config).is_quantized:
        return {"device_map": device_map, "max_memory": max_memory}
    remote = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    model = skeleton(config, _dtype(options), **remote)
    placement = plan_placement(model, device_map, max_memory)
    if "disk" in placement.values() and "offload_folder" not in options:
        whole, left = model_bytes(model), bytes_by_device(model, placement)["disk"]
        raise ValueError(
            f"device_map={device_map!r} finds no room for {left / GIB:.1f} of {whole / GIB:.1f} GiB of weights "
            f"(max_memory={max_memory}): use more GPUs, a smaller dtype or 'balanced'; or keep that part on disk with "
            "offload_folder="
        )
    if device_map == "auto" and set(placement) == {""} and torch.cuda.device_count() > 1:
        warn_user(f"the model fits on one GPU and is on {placement['']} alone; 'balanced' spreads it")
    return {"device_map": {name: _as_accelerate(device) for name, device in placement.items()}}


def _as_accelerate(device: torch.device | str) -> int | str:
    """A device as accelerate writes it: it compares them with "cpu" and "disk"."""
    return str(device) if isinstance(device, str) or device.index is None else device.index


def _dtype(options: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the weights will have; None for the checkpoint's own."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def check_head_arguments(path: str, threshold: Any, use_eagle3: Any, options: dict[str, Any]) -> None:
    """ValueError for what can be told of the head without its target, and before that is loaded.

    options: `HEAD_OPTIONS` and `HUB_OPTIONS`.
    """
    NUMBER.check_argument("threshold", plain(threshold))
    Overrides(use_eagle3, **{name: value for name, value in options.items() if name in HEAD_OPTIONS})
    if os.path.isdir(path):
        check_folder(path)


def load_head(
    path: str,
    base_model: PreTrainedModel,
    *,
    use_eagle3: bool | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> DraftHead:
    """The draft head for a target, by default beside the lm_head. options: `HEAD_OPTIONS` and `HUB_OPTIONS`."""
    lm_head: Any = base_model.get_output_embeddings()
    embedding, logits = (stored_weight(each) for each in (base_model.get_input_embeddings(), lm_head))
    anatomy = Anatomy(base_model)
    checkpoint = read_head(
        path,
        target_hidden_size=anatomy.hidden_size,
        target_vocab_size=min(len(logits), len(embedding)),  # what it cannot embed must not be drafted
        target_embedding=embedding,
        num_target_layers=anatomy.num_layers,
        use_eagle3=use_eagle3,
        revision=revision,
        **(options or {}),
    )
    return DraftHead(
        checkpoint,
        embedding=embedding,
        lm_head_weight=logits,
        lm_head_bias=getattr(lm_head, "bias", None),
        dtype=logits.dtype,
        device=device or logits.device,
    )


def runs_in_int8(head: DraftHead, wanted: bool | None) -> bool:
    """Whether the head's weights become int8: `wanted`, or None for where the kernels can and the head is in 16 bits.

    Raises ValueError where it is wanted and cannot be.
    """
    capable = head.device.type == "cuda" and torch.cuda.get_device_capability(head.device) >= (8, 0)
    able = capable and head.dtype in (torch.bfloat16, torch.float16)
    if wanted and not able:
        raise ValueError(
            f"draft_int8=True, but the head runs in {head.dtype} on {head.device}: int8 needs a GPU of compute "
            "capability 8.0 or newer and a target in bfloat16 or float16; leave draft_int8 out"
        )
    return able if wanted is None else wanted
