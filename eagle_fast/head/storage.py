"""How the tensors of a head must be stored: floats for weights, integers for vocabulary maps, matrices as matrices."""

from __future__ import annotations

import re

import torch

_MAPS = ("d2t", "t2d", "token_map")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MATRIX = re.compile(r"(_proj|^fc|^lm_head|^embed_tokens)\.weight$")


def check_storage(key: str, name: str, tensor: torch.Tensor) -> None:
    """ValueError for a tensor that cannot be a part of a head. key: its name in the file, name: in this package."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(f"{key} is a {kind} tensor: save the head with plain, dense tensors")
    if name in _MAPS:
        _check_map(key, name, tensor)
    elif tensor.dtype not in _FLOATS:
        if tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool:
            raise ValueError(
                f"the checkpoint is a head with quantized weights: {key} is {tensor.dtype}; use the 16-bit one (the "
                "head is quantized at load)"
            )
        raise ValueError(f"{key} is {tensor.dtype}: weights are floats, save it in bfloat16, float16 or float32")
    dims = 2 if _MATRIX.search(name) else max(1, tensor.dim())
    if tensor.dim() != dims or not tensor.numel():
        wanted = "a matrix" if dims == 2 else "at least one number in a row"
        raise ValueError(
            f"{key} has shape {list(tensor.shape)}, expected {wanted}: are the weights packed, or the file damaged?"
        )


def _check_map(key: str, name: str, tensor: torch.Tensor) -> None:
    if name == "t2d" and tensor.dtype is torch.bool:
        return
    if tensor.dtype not in _INTEGERS:
        raise ValueError(f"{key} is {tensor.dtype}: token ids are integers, save it as int64")
    if name == "t2d" and bool(((tensor != 0) & (tensor != 1)).any()):
        raise ValueError(f"{key} holds more than 0 and 1: it marks the tokens that are drafted, save it as bool")
