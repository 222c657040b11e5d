"""Whether a stock model is still what it was when its twin was made.

A twin shares every weight, so weights that are edited in place are the twin's too. What it does not share is listed
here, module by module: which modules there are, their hooks and own forwards, which tensors they hold, their attributes
(the active adapters of PEFT are among them), versions of rotary frequencies, of which twins may hold copies, and the
functions that their classes and transformers' files consist of.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import recomputes_frequencies
from eagle_fast.target.interface import attention_function
from eagle_fast.target.twin import global_hooks, hooks_of

_PLAIN = (str, int, float, bool, type(None))
_TORCHS_OWN = frozenset(vars(nn.Module()))  # `training` among them


class Portrait(NamedTuple):
    """What must stay as it is. Two of them are alike if the twin made at one is right at the other.

    notes: attributes of modules, by the module's id and their name. Some are set by every forward, as those in which
    hooks keep what they saw: see `noted`. configs: what each of the model's holds.
    """

    parts: list[Any]
    configs: list[Any]
    notes: dict[tuple[int, str], Any]

    def is_like(self, other: Portrait, but: set[tuple[int, str]]) -> bool:
        """Whether nothing is different but these attributes."""
        return self.parts == other.parts and self.configs == other.configs and noted(self, other) <= but


def noted(before: Portrait, after: Portrait) -> set[tuple[int, str]]:
    """The attributes that differ."""
    keys = before.notes.keys() | after.notes.keys()
    return {key for key in keys if before.notes.get(key) != after.notes.get(key)}


def portrait(model: nn.Module, tensors: bool = True) -> Portrait:
    """What a model is now.

    tensors: False leaves them out, as those of offloaded models come and go.

    Left out are the frequencies that stock forwards set anew, and what a whole model keeps in private.
    """
    modules = list(model.modules())
    notes: dict[tuple[int, str], Any] = {}
    parts: list[Any] = [global_hooks(), attention_function(model), _functions({type(module) for module in modules})]
    parts += [_of_module(module, tensors, notes) for module in modules]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return Portrait(parts, [_of_config(each) for each in configs.values()], notes)


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


def _of_module(module: nn.Module, tensors: bool, notes: dict[tuple[int, str], Any]) -> list[Any]:
    # the hooks and functions themselves: an id may be used again
    found: list[Any] = [id(module), type(module), type(module).forward, *hooks_of(module), vars(module).get("forward")]
    if recomputes_frequencies(module):
        return found
    if tensors:
        for held in (module._parameters, module._buffers):
            found += [_of_tensor(key, tensor) for key, tensor in held.items() if tensor is not None]
    whole = isinstance(module, PreTrainedModel)
    for name, value in vars(module).items():
        if name in _TORCHS_OWN or name in ("forward", "config") or (whole and name.startswith("_")):
            continue
        notes[id(module), name] = _contents(value) if isinstance(value, (list, tuple, dict)) else _of_value(value)
    return found


def _of_value(value: Any) -> Any:
    """Itself, if it is plain or code; of other objects, which a twin shares, which one it is."""
    return value if isinstance(value, _PLAIN) or callable(value) else ("object", id(value))


def _contents(value: Any) -> list[Any]:
    """Of a container, which may change in place."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, _of_value(each)) for key, each in items]


def _functions(classes: set[type]) -> list[Any]:
    """The functions of these classes, and of transformers' files that they are written in."""
    theirs = sorted(classes - {PreTrainedModel}, key=id)
    files = sorted({each.__module__ for each in classes if each.__module__.startswith("transformers.")})
    spaces = [vars(each) for each in theirs] + [vars(sys.modules[file]) for file in files if file in sys.modules]
    return [[value for value in list(space.values()) if callable(value)] for space in spaces]


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
