"""Tensor names of draft heads in every format, brought to one spelling; and the kinds of draft that are refused.

Formats: SafeAILab EAGLE-1, -2, -3 and heads trained by HASS, AngelSlim, SpecForge, speculators, NVIDIA ModelOpt, NeMo;
vLLM's converted EAGLE-1.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from eagle_fast.head.checks import check_settings
from eagle_fast.head.storage import check_storage

_PREFIX = re.compile(r"^(?:model|draft_model|module|eagle_module)\.")
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^midlayer\.(?=\d+\.)", "layers."),  # ModelOpt's deep heads number them
        (r"^midlayer\.", "layers.0."),
        (r"^transformer\.", "layers.0."),  # speculators' EAGLE-1
        (r"^fusion_fc\.", "fc."),
        (r"^eagle_lm_head\.", "lm_head."),
        (r"^input_embeds_norm\.", "layers.0.input_layernorm."),
        (r"^hidden_norm\.", "layers.0.hidden_norm."),
        (r"^(d2t|t2d|token_map)\.weight$", r"\1"),
        (r"^layers\.([1-9]\d*)\.hidden_norm\.", r"layers.\1.input_layernorm."),  # TensorRT-LLM and SGLang
    )
]
# the target's own weights that speculators keeps while training, and rotary tables of old transformers
_IGNORED = re.compile(r"^verifier_(norm|lm_head)\.|rotary_emb\.inv_freq$")

_REFUSED_NAMES = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"kv_a_proj_with_mqa|q_a_proj|kv_b_proj", "an MLA head (DeepSeek's latent attention)"),
        (r"mask_hidden", "a parallel-drafting head (P-EAGLE), which drafts without a recursion"),
        (r"parallel_draft_heads", "a head with parallel Medusa-style heads (ModelOpt parallel_draft_step)"),
        (r"medusa|^\d+\.\d+\.linear\.", "a Medusa head, not EAGLE"),
        (r"eh_proj", "a head that projects with eh_proj before attention (MTP-style)"),
        (
            r"(_scale|_scales|_scale_inv|_zero_point|_amax|qweight|qzeros|g_idx|weight_packed|weight_shape"
            r"|absmax|quant_map|quant_state.*)$|\.scales$|_quantizer\b",
            "a head with quantized weights; use the 16-bit one (the head is quantized at load)",
        ),
        (r"experts\.|block_sparse_moe|mlp\.router", "a head with mixture-of-experts layers"),
        (
            r"embedding_layernorm|pre_lm_head_layernorm|embed_layernorm|lm_head_layernorm|hidden_layernorm",
            "an EAGLE-1 head with extra layer norms (speculators' `layernorms`)",
        ),
        (r"lora_[AB]\b", "a LoRA adapter, not a draft head"),
    )
]


def canonical_tensors(tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The checkpoint under this package's names. ValueError for drafts that are not EAGLE heads we can run."""
    refuse_settings(settings)
    named: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = canonical_name(key)
        if _IGNORED.search(name):
            continue
        for pattern, what in _REFUSED_NAMES:
            if pattern.search(name):
                raise ValueError(f"the checkpoint is {what}: tensor {key} is not supported")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{key} is a {type(tensor).__name__}, not a tensor: is this a training state?")
        check_storage(key, name, tensor)
        if name in named:
            raise ValueError(f"{origin[name]} and {key} are the same tensor {name}: keep one of them")
        named[name], origin[name] = tensor, key
    return named


def canonical_name(key: str) -> str:
    """One spelling: no wrapper's prefix, `layers.{i}.*` for every layer."""
    name, shorter = key, _PREFIX.sub("", key)
    while shorter != name:
        name, shorter = shorter, _PREFIX.sub("", shorter)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """ValueError where the config alone says that this is another kind of draft."""
    family = str(settings.get("speculators_model_type") or "")
    if family not in ("", "eagle", "eagle3"):
        raise ValueError(f"the checkpoint is a {family} draft (speculators_model_type), not an EAGLE head")
    for key in ("parallel_drafting", "ptd_token_id", "pard_token"):
        if settings.get(key) not in (None, False):
            raise ValueError(f"the checkpoint is a parallel-drafting head (P-EAGLE): config.json has {key}")
    if (settings.get("parallel_draft_step") or 1) > 1:
        raise ValueError("the checkpoint has parallel draft heads: config.json has parallel_draft_step > 1")
    for key in ("dflash_config", "medusa_num_heads"):
        if settings.get(key):
            raise ValueError(f"the checkpoint is not an EAGLE head: config.json has {key}")
    if settings.get("eh_proj_before_attn"):
        raise ValueError("the checkpoint is a head with eh_proj_before_attn, which is not supported")
    if settings.get("next_layer_regular") is False:
        raise ValueError("every layer of the head reads embeddings (next_layer_regular: false): not supported")
    if settings.get("early_stop_method"):
        raise ValueError("the head has early-stop signals (AngelSlim early_stop_method): not supported")


def flatten_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json on one level: a nested config of the layer goes over the outer one, `eagle_config` over both."""
    settings = {key: value for key, value in config.items() if value is not None}
    settings["from_vllm"] = config.get("model_type") == "eagle"
    for nested in ("transformer_layer_config", "model", "eagle_config"):
        inner = config.get(nested)
        if isinstance(inner, Mapping):
            settings.update({key: value for key, value in inner.items() if value is not None})
            settings.pop(nested, None)
        elif inner is not None and nested != "model":  # which may be a name
            raise ValueError(f"config.json: {nested} is {reprlib.repr(inner)}: use an object, or leave it out")
    check_settings(settings)
    return settings
