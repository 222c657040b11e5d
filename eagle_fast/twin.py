"""A twin of a stock model: the same parameters under shallow copies of its modules.

Everything that decoding changes (the attention implementation in the config, hooks on layers, swapped submodules) is
changed on the twin, so the user's model stays exactly as it came.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every parameter and buffer with `model`, with configs of its own."""
    return cast(PreTrainedModel, _twin(model, {}, {}))


def _twin(module: nn.Module, modules: dict[int, nn.Module], configs: dict) -> Any:
    if id(module) in modules:
        return modules[id(module)]
    clone = copy.copy(module)
    modules[id(module)] = clone
    state = clone.__dict__
    state["_modules"] = {
        name: None if child is None else _twin(child, modules, configs) for name, child in module._modules.items()
    }
    state["_buffers"] = dict(module._buffers)
    for name in _HOOKS:
        state[name] = OrderedDict(state[name])
    for name, value in list(state.items()):
        if isinstance(value, types.MethodType) and value.__self__ is module:
            state[name] = types.MethodType(value.__func__, clone)
    if hasattr(module, "config"):
        clone.config = copy.deepcopy(module.config, configs)
    return clone
