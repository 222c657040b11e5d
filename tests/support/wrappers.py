"""Tiny models of several modalities with random weights: wrappers of a causal LM, as their checkpoints are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel
from zoo import VOCAB

_TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]),
)
_SEEN = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,  # as many as the text has: they must not be taken for its layers
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
_CLIP = dict(model_type="clip_vision_model", **_SEEN)
_SIGLIP = dict(model_type="siglip_vision_model", **_SEEN)
_QWEN = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14, intermediate_size=48)
_HEARD = dict(
    hidden_size=32, d_model=32, num_mel_bins=16, intermediate_size=48, encoder_layers=2, num_hidden_layers=2,
    encoder_attention_heads=2, num_attention_heads=2, encoder_ffn_dim=48, max_source_positions=64,
)  # fmt: skip

# model type -> fields of its config; text_config is _TEXT with what "text" says
WRAPPERS: dict[str, dict] = {
    "llava": dict(text=dict(model_type="llama"), vision_config=_CLIP, image_token_id=VOCAB - 1),
    "mistral3": dict(
        text=dict(model_type="mistral", sliding_window=7),
        vision_config=dict(model_type="pixtral", **_SEEN, head_dim=16),
        image_token_id=VOCAB - 1,
    ),
    "idefics3": dict(text=dict(model_type="llama"), vision_config=_SEEN, image_token_id=VOCAB - 1),
    "paligemma": dict(text=dict(model_type="gemma"), vision_config=_SIGLIP, image_token_id=VOCAB - 1),
    "qwen2_vl": dict(text={}, vision_config=_QWEN),
    "qwen2_5_vl": dict(text={}, vision_config=_QWEN | dict(fullatt_block_indexes=[1], out_hidden_size=64)),
    "glm4v": dict(text={}, vision_config=_QWEN | dict(image_size=28, out_hidden_size=64)),
    "voxtral": dict(text=dict(model_type="llama"), audio_config=dict(model_type="voxtral_encoder", **_HEARD)),
}


def write_wrapper(name: str, folder: Path) -> PreTrainedModel:
    """A model of WRAPPERS, as it is in memory, saved in `folder`."""
    settings = dict(WRAPPERS[name])
    settings["text_config"] = _TEXT | settings.pop("text")
    config = AutoConfig.for_model(name, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(folder)
    return model
