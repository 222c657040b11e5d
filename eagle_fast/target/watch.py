"""Whether a stock model is still what it was when its twin was made.

A twin shares every weight, so weights that are edited in place are the twin's too. What it does not share is listed
here, module by module: which modules there are, their hooks and own forwards, which tensors they hold, their plain
attributes (the active adapters of PEFT are among them), and versions of rotary frequencies, of which twins may hold
copies.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import recomputes_frequencies
from eagle_fast.target.twin import global_hooks, hooks_of

_PLAIN = (str, int, float, bool, type(None))
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}  # `training` among them


def portrait(model: nn.Module, tensors: bool = True) -> list[list[Any]]:
    """What must stay as it is. Two portraits are equal if the twin made at one is right at the other.

    tensors: False leaves them out, as those of offloaded models come and go.

    Left out are the frequencies that stock forwards set anew, and what a whole model notes of its last call.
    """
    found = [_of_module(module, tensors) for module in model.modules()]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [global_hooks(), *found, *map(_of_config, configs.values())]


def edits(model: nn.Module) -> int | None:
    """How often weights were written in place so far; None where tensors do not count that (inference mode's).

    What is written through `.data` is not counted.
    """
    modules = [module for module in model.modules() if not recomputes_frequencies(module)]
    held = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
    tensors = [tensor for tensor in held if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return sum(tensor._version for tensor in tensors)


def _of_module(module: nn.Module, tensors: bool) -> list[Any]:
    # the hooks and functions themselves: an id may be used again
    found: list[Any] = [id(module), type(module).forward, *hooks_of(module), module.__dict__.get("forward")]
    if recomputes_frequencies(module):
        return found
    whole = isinstance(module, PreTrainedModel)
    for name, value in module.__dict__.items():
        if name in _TORCHS_OWN:
            continue
        if name in ("_parameters", "_buffers"):
            held = value.items() if tensors else ()
            found += [_of_tensor(key, tensor) for key, tensor in held if tensor is not None]
        elif whole:
            continue
        elif isinstance(value, _PLAIN) or callable(value):
            found.append((name, value))
        elif isinstance(value, (list, tuple, dict)):
            found.append((name, _plain(value)))
    return found


def _of_config(config: Any) -> list[Any]:
    found: list[Any] = []
    for name, value in vars(config).items():
        if isinstance(value, _PLAIN):
            found.append((name, value))
        elif isinstance(value, (list, tuple, dict)):
            found.append((name, copy.deepcopy(value)))
    return found


def _of_tensor(name: str, tensor: torch.Tensor) -> tuple:
    place = tensor.data_ptr() if type(tensor.data) is torch.Tensor else 0
    counts = name.endswith("inv_freq") and not tensor.is_inference()
    return name, id(tensor), place, tensor._version if counts else 0


def _plain(value: Any) -> Any:
    """A copy of what is plain in a container, which may change in place."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, each) for key, each in items if isinstance(each, _PLAIN)]
