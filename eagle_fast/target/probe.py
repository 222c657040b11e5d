"""What a model's attention layers are, learned from one token that runs through it; and which models are refused."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import Anatomy, UnsupportedModel
from eagle_fast.target.interface import AttentionCall, Recording, cache_argument, recorded_attention


def probe(
    model: PreTrainedModel, layers: nn.ModuleList | None, device: torch.device
) -> tuple[list[AttentionCall], torch.device]:
    """Run a token, given on `device`, through a twin: its attention calls, one per layer, and the device of the logits.

    layers: its decoder layers, as far as they were found. Raises UnsupportedModel.
    """
    with recorded_attention(model) as found:
        logits_device = _run_a_token(model, found, device)
    _check(found, Anatomy(model), type(model).__name__)
    inside = set() if layers is None else set(layers.modules())
    asking = next((module for module in found.cache.asked_by if module in inside), None)
    if asking is not None:
        raise UnsupportedModel(
            f"its layers ({type(asking).__name__}) ask the cache how long the text is, which differs between the nodes "
            "of a tree"
        )
    return found.calls, logits_device


def _run_a_token(model: PreTrainedModel, found: Recording, device: torch.device) -> torch.device:
    name = type(model).__name__
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    cache = {cache_argument(model): found.cache}
    try:
        with torch.no_grad():
            out = model(input_ids=token, position_ids=torch.zeros_like(token), use_cache=True, **cache)
            return out.logits.device
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"{name} needs masks or a cache that it builds itself ({what})") from error


def _check(found: Recording, anatomy: Anatomy, name: str) -> None:
    calls, num_layers = found.calls, anatomy.num_layers
    if not calls:
        raise UnsupportedModel(f"{name} does not route attention through AttentionInterface")
    if any(call.key.shape != call.value.shape for call in calls):
        raise UnsupportedModel("its keys and values differ in shape (multi-head latent attention)")
    if len(calls) != num_layers:
        raise UnsupportedModel(f"{len(calls)} attention calls for {num_layers} layers: not every layer is attention")
    if any(call.mask is not None for call in calls):
        raise UnsupportedModel("it builds an attention mask of its own")
    if any(getattr(call.module, "is_causal", True) is False for call in calls):
        raise UnsupportedModel(
            "its attention looks at the tokens of a prompt in both directions (is_causal=False), so no token is read "
            "before the prompt is whole, and none is its own"
        )
    order = [getattr(call.module, "layer_idx", None) for call in calls]
    if order != list(range(num_layers)):
        raise UnsupportedModel(f"its attention layers run in the order {order}")
    if anatomy.shares_kv:
        raise UnsupportedModel("some of its layers share the keys and values of others")
    for index, call in enumerate(calls):
        key, value = found.cache.given.get(index, (None, None))
        if key is not call.key or value is not call.value:
            raise UnsupportedModel("its attention does not read the keys and values that it gives to the cache")
