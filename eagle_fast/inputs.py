"""Inputs of stock models that decoding has no place for: why, and whether the base model itself would take them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from eagle_fast.decoding.records import NOT_RECORDED
from eagle_fast.target.anatomy import generating_model
from eagle_fast.target.interface import CACHE_ARGUMENTS

OF_OTHER_MODES = ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "dola_layers", "assistant_early_exit")
_MODALITIES = {
    "videos": re.compile(r"video"),
    "images": re.compile(r"pixel|image|vision|visual"),
    "sounds": re.compile(r"audio|speech|^sounds?$|^input_features|^input_values|^feature_attention_mask"),
}
_ENCODED = re.compile(r"^decoder_|^encoder_(outputs|hidden_states|attention_mask)|^cross_")
_TAKE = "base_model.generate takes"
_REASONS = {
    "adapter_names": f"all prompts are decoded with the active adapters: use set_adapter; {_TAKE} one for each",
    "inputs_embeds": "prompts are token ids, which the draft head looks up too: pass input_ids",
    "position_ids": "positions count a prompt's own tokens: leave it out, and mark padding by attention_mask",
    "token_type_ids": "only zeros are taken, since all text is of one type",
    "assistant_model": f"the draft head is the assistant; {_TAKE} others",
    "custom_generate": "generate decodes with a loop of its own; base_model.generate runs others, as "
    "custom_generate=model.custom_generate",
    **dict.fromkeys(
        CACHE_ARGUMENTS, "caches are kept within: pass the whole text as input_ids, in a conversation reuse_cache=True"
    ),
}
_OTHER_WAYS = {
    **dict.fromkeys(OF_OTHER_MODES, f"decoding is greedy or by sampling; {_TAKE} other ways"),
    **dict.fromkeys(NOT_RECORDED, "not recorded; base_model on the finished text gives them"),
}


def modality(name: str) -> str | None:
    """What an input of this name holds, if it is no text: "images", "videos" or "sounds"."""
    return next((kind for kind, pattern in _MODALITIES.items() if pattern.search(name)), None)


def is_no_text(name: str) -> bool:
    """Whether this is the name of an input that no method of ours takes, by that alone."""
    return name in _REASONS or bool(modality(name) or _ENCODED.search(name))


def reason(name: str, base_model: Any, *, everywhere: bool = False) -> str | None:
    """Why decoding does not take an input; None for names of which nothing is known.

    everywhere: also of arguments that `generate` takes with some values.
    """
    model: Any = generating_model(base_model)
    kind = modality(name)
    if kind is not None:
        read = [each for each in inspect.signature(model.forward).parameters if modality(each) == kind]
        tail = f"{type(model).__name__} reads none"
        if read:
            tail = f"base_model.generate alone takes them, as {name if name in read else read[0]}"
        return f"{kind} are not taken: decoding goes by token ids alone; {tail}"
    if _ENCODED.search(name):
        return f"of models with an encoder, and {type(model).__name__} has none: pass the prompt as input_ids"
    return _REASONS.get(name) or (_OTHER_WAYS.get(name) if everywhere else None)


def refuse_inputs(names: Iterable[str], base_model: Any) -> None:
    """ValueError for inputs that decoding does not take, if there are any."""
    said: dict[str, list[str]] = {}
    for name in names:
        why = reason(name, base_model) or "it would change the model's text, and decoding does not hand it on"
        said.setdefault(why, []).append(name)
    if said:
        raise ValueError("; ".join(f"{', '.join(names)}: {why}" for why, names in said.items()))
