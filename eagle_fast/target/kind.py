"""What kind of model a checkpoint holds, by its config alone: which class of transformers loads it, or why none does.

Besides causal LMs these are their wrappers with other modalities, which decode text as what they wrap does.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from eagle_fast.messages import short
from eagle_fast.target.anatomy import Anatomy, UnsupportedModel

# In this order: of a type in several, AutoModelForCausalLM loads the text alone where transformers has a class for it.
_CLASSES: dict[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}
MOST_LAYERS = 10_000
_REMOTE = tuple(each.__name__ for each in _CLASSES)


def auto_class(config: PreTrainedConfig, trust_remote_code: bool = False, what: str = "the model") -> Any:
    """The auto class of transformers that loads a checkpoint with this config. Raises UnsupportedModel.

    trust_remote_code: take the classes that the checkpoint brings, where it does. what: how to call it in an error.
    """
    check_kind(config, what)
    brought = getattr(config, "auto_map", None) or {}
    if trust_remote_code and brought:
        of_its_own = [each for each in _CLASSES if each.__name__ in brought]
        if of_its_own:
            return of_its_own[0]
    found = [each for each, models in _CLASSES.items() if type(config) in models]
    if found:
        return found[0]
    if brought:
        raise UnsupportedModel(
            f"{what} is of type {_name(config)} that transformers has no class for, and its own code names "
            f"{', '.join(sorted(brought))}, none of {', '.join(_REMOTE)}"
            + ("" if trust_remote_code else "; with trust_remote_code=True its own code would run")
        )
    raise UnsupportedModel(
        f"{what} is of type {_name(config)}, no causal language model: transformers has no class of that type that "
        "generates text token by token. Give a decoder, as Llama, Qwen or a vision-language model around one"
    )


def model_class(auto: Any, config: PreTrainedConfig, options: dict[str, Any]) -> type | None:
    """The class of transformers that `auto` makes of this config; None where the checkpoint brings its own."""
    brought = getattr(config, "auto_map", None) or {}
    models = _CLASSES[auto]
    if (options.get("trust_remote_code") and auto.__name__ in brought) or type(config) not in models:
        return None
    found = models[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def check_layers(layers: Any, what: str = "the model") -> None:
    """UnsupportedModel for numbers of layers that no model has: transformers would build them, for as long as it takes.

    layers: None where that is not known.
    """
    whole = isinstance(layers, int) and not isinstance(layers, bool)
    if layers is not None and not (whole and 1 <= layers <= MOST_LAYERS):
        raise UnsupportedModel(
            f"{what} has num_hidden_layers={short(layers)}: use a whole number from 1 to {MOST_LAYERS} (in config.json "
            "or as an option), that of the checkpoint"
        )


def check_kind(config: PreTrainedConfig, what: str = "the model") -> None:
    """UnsupportedModel for models that read the prompt in an encoder, or are one."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{what} is of type {_name(config)}, an encoder-decoder: its prompt goes into an encoder, and the "
            "decoder's tree has no prompt to stand on. Give a decoder-only language model"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UnsupportedModel(
            f"{what} is of type {_name(config)}, an encoder: its tokens see those after them, so no text grows token "
            "by token. Give a decoder-only language model (where this one was trained as one, is_decoder=True says so)"
        )


def model_of_config(config: PreTrainedConfig, trust_remote_code: bool = False, **options) -> Any:
    """The model of a config with random weights, of the class that `auto_class` would load."""
    auto = auto_class(config, trust_remote_code)
    models = _CLASSES[auto]
    if not trust_remote_code and type(config) in models:  # a class of the text alone, which 5.4 gives the whole config
        text = Anatomy(config).text
        if getattr(models[type(config)], "config_class", None) is type(text):
            config = text
    if trust_remote_code:
        options["trust_remote_code"] = True
    return auto.from_config(config, **options)


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype to load weights in, as given for argument dtype; None for the checkpoint's own. Raises ValueError."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2:
        return found
    raise ValueError(
        f"dtype={short(dtype)}: use torch.bfloat16, torch.float16, torch.float32, their names, or 'auto' for the "
        "checkpoint's own; weights of fewer bits are asked for by quantization_config"
    )


def _name(config: Any) -> str:
    """A config's type as its users know it, with the class that the checkpoint was saved from."""
    saved = getattr(config, "architectures", None) or []
    name = getattr(config, "model_type", "") or type(config).__name__
    return f"{name!r} ({', '.join(map(str, saved))})" if saved else f"{name!r}"
