"""Whether a stock model is still what it was when its twin was made.

A twin shares every weight, so weights that are edited in place are the twin's too. What it does not share is listed
here, module by module: which modules there are, their hooks and own forwards, which tensors they hold, their plain
attributes (the active adapters of PEFT are among them), and versions of the biases, of which fused layers hold copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import is_rotary
from eagle_fast.target.twin import hooks_of

_PLAIN = (str, int, float, bool, type(None))
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}  # `training` among them


def portrait(model: nn.Module) -> list[list[Any]]:
    """What must stay as it is. Two portraits are equal if the twin made at one is right at the other.

    Rotary embeddings are left out, which stock forwards change; and so are what a whole model notes of its last call.
    """
    return [_of_module(module) for name, module in model.named_modules() if not is_rotary(name, module)]


def edits(model: nn.Module) -> int | None:
    """How often weights were written in place so far; None where tensors do not count that (inference mode's).

    What is written through `.data` is not counted.
    """
    modules = [module for name, module in model.named_modules() if not is_rotary(name, module)]
    tensors = [
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return sum(tensor._version for tensor in tensors)


def _of_module(module: nn.Module) -> list[Any]:
    found: list[Any] = [id(module), *hooks_of(module)]  # the hooks themselves: an id may be used again
    whole = isinstance(module, PreTrainedModel)
    for name, value in module.__dict__.items():
        if name in _TORCHS_OWN:
            continue
        if name in ("_parameters", "_buffers"):
            found += [_of_tensor(key, tensor) for key, tensor in value.items() if tensor is not None]
        elif name == "forward":
            found.append(value)
        elif whole:
            continue
        elif isinstance(value, _PLAIN):
            found.append((name, value))
        elif isinstance(value, (list, tuple, dict)):
            found.append((name, _plain(value)))
    return found


def _of_tensor(name: str, tensor: torch.Tensor) -> tuple:
    place = tensor.data_ptr() if type(tensor.data) is torch.Tensor else 0
    return name, id(tensor), place, tensor._version if name == "bias" and not tensor.is_inference() else 0


def _plain(value: Any) -> Any:
    """A copy of what is plain in a container, which may change in place."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, each) for key, each in items if isinstance(each, _PLAIN)]
