"""Folders of quantized targets as compressed-tensors writes them, from the weights of a small model, without it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

GROUP = 32
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")  # int4 weights; int8 and fp8 weights and activations


def write_compressed(
    model: PreTrainedModel, folder: Path, kind: str, strategy: str = "token", group: int = GROUP
) -> Path:
    """A checkpoint of compressed-tensors in one of FORMATS; strategy: over what dynamic activations are scaled; group:
    columns of int4 weights with one scale."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            packers = {"pack-quantized": lambda weight: _int4(weight, group), "int-quantized": _int8}
            packed = packers.get(kind, _fp8)(tensor)
            tensors |= {f"{name}{end}": part for end, part in packed.items()}
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["quantization_config"] = _settings(kind, strategy, group)
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _settings(kind: str, strategy: str, group: int) -> dict:
    number = dict(num_bits=8, type="float" if kind == "float-quantized" else "int", symmetric=True, dynamic=False)
    weights = number | dict(strategy="channel")
    activations = number | dict(strategy=strategy, dynamic=True)
    if kind == "pack-quantized":
        weights, activations = number | dict(num_bits=4, strategy="group", group_size=group), None
    return dict(
        quant_method="compressed-tensors",
        format=kind,
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={"group_0": dict(targets=["Linear"], weights=weights, input_activations=activations)},
    )


def _int4(weight: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """Codes + 8 in words of 8 along the rows, the first in the lowest bits; a scale for each group of a row."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int64).reshape(rows, -1, 8) + 8
    words = (codes << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"_packed": words, "_scale": scale[..., 0].contiguous(), "_shape": torch.tensor([rows, columns])}


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return {"": (weight / scale).round().to(torch.int8), "_scale": scale}


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale}
