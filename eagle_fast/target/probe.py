"""What a model's attention layers are, learned from one token that runs through it; and which models are refused."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eagle_fast.target.anatomy import Anatomy, UnsupportedModel
from eagle_fast.target.interface import AttentionCall, recorded_attention


def probe(model: PreTrainedModel, device: torch.device) -> tuple[list[AttentionCall], torch.device]:
    """Run a token, given on `device`, through a twin: its attention calls, one per layer, and the device of the logits.

    Raises UnsupportedModel.
    """
    with recorded_attention(model) as calls:
        logits_device = _run_a_token(model, device)
    _check(calls, Anatomy(model), type(model).__name__)
    return calls, logits_device


def _run_a_token(model: PreTrainedModel, device: torch.device) -> torch.device:
    name = type(model).__name__
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            return model(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False).logits.device
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{name} needs masks that it builds itself ({type(error).__name__}: {error})") from error


def _check(calls: list[AttentionCall], anatomy: Anatomy, name: str) -> None:
    num_layers = anatomy.num_layers
    if not calls:
        raise UnsupportedModel(f"{name} does not route attention through AttentionInterface")
    if any(call.key_shape != call.value_shape for call in calls):
        raise UnsupportedModel("its keys and values differ in shape (multi-head latent attention)")
    if len(calls) != num_layers:
        raise UnsupportedModel(f"{len(calls)} attention calls for {num_layers} layers: not every layer is attention")
    if any(call.mask is not None for call in calls):
        raise UnsupportedModel("it builds an attention mask of its own")
    order = [getattr(call.module, "layer_idx", None) for call in calls]
    if order != list(range(num_layers)):
        raise UnsupportedModel(f"its attention layers run in the order {order}")
    if anatomy.shares_kv:
        raise UnsupportedModel("some of its layers share the keys and values of others")
