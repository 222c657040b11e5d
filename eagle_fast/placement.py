"""Where the target is loaded."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

SLOW_CPU_PARAMETERS = 50_000_000


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
