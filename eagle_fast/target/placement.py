"""Where a target goes: device maps as transformers and accelerate understand them, checked before anything is loaded.

accelerate decides what the strategies mean. A map over several devices is written out in full (the embedding, every
decoder layer, what stands beside them), so that what was planned is what is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from eagle_fast.layers.packed import PackedLinear
from eagle_fast.messages import listed, warn_user
from eagle_fast.target.anatomy import Anatomy, placed_modules
from eagle_fast.target.devices import STRATEGIES, check_device_map, check_max_memory, present_device, resolve_device
from eagle_fast.target.ends import are_tied, device_of, dtype_of, ends
from eagle_fast.target.formats.arriving import num_parameters
from eagle_fast.target.kind import model_of_config

SLOW_CPU_PARAMETERS = 50_000_000
CACHED_TOKENS = 4096  # room for their keys and values, when "auto" asks whether one GPU is enough
WORKSPACE_BYTES = 2 * 2**30  # for kernels, graphs and the activations of a prompt chunk
GIB = 2**30

Placement = dict[str, Any]  # module name -> torch.device or "disk"


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options) -> PreTrainedModel:
    """The model of a config without its weights, on the meta device."""
    config = copy.deepcopy(config)  # from_config notes the dtype in it
    stored = config.dtype or Anatomy(config).text.dtype or torch.float32
    with torch.device("meta"):
        model = model_of_config(config, dtype=dtype or stored, **options)
    model.tie_weights()
    return model


def device_map_of(model: PreTrainedModel) -> Placement:
    """Where a loaded model lies, the embedding first: {"": device} for one device."""
    offloaded = getattr(model, "hf_device_map", None) or {}
    placement = {}
    for name, module in placed_modules(model).items():
        tensors = [*module.parameters(), *module.buffers()]
        if any(each.is_meta for each in tensors):
            entry = place_of(offloaded, name)
            placement[name] = entry if entry == "disk" else torch.device(entry)
        elif tensors:
            placement[name] = tensors[0].device
    devices = set(placement.values())
    return {"": devices.pop()} if len(devices) == 1 else placement


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_placement(
    config: PreTrainedConfig | PreTrainedModel,
    device_map: Any,
    max_memory: dict | None = None,
    dtype: torch.dtype | None = None,
) -> Placement:
    """Where each module of a target would go, without loading it: {"": device}, or a map written out in full.

    config: of the model, or the model itself, on the meta device perhaps. device_map: a strategy of accelerate, a
    device, or a map by module names. max_memory: bytes or "70GiB" by GPU index or "cpu"; default: what is free.
    "auto" is one GPU if the model, a head and a cache of some thousand tokens fit on one. Entries may be "cpu" or
    "disk" where the GPUs do not suffice. ValueError, with names and numbers, for what cannot be.
    """
    check_device_map(device_map)
    check_max_memory(max_memory)
    model = config if isinstance(config, nn.Module) else skeleton(config, dtype)
    if isinstance(device_map, str) and device_map in STRATEGIES:
        placement = _by_strategy(model, device_map, max_memory)
    elif isinstance(device_map, dict) and set(device_map) != {""}:
        placement = _by_names(model, device_map)
    else:
        placement = {"": resolve_device(device_map)}
    _check_memory(model, placement, max_memory)
    return placement


def _by_strategy(model: PreTrainedModel, strategy: str, max_memory: dict | None) -> Placement:
    budgets = get_max_memory(None if max_memory is None else dict(max_memory))
    gpus = [index for index in budgets if isinstance(index, int)]
    for index in gpus:
        present_device(index, f"max_memory[{index}]")
    if not gpus:
        return {"": torch.device("cpu")}
    if strategy == "auto":
        fitting = [index for index in gpus if bytes_on_one_gpu(model) <= budgets[index]]
        if fitting:
            return {"": torch.device("cuda", fitting[0])}
    whole = list(model._no_split_modules or [])
    if max_memory is None:  # all that is free: leave some of it
        for index in gpus:
            budgets[index] = max(0, budgets[index] - WORKSPACE_BYTES - cache_bytes(model.config, model.dtype))
    if strategy != "sequential":
        budgets = get_balanced_memory(model, budgets, whole, low_zero=strategy == "balanced_low_0")
    found = infer_auto_device_map(model, budgets, whole)
    return _by_names(model, found)


def _by_names(model: PreTrainedModel, device_map: dict[str, Any]) -> Placement:
    """The map written out. Modules that only hold buffers go with the first layer where the map leaves them out."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = sorted(set(device_map) - names)
    if unknown:
        raise ValueError(f"device_map names {listed(unknown)}, which {type(model).__name__} does not have")
    resolved = {
        name: "disk" if value == "disk" else present_device(value, f"device_map[{name!r}]={value!r}")
        for name, value in device_map.items()
    }
    placement: Placement = {}
    missing = []
    for name, module in placed_modules(model).items():
        parts = [f"{name}.{each}" for each, _ in module.named_parameters()]
        places = {place_of(resolved, part) for part in parts or [name]}
        if len(places) > 1:
            found = ", ".join(sorted(str(each) for each in places))
            raise ValueError(f"device_map spreads {name} over {found}: give it one device")
        place = places.pop()
        if place is None and parts:
            missing.append(name)
        placement[name] = place
    if missing:
        raise ValueError(f"device_map gives no device to {listed(missing)}")
    first = next(device for device in placement.values() if device is not None)
    placement = {name: first if device is None else device for name, device in placement.items()}
    _keep_tied_together(model, placement)
    return placement


