"""A twin of a stock model: the same parameters under shallow copies of its modules.

Everything that decoding changes (the attention implementation in the config, hooks on layers, swapped submodules) is
changed on the twin, so the user's model stays exactly as it came. A twin starts with the hooks of accelerate that its
model has, which move inputs between devices and bring offloaded weights.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
RECORDERS = "transformers.utils.output_capturing"


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
    for name in HOOKS:
        state[name] = OrderedDict(state[name])
    for name, value in list(state.items()):
        if isinstance(value, types.MethodType) and value.__self__ is module:
            state[name] = types.MethodType(value.__func__, clone)
        elif isinstance(value, functools.partial) and value.args[:1] == (module,):
            state[name] = functools.partial(value.func, clone, *value.args[1:], **value.keywords)
    if hasattr(module, "config"):
        clone.config = copy.deepcopy(module.config, configs)
    return clone


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward hooks, but those that transformers leaves behind to record outputs, which change nothing."""
    hooks = (hook for name in HOOKS for hook in vars(module)[name].values() if callable(hook))
    return [hook for hook in hooks if getattr(hook, "__module__", "") != RECORDERS]


def is_touched(module: nn.Module) -> bool:
    """Whether a twin's module, or one inside it, has hooks or a forward of its own: code that only stock layers run."""
    return any("forward" in vars(each) or hooks_of(each) for each in module.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate bring some of the weights to their device for each forward."""
    return any(parameter.is_meta for parameter in model.parameters())


def execution_device(model: Any) -> torch.device:
    """Where an offloaded model takes its input."""
    return torch.device(model._hf_hook.execution_device)


def stored_weight(module: Any) -> torch.Tensor:
    """A module's weight, wherever it is stored while no forward runs."""
    return module._hf_hook.weights_map["weight"] if module.weight.is_meta else module.weight


def drop_accelerate_hooks(model: nn.Module) -> None:
    """Take accelerate's hooks off a twin, whose modules then run the forward of their class."""
    for module in model.modules():
        if module.__dict__.pop("_hf_hook", None) is not None:
            forward = module.__dict__.pop("_old_forward")
            module.__dict__.pop("forward", None)
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.__dict__["forward"] = forward
