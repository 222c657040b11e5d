"""What a model's attention layers are, learned from one token that runs through it; and which models are refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from eagle_fast.layers.slab import LayerShape

PROBE = "eagle_fast_probe"


class UnsupportedModel(ValueError):
    """The model cannot be decoded exactly with a tree; the message says why."""


class AttentionCall(NamedTuple):
    """One attention call of the probe forward."""

    module: nn.Module
    shape: LayerShape
    mask: torch.Tensor | None
    options: dict


def _probe_attention(module, query, key, value, attention_mask, **options):
    shape = LayerShape(key.shape[1], key.shape[-1], key.dtype, key.device)
    if key.shape != value.shape:
        raise UnsupportedModel("its keys and values differ in shape (multi-head latent attention)")
    module.eagle_probe.append(AttentionCall(module, shape, attention_mask, options))
    groups = query.shape[1] // key.shape[1]
    return value.repeat_interleave(groups, 1)[:, :, : query.shape[2]].transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBE, _probe_attention)


def probe(model: PreTrainedModel, config, device: torch.device) -> tuple[list[AttentionCall], torch.device]:
    """Run a token, given on `device`, through a twin: its attention calls, one a layer, and the device of the logits.

    config: of the text model. The twin is left with the probe as its attention. Raises UnsupportedModel.
    """
    calls: list[AttentionCall] = []
    for module in model.modules():
        module.__dict__["eagle_probe"] = calls
    model.config._attn_implementation = PROBE
    logits_device = _run_a_token(model, device)
    for module in model.modules():
        del module.eagle_probe
    _check(calls, config, type(model).__name__)
    return calls, logits_device


def _run_a_token(model: PreTrainedModel, device: torch.device) -> torch.device:
    name = type(model).__name__
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            return model(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False).logits.device
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{name} needs masks that it builds itself ({type(error).__name__}: {error})") from error


def _check(calls: list[AttentionCall], config, name: str) -> None:
    num_layers = config.num_hidden_layers
    if not calls:
        raise UnsupportedModel(f"{name} does not route attention through AttentionInterface")
    if len(calls) != num_layers:
        raise UnsupportedModel(f"{len(calls)} attention calls for {num_layers} layers: not every layer is attention")
    if any(call.mask is not None for call in calls):
        raise UnsupportedModel("it builds an attention mask of its own")
    order = [getattr(call.module, "layer_idx", None) for call in calls]
    if order != list(range(num_layers)):
        raise UnsupportedModel(f"its attention layers run in the order {order}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModel("some of its layers share the keys and values of others")
