"""A stock model in a wider precision, without a copy of its weights: each part is converted while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import placed_modules
from eagle_fast.target.interface import attention_of, use_eager_attention
from eagle_fast.target.twin import twin


def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A twin that computes what `model` does, in a wider dtype from the embeddings on; its parameters are the model's.

    At any time one part, a decoder layer or what stands beside them, has a wider copy. Packed weights stay as they are,
    and so does what the model's code computes in float32 whatever its dtype.
    """
    reference = twin(model).eval()
    if "flash" in attention_of(reference):  # which takes 16 bits only
        use_eager_attention(reference)
    embedding, *parts = placed_modules(reference).values()
    embedding.register_forward_hook(lambda module, args, output: _widened(output, dtype))
    for part in parts:
        _widen_while_it_runs(part, dtype)
    return reference


def _widen_while_it_runs(part: nn.Module, dtype: torch.dtype) -> None:
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def widen(*_: Any) -> None:
        for module in part.modules():
            for held in (module._parameters, module._buffers):
                kept.append((held, dict(held)))
                held.update({name: _widened(value, dtype) for name, value in held.items()})

    def give_back(*_: Any) -> None:
        for held, before in kept:
            held.update(before)
        kept.clear()

    for module in part.modules():
        module._parameters = dict(module._parameters)  # those of a twin are the model's
    part.register_forward_pre_hook(widen, prepend=True)
    part.register_forward_hook(give_back, always_call=True)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    plain = isinstance(value, Tensor) and type(value.data) is Tensor and value.is_floating_point()
    return value.to(dtype) if plain and value.element_size() < dtype.itemsize else value
