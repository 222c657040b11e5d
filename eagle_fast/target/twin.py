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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
RECORDERS = "transformers.utils.output_capturing"
COMPILED_FROM = "_torchdynamo_orig_callable"


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every parameter and buffer with `model`, with configs of its own."""
    return cast(PreTrainedModel, _twin(model, {}, {}))


def _twin(module: nn.Module, modules: dict[int, nn.Module], configs: dict) -> Any:
    module = uncompiled(module)
    if id(module) in modules:
        return modules[id(module)]
    clone = object.__new__(type(module))  # not by copy.copy, which parametrized modules refuse
    modules[id(module)] = clone
    state = clone.__dict__
    state.update(module.__dict__)
    state["_modules"] = {
        name: None if child is None else _twin(child, modules, configs) for name, child in module._modules.items()
    }
    state["_buffers"] = dict(module._buffers)
    for name in HOOKS:
        state[name] = OrderedDict(state[name])
    state.pop("_compiled_call_impl", None)
    for name, value in list(state.items()):
        value = state[name] = getattr(value, COMPILED_FROM, value) if name == "forward" else value
        if isinstance(value, types.MethodType) and value.__self__ is module:
            state[name] = types.MethodType(value.__func__, clone)
        elif isinstance(value, functools.partial) and value.args[:1] == (module,):
            state[name] = functools.partial(value.func, clone, *value.args[1:], **value.keywords)
    if getattr(state.get("forward"), "__func__", None) is type(module).forward:
        del state["forward"]  # it was compiled
    if hasattr(module, "config"):
        clone.config = copy.deepcopy(module.config, configs)
    return clone


def uncompiled(module: Any) -> Any:
    """What `torch.compile` was given, where it made a module of its own of it."""
    while type(module).__name__ == "OptimizedModule":
        module = module._orig_mod
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether a module, or one inside it, was given to `torch.compile`: their twin runs what they were made of."""
    for module in model.modules():
        inplace = vars(module).get("_compiled_call_impl") is not None
        if inplace or uncompiled(module) is not module or hasattr(vars(module).get("forward"), COMPILED_FROM):
            return True
    return False


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward hooks, but those that transformers leaves behind to record outputs, which change nothing."""
    hooks = (hook for name in HOOKS for hook in vars(module)[name].values() if callable(hook))
    return [hook for hook in hooks if getattr(hook, "__module__", "") != RECORDERS]


def global_hooks() -> list[Any]:
    """Hooks of all modules there are."""
    torchs = nn.modules.module
    return [*torchs._global_forward_hooks.values(), *torchs._global_forward_pre_hooks.values()]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module does not run what its class was written with: a forward was put on it, or on its class."""
    owner: Any = next(each for each in type(module).__mro__ if "forward" in vars(each))
    return "forward" in vars(module) or owner.forward.__module__ != owner.__module__


def is_prepared(module: nn.Module) -> bool:
    """Whether `accelerate.prepare` put a forward on a module, and kept the one that it replaced."""
    return "_original_forward" in vars(module)


def is_touched(module: nn.Module) -> bool:
    """Whether a twin's module, or one inside it, has hooks or a forward of its own: code that only stock layers run."""
    return bool(global_hooks()) or any(has_own_forward(each) or hooks_of(each) for each in module.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A user's model without dropout for the time of the block."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate bring some of the weights to their device for each forward."""
    return any(parameter.is_meta for parameter in model.parameters())


def execution_device(model: Any) -> torch.device:
    """Where an offloaded model takes its input."""
    return torch.device(model._hf_hook.execution_device)


def stored_weight(module: Any) -> torch.Tensor:
    """A module's weight, wherever it is stored while no forward runs."""
    return module._hf_hook.weights_map["weight"] if module.weight.is_meta else module.weight


def has_accelerate_hooks(model: nn.Module) -> bool:
    """Whether accelerate moves the inputs of modules to where they are."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def drop_accelerate_hooks(model: nn.Module) -> None:
    """Take accelerate's hooks off a twin, whose modules then run the forward of their class."""
    for module in model.modules():
        if module.__dict__.pop("_hf_hook", None) is not None:
            forward = module.__dict__.pop("_old_forward")
            module.__dict__.pop("forward", None)
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.__dict__["forward"] = forward
