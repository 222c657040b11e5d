"""Which module of a twin gives a row other bits when more rows come with it.

B sequences, T tree nodes, P nodes of a path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eagle_fast.target.anatomy import decoder_layers
from eagle_fast.target.fused import FusedLayer
from eagle_fast.target.paths import Run, forwards
from eagle_fast.target.target import Target


class Call(NamedTuple):
    """What a module was given and returned of a path: [P, ...] each."""

    given: list[Tensor]
    returned: list[Tensor]


Calls = dict[tuple[str, int], Call]  # by the module's name and which of its calls it was, in the order of their ends


def first_differing(target: Target, layer: int, plainly: Run, among_others: Run) -> str | None:
    """The first module whose output of the path differs where its inputs are equal, as "model.norm (LlamaRMSNorm)".

    Looked for in one layer and beside the layers (`layer`: their number where only beside them); None where it can't be
    told, as in fused layers.
    """
    modules = dict(_candidates(target, layer))
    expected, found = (_calls(target, run, modules) for run in (plainly, among_others))
    for key, call in found.items():
        other = expected.get(key)
        if other is None or not call.given or not _equal(call.given, other.given):
            continue
        if not _equal(call.returned, other.returned):
            return _described(target, key[0])
    return None


def _candidates(target: Target, layer: int) -> Iterator[tuple[str, nn.Module]]:
    found = decoder_layers(target.model, target.anatomy.num_layers)
    assert found is not None, "a target was made of it"
    path, layers = found
    here = f"{path}.{layer}."
    fused = layer < len(layers) and isinstance(layers[layer], FusedLayer)
    for name, module in target.model.named_modules():
        inside = name == path or name.startswith(f"{path}.")
        around = not name or path.startswith(f"{name}.")
        if (name.startswith(here) and not fused) or not (inside or around):
            yield name, module


def _calls(target: Target, run: Run, modules: dict[str, nn.Module]) -> Calls:
    """Those whose rows can be told, with the same of them in each forward."""
    per_forward: list[Calls] = []
    for tokens, step in forwards(target, run):
        calls: Calls = {}
        with ExitStack() as stack:
            counts = Counter[str]()
            for name, module in modules.items():
                hook = _keeper(name, calls, counts, tokens.shape)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            target.verify(tokens, step, run.cache)
        per_forward.append(calls)
    path, whole = list(run.form.path), {}
    for key in per_forward[0]:
        if all(key in calls for calls in per_forward):
            given, returned = ([calls[key][side] for calls in per_forward] for side in (0, 1))
            whole[key] = Call(*([each[run.own, path] for each in _joined(side)] for side in (given, returned)))
    return whole


def _keeper(name: str, calls: Calls, counts: Counter[str], shape: torch.Size) -> Any:
    def hook(module: nn.Module, args: Any, options: Any, out: Any) -> None:
        calls[name, counts[name]] = Call(list(_rows([args, options], *shape)), list(_rows(out, *shape)))
        counts[name] += 1

    return hook


def _rows(value: Any, batch: int, count: int) -> Iterator[Tensor]:
    """The tensors in a value that hold something of each node, as [B, T, ...]."""
    if isinstance(value, Tensor):
        if value.shape[:2] == (batch, count):
            yield value
        elif value.dim() == 4 and value.shape[::2] == (batch, count):  # [B, heads, T, D]
            yield value.transpose(1, 2)
        elif value.dim() > 1 and len(value) == batch * count:
            yield value.unflatten(0, (batch, count))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _rows(each, batch, count)
    elif isinstance(value, dict):
        yield from _rows(list(value.values()), batch, count)


def _joined(forwards_of_one: list[list[Tensor]]) -> Iterator[Tensor]:
    """Along T."""
    for tensors in zip(*forwards_of_one, strict=False):
        if len({(each.shape[0], each.shape[2:]) for each in tensors}) == 1:
            yield torch.cat(tensors, 1)


def differs(a: Tensor, b: Tensor) -> Tensor:
    """[] whether any number does; NaN is like NaN."""
    return ((a != b) & ~(a.isnan() & b.isnan())).any()


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    shapes = [[each.shape for each in tensors] for tensors in (ours, theirs)]
    return shapes[0] == shapes[1] and not any(differs(a, b) for a, b in zip(ours, theirs, strict=True))


def _described(target: Target, name: str) -> str:
    """A module's name, with its class in the user's model."""
    modules = dict(target.stock.named_modules())
    found = modules[name] if name in modules else target.model.get_submodule(name)
    return f"{name} ({type(found).__name__})"