def _keep_tied_together(model: PreTrainedModel, placement: Placement) -> None:
    """An embedding that is the lm_head goes where the lm_head does."""
    embedding, head = ends(model)
    if head is None or not are_tied(embedding, head):
        return
    names = {id(module): name for name, module in model.named_modules()}
    first, last = (entry_for(placement, names[id(module)]) for module in (embedding, head))
    assert first is not None
    assert last is not None
    if placement[first] != placement[last]:
        warn_user(f"{first} and lm_head are one tied weight: both go to {placement[last]}, not to {placement[first]}")
        placement[first] = placement[last]


def entry_for(device_map: Mapping[str, Any], name: str) -> str | None:
    """The name in a device map that decides about a module or parameter: the longest that it is part of, if any."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def place_of(device_map: Mapping[str, Any], name: str) -> Any:
    """Where a device map puts a module or parameter; None if it does not say."""
    entry = entry_for(device_map, name)
    return None if entry is None else device_map[entry]


# -- memory ------------------------------------------------------------------------------------------------------------


def model_bytes(model: nn.Module) -> int:
    """Bytes of all weights, packed or not, tied ones once."""
    return sum(weight.nbytes for weight in weights_of(model))


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, and what packed layers hold in their place, each once."""
    packed = [each for module in model.modules() if isinstance(module, PackedLinear) for each in module.buffers()]
    return [*model.parameters(), *packed]


def bytes_on_one_gpu(model: PreTrainedModel) -> int:
    """What a target takes with a head, a cache of CACHED_TOKENS tokens and room to work."""
    parts = head_bytes(model.config, model.dtype), cache_bytes(model.config, model.dtype)
    return model_bytes(model) + sum(parts) + WORKSPACE_BYTES


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of CACHED_TOKENS tokens."""
    anatomy = Anatomy(config)
    return anatomy.num_layers * anatomy.kv_bytes(dtype) * CACHED_TOKENS


def head_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of an EAGLE-3 head of the usual size, before its file is read: one layer, fc, 32,000 draft tokens."""
    anatomy = Anatomy(config)
    hidden, inner = anatomy.hidden_size, anatomy.intermediate_size
    return (11 * hidden**2 + 3 * hidden * inner + 32000 * hidden) * dtype.itemsize


def bytes_by_device(model: nn.Module, placement: Placement) -> dict[Any, int]:
    """Bytes of weights on each device of a placement, tied ones once."""
    needed: dict[Any, int] = {}
    counted: set[int] = set()
    for name, device in placement.items():
        for weight in weights_of(model.get_submodule(name)):
            if id(weight) not in counted:
                counted.add(id(weight))
                needed[device] = needed.get(device, 0) + weight.nbytes
    return needed


def _check_memory(model: PreTrainedModel, placement: Placement, max_memory: dict | None) -> None:
    """ValueError, with the numbers, where a GPU cannot hold its weights."""
    limits = get_max_memory(dict(max_memory)) if max_memory else {}
    for device, count in bytes_by_device(model, placement).items():
        if getattr(device, "type", None) != "cuda":
            continue
        room = limits.get(device.index, free_bytes(device))
        if count > room:
            raise ValueError(
                f"{device} would have to hold {count / GIB:.1f} GiB of weights and has room for {room / GIB:.1f} GiB "
                f"(the whole model: {model_bytes(model) / GIB:.1f} GiB): use more GPUs (device_map='auto'), a smaller "
                "dtype or quantized weights"
            )


def free_bytes(device: torch.device) -> int:
    """What a GPU can still hold: free memory, and what torch keeps reserved without using it."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def warn_if_slow(model: PreTrainedModel) -> None:
    """Half precision has no fast path on most CPUs: say so once, for models large enough to notice."""
    embedding = model.get_input_embeddings()
    device, dtype, size = device_of(embedding), dtype_of(embedding), num_parameters(model)
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) and size > SLOW_CPU_PARAMETERS:
        warn_user(
            f"a {size / 1e6:.0f}M parameter model in {dtype} on the CPU is slow: pass dtype=torch.float32, or a "
            "device_map with a GPU"
        )
