"""Load a target and a head that fit each other."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eagle_fast.checkpoint import read_head
from eagle_fast.head import DraftHead
from eagle_fast.placement import resolve_device

HEAD_OPTIONS = ("feature_layers", "norm_before_residual", "norm_output", "rope_theta", "rope_interleaved")
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
TOKENIZER_OPTIONS = (*HUB_OPTIONS, "revision", "subfolder", "trust_remote_code", "gguf_file")


def known_path(name: str, path: Any) -> str:
    """A hub name or the path of a folder, given as argument `name`. A path to no folder is a ValueError."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{name}={path!r}: pass a hub name like 'owner/name' or a folder")
    expanded = os.path.expanduser(os.fspath(path))
    is_path = expanded.startswith((".", os.sep)) or expanded.count("/") > 1
    if is_path and not os.path.isdir(expanded):
        raise ValueError(
            f"{name}={str(path)!r}: there is no such folder; pass a folder or a hub name like 'owner/name'"
        )
    return expanded


def load_target(path_or_model: Any, device_map, options: dict[str, Any]) -> PreTrainedModel:
    """The target: a model as it is, or one from the hub or a folder with options of AutoModelForCausalLM."""
    if isinstance(path_or_model, nn.Module):  # a PreTrainedModel, or a wrapper of one as PEFT's
        if options or device_map is not None:
            names = sorted([*options, *(["device_map"] if device_map is not None else [])])
            raise ValueError(f"{names} cannot change a model that is loaded already: pass them where you load it")
        return cast(PreTrainedModel, path_or_model)
    path, device = known_path("base_model_path", path_or_model), resolve_device(device_map)
    placed = options | {"device_map": {"": device}} if device.type == "cuda" else options
    model = AutoModelForCausalLM.from_pretrained(path, **placed)
    capped = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if capped and "attn_implementation" not in options:
        model.set_attn_implementation("eager")  # the default, SDPA, leaves the softcap out
    return model


def load_head(
    path: str,
    base_model: PreTrainedModel,
    *,
    use_eagle3: bool | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
) -> DraftHead:
    """The draft head for a target, beside its lm_head. options: `HEAD_OPTIONS` and `HUB_OPTIONS`."""
    embedding: Any = base_model.get_input_embeddings()
    lm_head: Any = base_model.get_output_embeddings()
    config = base_model.config.get_text_config(decoder=True)
    checkpoint = read_head(
        path,
        target_hidden_size=config.hidden_size,
        target_vocab_size=lm_head.weight.shape[0],
        num_target_layers=config.num_hidden_layers,
        use_eagle3=use_eagle3,
        revision=revision,
        **(options or {}),
    )
    return DraftHead(
        checkpoint,
        embedding=embedding.weight,
        lm_head_weight=lm_head.weight,
        lm_head_bias=getattr(lm_head, "bias", None),
        dtype=lm_head.weight.dtype,
        device=lm_head.weight.device,
    )


def runs_in_fp8(head: DraftHead, wanted: bool | None) -> bool:
    """Whether the head's weights become fp8: `wanted`, or None for where the GPU has it and the head is in 16 bits.

    Raises ValueError where it is wanted and cannot be.
    """
    has_fp8 = head.device.type == "cuda" and torch.cuda.get_device_capability(head.device) >= (8, 9)
    able = has_fp8 and head.dtype in (torch.bfloat16, torch.float16)
    if wanted and not able:
        raise ValueError(
            f"draft_fp8=True, but the head runs in {head.dtype} on {head.device}: fp8 needs a GPU of compute "
            "capability 8.9 or newer and a target in bfloat16 or float16; leave draft_fp8 out"
        )
    return able if wanted is None else wanted
