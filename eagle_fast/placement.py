"""Where the target is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SLOW_CPU_PARAMETERS = 50_000_000
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
LAYER_LISTS = ("layers", "h", "blocks", "block")
ONE_GPU_SHARE = 0.85  # of a GPU's free memory, for weights: the rest is for caches and the head


def resolve_device(device_map) -> torch.device:
    """The one device that a device_map names: None, "cpu", "cuda", "cuda:N", an index, a device or {"": device}.

    "auto" is the first GPU, or the CPU where there is none.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError("a device_map over several devices is not supported yet: pass one device, as 'cuda:0'")
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == "cuda":
        _check_gpu(device)
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ValueError(f"device_map={device_map!r}: eagle_fast runs on CUDA GPUs and on the CPU")
    return device


def _check_gpu(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device_map={str(device)!r}, but torch sees no GPU: pass 'cpu', or install a CUDA build")
    if (device.index or 0) >= count:
        raise ValueError(f"device_map={str(device)!r}, but torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}")


def warn_if_slow(model: PreTrainedModel) -> None:
    """Half precision has no fast path on most CPUs: say so once, for models large enough to notice."""
    weight = model.get_input_embeddings().weight
    size = sum(parameter.numel() for parameter in model.parameters())
    if weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16) and size > SLOW_CPU_PARAMETERS:
        warnings.warn(
            f"a {size / 1e6:.0f}M parameter model in {weight.dtype} on the CPU is slow: pass dtype=torch.float32, or a "
            "device_map with a GPU",
            stacklevel=3,
        )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options) -> PreTrainedModel:
    """The model of a config without its weights, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32, **options)
    model.tie_weights()
    return model


def layer_list(decoder: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList] | None:
    """(name, module) of the list of decoder layers within `decoder`."""
    for name, module in decoder.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == num_layers
        if is_list and name.rpartition(".")[2] in LAYER_LISTS:
            return name, module
    return None


def plan_placement(
    config: PreTrainedConfig | PreTrainedModel, device_map: Any, max_memory: dict | None = None, dtype=None
) -> dict[str, Any]:
    """Where each module of a causal LM would go: module name -> device, 'cpu' or 'disk'.

    config: of the model, or the model itself, on the meta device perhaps. device_map: one of `STRATEGIES`, or what
    names a device. max_memory: bytes or "80GiB" by GPU index, by default what is free. A model that fits on one GPU
    stays on it with "auto".
    """
    if device_map not in STRATEGIES:
        return {"": resolve_device(device_map)}
    model = config if isinstance(config, nn.Module) else skeleton(config, dtype)
    memory = get_max_memory(max_memory)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device_map == "auto":
        fitting = [index for index in memory if isinstance(index, int) and size < ONE_GPU_SHARE * memory[index]]
        if fitting:
            return {"": torch.device("cuda", fitting[0])}
    whole = list(model._no_split_modules or [])
    if device_map != "sequential":
        memory = get_balanced_memory(model, memory, whole, low_zero=device_map == "balanced_low_0")
    plan = infer_auto_device_map(model, memory, whole)
    return {name: torch.device("cuda", where) if isinstance(where, int) else where for name, where in plan.items()}
