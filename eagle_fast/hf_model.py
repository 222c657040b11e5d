"""What tools of others ask of a model: `EaModel` as a model to pipelines, lm-eval and scripts with `model.device`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from eagle_fast.decoding.records import NOT_RECORDED
from eagle_fast.decoding.validate import check_flags, check_forward
from eagle_fast.head import DraftHead
from eagle_fast.options import option_names, refuse_unknown
from eagle_fast.target import Target
from eagle_fast.target.anatomy import generating_model
from eagle_fast.target.interface import cache_argument
from eagle_fast.target.rank_files import cut_of

OF_FORWARD = ("input_ids", "attention_mask", "past_key_values", "output_orig", "position_ids")
WITHOUT_IDS = ("inputs_embeds", "return_dict")  # that a forward of stock models takes, and ours does not


class ForwardResult(tuple):
    """(outputs, hidden) or (outputs, logits, hidden), with everything of the base model's own output as attributes."""

    whole: Any

    def __new__(cls, values: tuple, whole: Any) -> ForwardResult:
        made = super().__new__(cls, values)
        made.whole = whole
        return made

    def __getattr__(self, name: str):
        if name == "whole":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.whole, name)


class HFModelMixin:
    """The part of `EaModel` that looks like a `PreTrainedModel`."""

    base_model: PreTrainedModel
    ea_layer: DraftHead
    target: Target
    _name: str

    @property
    def device(self) -> torch.device:
        """Where input_ids go: the device of the target's embedding."""
        return self.target.input_device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def generation_config(self) -> GenerationConfig:
        """base_model's own: what is set in it, and another one in its place, holds for every method here."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if not isinstance(value, GenerationConfig):
            raise ValueError(f"generation_config is a {type(value).__name__}: assign a GenerationConfig")
        generating_model(self.base_model).generation_config = value

    @property
    def name_or_path(self) -> str:
        """The target's name on the hub, or its folder."""
        return self._name

    @property
    def hf_device_map(self) -> dict:
        """Where accelerate has put the target's modules, if it has."""
        base_model: Any = self.base_model
        return base_model.hf_device_map

    def can_generate(self) -> bool:
        return True

    def tie_weights(self, *args, **options) -> None:
        """base_model's."""
        self.base_model.tie_weights(*args, **options)

    # -- as SafeAILab/EAGLE calls it -------------------------------------------------------------------------------

    @property
    def base_model_name_or_path(self) -> str:
        return self._name

    @property
    def use_eagle3(self) -> bool:
        """Whether the head is one of EAGLE-3."""
        return self.ea_layer.config.kind == "eagle3"

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def hidden_size(self) -> int:
        """The target's."""
        return self.target.anatomy.hidden_size

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        output_orig=False,
        position_ids=None,
        **options,
    ) -> ForwardResult:
        """The target alone, as in SafeAILab/EAGLE: (outputs, hidden), or (outputs, logits, hidden) with output_orig.

        hidden [B, L, H] is the last hidden state after the final norm, logits [B, L, V]. As in transformers, what is
        returned also has `logits`, `past_key_values`, `loss`, ..., and further options go to base_model: labels,
        use_cache, output_hidden_states, ... Raises ValueError, and TypeError for options that it does not take.
        """
        if cut_of(self.base_model) is not None:
            raise ValueError("a model over ranks (tensor_parallel) decodes, and has no forward: leave it out for one")
        check_forward(input_ids, attention_mask, past_key_values, position_ids, self.target)
        output_orig = check_flags(output_orig=output_orig)[0]
        if options.get("return_dict"):
            del options["return_dict"]
        others = [*option_names(generating_model(self.base_model).forward), *NOT_RECORDED]
        refuse_unknown("forward", options, [name for name in (*OF_FORWARD, *others) if name not in WITHOUT_IDS])
        input_ids = input_ids.to(self.target.input_device, torch.long)
        kept = {}

        def keep(module, args, output):
            kept["outputs"] = output

        handle = self.base_model.get_decoder().register_forward_hook(keep)
        try:
            with torch.inference_mode():
                whole = self.base_model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{cache_argument(self.base_model): past_key_values},
                    **options,
                )
        finally:
            handle.remove()
        outputs = kept["outputs"]
        values = (outputs, whole.logits, outputs[0]) if output_orig else (outputs, outputs[0])
        return ForwardResult(values, whole)
