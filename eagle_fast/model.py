"""`EaModel`: a stock causal LM and an EAGLE head, decoding together.

Signatures of the methods that SafeAILab/EAGLE has are supersets of its own. What is stricter: output ends at the first
stop token and never passes `max_new_tokens`, `max_length` is usable to its last token, and bad input is a ValueError
before anything runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.calls import CallsMixin
from eagle_fast.config import TreeConfig
from eagle_fast.decoding.adapt import EachInTurn, Experience
from eagle_fast.decoding.memory import check_memory
from eagle_fast.decoding.request import Request
from eagle_fast.decoding.states import IdleStates
from eagle_fast.decoding.validate import check_adaptive, check_positive
from eagle_fast.head import DraftHead
from eagle_fast.hf_generate import HFGenerateMixin
from eagle_fast.hf_model import HFModelMixin
from eagle_fast.loading import (
    HEAD_OPTIONS,
    HUB_OPTIONS,
    TOKENIZER_OPTIONS,
    check_head_arguments,
    check_pair,
    known_path,
    load_head,
    load_target,
    load_tokenizer,
    modern_options,
    names_options,
    runs_in_int8,
)
from eagle_fast.loading_auto import load_cut_by_itself
from eagle_fast.loading_ranks import load_cut_target
from eagle_fast.options import option_names, refuse_unknown
from eagle_fast.parts import PartsMixin
from eagle_fast.target.devices import resolve_ranks
from eagle_fast.target.packing import Bits
from eagle_fast.target.placement import resolve_device, warn_if_slow
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.turns import own_precision
from eagle_fast.text import TextMixin


class EaModel(CallsMixin, TextMixin, PartsMixin, HFGenerateMixin, HFModelMixin, nn.Module):
    """Speculative decoding of `base_model` with `ea_layer`; `base_model` itself stays usable and unchanged.

    base_model: any stock causal LM whose attention goes through transformers' AttentionInterface, on one device or
    several. It decodes in eval mode here whatever its own mode is.
    ea_layer: the draft head, on any device. Raises UnsupportedModel, with the reason, for other models.
    device_map: where base_model lies, module by module with the embedding first; {"": device} on one device.
    adaptive: see from_pretrained; `adaptive` is what was decided.
    Calls may run interleaved and in several threads; they take turns to launch their rounds.
    Every call decodes base_model as it is then: adapters that were switched, added or removed, hooks, own forwards,
    replaced modules and tensors, weights edited in place; and so with base_model, ea_layer and tree that are replaced
    themselves. A call under way goes on with what it began with.
    """

    @own_precision()
    def __init__(
        self,
        base_model: PreTrainedModel,
        ea_layer: DraftHead,
        *,
        tree: TreeConfig | None = None,
        name: str = "",
        adaptive: bool | None = None,
        **options,
    ):
        refuse_unknown(type(self).__name__, options, option_names(EaModel.__init__))
        check_pair(base_model, ea_layer, tree, name)
        super().__init__()
        self.base_model, self.ea_layer = base_model, ea_layer
        self._adaptive = check_adaptive(adaptive, tree)
        self.tree = tree or TreeConfig()
        self.target = self._new_target()
        self._name = os.fspath(name or "") or getattr(base_model, "name_or_path", "")
        self._tokenizer: Any = None
        self._tokenizer_options: dict[str, Any] = {}
        self.states = IdleStates(self.target, ea_layer, self.tree)
        self.experience = Experience(ea_layer.config.acceptance)
        if cut_of(base_model) is None:
            warn_if_slow(base_model)
        self._warn_if_timing_decides()
        self._lend_generate()

    @classmethod
    @names_options
    @own_precision()
    def from_pretrained(
        cls,
        use_eagle3: bool | None = None,
        base_model_path: str | os.PathLike | PreTrainedModel | None = None,
        ea_model_path: str | os.PathLike | None = None,
        total_token: int = 60,
        depth: int = 7,
        top_k: int = 10,
        threshold: float = 1.0,
        *,
        adaptive: bool | None = None,
        device_map=None,
        max_memory: dict | None = None,
        draft_device=None,
        ea_revision: str | None = None,
        draft_int8: bool | None = None,
        target_bits: int | None = None,
        lm_head_bits: int | None = None,
        tensor_parallel: bool | int | list | None = None,
        **kwargs,
    ) -> EaModel:
        """Load a target and a head from the hub or from folders.

        use_eagle3 None detects the kind of head from its tensors; False beside an EAGLE-3 head is a warning, True
        beside an older one an error.
        total_token, depth, top_k: see TreeConfig. adaptive: None and True, the most that the tree of a round may have:
        each round has the one that pays best by measured times and acceptance, or none; False: they are held fixed.
        None is False where `exactness` is "rounding" in 16 bits: there True lets timing decide the text, with a
        warning. total_token=-1 is adaptive up to the engine's own limits.
        draft_int8: the head's weights in int8, which slightly changes how much is accepted, never the text; None: on
        a GPU of compute capability 8.0 or newer where the target runs in 16 bits.
        target_bits: 8 or 4: the weights of the target's layers are rounded to so many bits while they are loaded, from
        a checkpoint of 16 or 32. base_model is the rounded model then, and the text its own.
        lm_head_bits: 8: the same of lm_head and embedding, of any checkpoint that has them in 16 or 32 bits and whose
        layers are plain, packed or rounded.
        base_model_path may be a loaded model. threshold is accepted for SafeAILab/EAGLE's sake and changes nothing.
        device_map: "auto" (one GPU if the pair fits on one, else tensor_parallel where that is possible, else layer by
        layer), "balanced", "balanced_low_0", "sequential" with max_memory as in transformers, a device, or a dict of
        module names; draft_device: the head's, by default the lm_head's.
        tensor_parallel: every layer is cut over several GPUs, which work on it together: True for all GPUs, their
        number, or a list of them, in place of device_map; False: never, whatever device_map is. base_model is then a
        skeleton without weights, whose generate is that of this model. See docs/multi-gpu.md for what can be cut.
        feature_layers, norm_before_residual, norm_output, rope_theta, rope_interleaved override what the head's config
        says; everything else (dtype or torch_dtype, quantization_config, revision, token, ...) goes to the
        from_pretrained of transformers. Raises ValueError for what does not fit together, TypeError for unknown names.
        """
        kwargs = modern_options(kwargs)
        head_path = known_path("ea_model_path", ea_model_path)
        tree = TreeConfig(total_token, depth, top_k)
        check_adaptive(adaptive, tree)
        head_options = {key: kwargs.pop(key) for key in HEAD_OPTIONS if key in kwargs}
        head_options |= {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        check_head_arguments(head_path, threshold, use_eagle3, head_options)
        there = None if draft_device is None else resolve_device(draft_device, "draft_device")
        ranks, automatic = resolve_ranks(tensor_parallel), isinstance(device_map, str) and device_map == "auto"
        bits, base_model = Bits(target_bits, lm_head_bits), None
        beside = {"device_map": None if automatic else device_map, "max_memory": max_memory}
        beside |= {"draft_device": draft_device}
        if ranks is not None:
            base_model = load_cut_target(base_model_path, ranks, kwargs, beside, bits)
        elif tensor_parallel is None and automatic:
            base_model = load_cut_by_itself(base_model_path, kwargs, beside, bits)
        if base_model is None:
            base_model = load_target(base_model_path, device_map, kwargs, max_memory, *bits)
        head = load_head(
            head_path, base_model, use_eagle3=use_eagle3, revision=ea_revision, options=head_options, device=there
        )
        if runs_in_int8(head, draft_int8):
            head.quantize()
        model = cls(base_model, head, tree=tree, adaptive=adaptive)
        model._tokenizer_options = {key: kwargs[key] for key in TOKENIZER_OPTIONS if key in kwargs}
        return model

    # -- tokenizer -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The target's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if not self._name:
                raise ValueError(
                    "the base model came without a name: load its tokenizer yourself, and pass it to generate as "
                    "tokenizer=, or its stop ids as eos_token_id= in place of is_llama3"
                )
            self._tokenizer = load_tokenizer(self._name, self._tokenizer_options)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value) -> None:
        self._tokenizer = value

    def get_tokenizer(self):
        """The target's tokenizer."""
        return self.tokenizer

    # -- decoding --------------------------------------------------------------------------------------------------

    def eagenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ):
        """Decode with speculation. input_ids [B, L], with attention_mask= where prompts differ in length.

        Returns ids [B, L + longest], padded behind; with log=True (ids, new tokens over all sequences, index of the
        last round); with return_dict_in_generate=True a `Generation`. options:
            attention_mask [B, L]; padding may stand on either side
            seed            an integer, or one for each sequence; None draws from torch's default generator
            min_p           see SamplingParams
            shared_noise    False: at temperature > 0 the draft ranks without the target's noise (the text is the same)
            eos_token_id    stop ids instead of those of the model's generation_config; [] for none
            logits_processor, stopping_criteria   lists as for transformers' generate; they run on the host, see one
                            sequence at a time, without padding, and with a state of its own for each
            return_dict_in_generate   True: a `Generation`, which holds the ids and how the rounds went
            output_scores, output_logits   with it, True: also what each token was chosen from, and the target's own
                            logits, [B, V] for each new token as in transformers; see `Generation`
            output_logprobs with it, True: also each token's log-probability [B, longest] by the target's own logits,
                            before processors, temperature and warpers; needs little memory, and no time to speak of
            reuse_cache     True, in every call of a conversation: prefill only what follows the longest prefix that
                            these prompts share with those and the texts of an earlier call of as many sequences, by the
                            same kind of method (with the head or without). `Statistics.reused_tokens` says how much
                            that was. What was edited in place since, through anything but `.data`, is prefilled anew;
                            a hook that computes something else than it did is not noticed
            use_distributed accepted for older scripts and without effect: a model over several GPUs needs no option
        A text ends before max_new_tokens at max_length, or where a model with learned positions has no more of them.
        Raises ValueError for arguments that cannot be meant, NaNLogitsError.
        """
        self._refuse_unknown("eagenerate", options)
        return self._collect(True, log, input_ids, 
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, max_length=max_length,
            is_llama3=is_llama3, **options,
        )  # fmt: skip

    def naivegenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ):
        """The same without speculation, one token per round: the same text for the same seed. See `eagenerate`."""
        self._refuse_unknown("naivegenerate", options)
        return self._collect(False, log, input_ids, 
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, max_length=max_length,
            is_llama3=is_llama3, **options,
        )  # fmt: skip

    def ea_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ) -> Iterator[torch.Tensor]:
        """`eagenerate` as a generator: yields the ids so far after each round. It may be closed early.

        With return_dict_in_generate=True it yields a `Generation` of what there is so far, with the statistics, scores,
        logits and log-probabilities that were asked for.
        """
        self._refuse_unknown("ea_generate", options)
        return self._stream(True, log, input_ids, 
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, max_length=max_length,
            is_llama3=is_llama3, **options,
        )  # fmt: skip

    def naive_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ) -> Iterator[torch.Tensor]:
        """`naivegenerate` as a generator: yields the ids so far after each token. See `ea_generate`."""
        self._refuse_unknown("naive_generate", options)
        return self._stream(False, log, input_ids, 
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, max_length=max_length,
            is_llama3=is_llama3, **options,
        )  # fmt: skip

    def warmup(self, batch: int = 1, max_length: int = 2048) -> None:
        """Before the clock: compile kernels and capture graphs for `batch` sequences of up to `max_length` tokens, and
        time the rounds of every tree that they may have."""
        batch, max_length = check_positive(batch=batch, max_length=max_length)
        self._follow()
        for speculative in (True, False):
            check_memory(self.states, speculative, batch, max_length, {"batch": batch, "max_length": max_length})
            paths = [tree.max_path for tree in self.trees(batch)] if speculative else [1]
            budget = EachInTurn.ROUNDS * sum(paths)
            for _ in self._rounds(speculative, Request([[0, 0]] * batch, [budget] * batch), max_length, EachInTurn):
                pass

    # -- as a module -------------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        """Conversions that change nothing, as `.to("cuda:0")` of a model that is there, pass; others are errors."""
        weight = self.ea_layer.embedding
        moved = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
        if (moved.device, moved.dtype) != (weight.device, weight.dtype):
            raise ValueError(
                f"the model is loaded in {weight.dtype} on {weight.device}: pass dtype= and device_map= to "
                "from_pretrained instead of converting it"
            )
        return self

    def __reduce_ex__(self, protocol):
        """What copy, deepcopy, pickle and torch.save ask for."""
        raise TypeError(
            "an EaModel is neither copied nor pickled, with its graphs and buffers: keep base_model and ea_layer, by "
            "base_model.save_pretrained and the head's own folder, and make another EaModel of them; a second "
            "EaModel(base_model, ea_layer) shares their weights"
        )
