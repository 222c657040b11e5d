"""transformers' `generate` with our rounds inside.

`EaModel.generate(...)` has the meaning of `PreTrainedModel.generate`; `EaModel.custom_generate` is the callable for
`hf_model.generate(..., custom_generate=...)`. transformers prepares inputs, processors and criteria either way.
"""

from __future__ import annotations

import copy
import sys
from collections import abc
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from eagle_fast.decoding.generation import Decoding, Generation
from eagle_fast.decoding.processors import split_warpers
from eagle_fast.decoding.request import make_request, pad_id, padded
from eagle_fast.decoding.validate import check_hooks, check_prompts, id_list
from eagle_fast.target import Target
from eagle_fast.target.anatomy import generating_model
from eagle_fast.target.interface import CACHE_ARGUMENTS

RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
NO_TEXT = ("pixel_values", "pixel_values_videos", "input_features", "input_values")  # images, videos and sounds
NOT_TAKEN = (
    *("assistant_model", "custom_generate", "inputs_embeds", "position_ids", "token_type_ids"),
    *CACHE_ARGUMENTS,
    *NO_TEXT,
)
PREPARED = ("attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache", *CACHE_ARGUMENTS)


class HFGenerateMixin:
    """The part of `EaModel` that speaks transformers' generation interface."""

    base_model: PreTrainedModel
    target: Target
    tokenizer: Any
    _follow: Callable[[], None]
    _rounds: Callable[..., abc.Generator[Decoding, None, None]]

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer=None,
        tokenizer=None,
        seed: int | list[int] | None = None,
        shared_noise: bool = True,
        reuse_cache: bool = False,
        **kwargs,
    ):
        """Like `PreTrainedModel.generate` for greedy search and sampling; also takes `seed`, `shared_noise` and
        `reuse_cache`, see `eagenerate`.

        Returns ids [B, L + longest], or a `Generation` with return_dict_in_generate=True, on the model's device. A
        sequence that has ended goes on as padding, also where a stopping criterion has ended it.
        Processors and criteria see what transformers shows them, but one sequence at a time, and not after its end.
        A streamer gets the prompt, then one call for every step with a token of each sequence. stop_strings use
        tokenizer=, by default the target's own. Beam search, assisted decoding, recorded scores and inputs other than
        token ids are ValueErrors. As in transformers, sampling is limited to the best 50 tokens unless top_k= says
        otherwise.
        """
        taken = [name for name in NOT_TAKEN if not _says_nothing(kwargs.get(name))]
        if taken:
            raise ValueError(f"{', '.join(taken)}: not possible with speculative decoding; call base_model.generate")
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError("cache_implementation='paged' would bypass eagle_fast: leave it out")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"streamer is a {type(streamer).__name__}: pass an object with put() and end()")
        self._follow()
        given = inputs if inputs is not None else kwargs.get("input_ids")
        if given is not None:
            check_prompts(given, kwargs.get("attention_mask"), self.target.vocab_size)
        kwargs["stopping_criteria"], generation_config = self._stop_strings(generation_config, tokenizer, kwargs)
        device = self.target.device
        kwargs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        stock_generate: Any = self.base_model.generate
        return stock_generate(
            None if inputs is None else inputs.to(device),
            generation_config,
            custom_generate=self.custom_generate,
            ef_streamer=streamer,
            seed=seed,
            shared_noise=shared_noise,
            reuse_cache=reuse_cache,
            **kwargs,
        )

    def _stop_strings(self, config: GenerationConfig | None, tokenizer, kwargs: dict):
        """Stopping criteria that include the stop strings, and a config without: transformers does not hand the
        tokenizer on when there is a custom loop."""
        criteria = StoppingCriteriaList(check_hooks("stopping_criteria", kwargs.pop("stopping_criteria", None)))
        strings = kwargs.pop("stop_strings", None)
        if config is not None and config.stop_strings is not None:
            strings = strings or config.stop_strings
            config = copy.deepcopy(config)
            config.stop_strings = None
        if self.base_model.generation_config.stop_strings is not None:
            raise ValueError("stop_strings in base_model.generation_config: set them to None there, pass stop_strings=")
        if strings:
            tokenizer = tokenizer or self.tokenizer
            criteria.append(StopStringCriteria(tokenizer, strings))
        return criteria, config

    def custom_generate(
        self,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        seed=None,
        shared_noise=True,
        reuse_cache=False,
        ef_streamer=None,
        **model_kwargs,
    ):
        """transformers' custom decoding loop: `hf_model.generate(ids, custom_generate=ea_model.custom_generate)`.

        transformers 5 does not hand a streamer on to a callable: it is looked up in the calling frame, or passed as
        ef_streamer=. Nor does it hand on a tokenizer, so stop_strings work with `EaModel.generate` only.
        """
        if model not in (self.base_model, generating_model(self.base_model)):
            raise ValueError("this EaModel decodes its own base_model: call base_model.generate(...)")
        _check_supported(generation_config)
        _check_inputs(model_kwargs)
        self._follow()
        if ef_streamer is not None:
            ef_streamer.put(input_ids.cpu())
        streamer = _streamer_of_generate() if ef_streamer is None else ef_streamer
        processors, settings = split_warpers(logits_processor)
        length = input_ids.shape[1]
        longest = min(each.max_length for each in stopping_criteria if type(each) is MaxLengthCriteria)
        ends = [each.eos_token_id for each in stopping_criteria if type(each) is EosTokenCriteria]
        request, ids = make_request(
            self.target,
            input_ids,
            attention_mask=model_kwargs.get("attention_mask"),
            max_new_tokens=max(longest - length, 1),
            max_length=max(longest, length + 1),
            eos_token_id=[token for each in ends for token in id_list(each)],
            seed=seed,
            shared_noise=shared_noise,
            reuse_cache=reuse_cache,
            logits_processor=processors,
            stopping_criteria=[e for e in stopping_criteria if type(e) not in (EosTokenCriteria, MaxLengthCriteria)],
            show_padding=True,
            **(settings if generation_config.do_sample else {}),
        )
        pad = getattr(generation_config, "_pad_token_tensor", None)
        pad = pad_id(self.base_model) if pad is None else int(pad)
        steps = 0
        with closing(self._rounds(True, request)) as running:
            for decoding in running:
                if streamer is not None:
                    steps = _stream(streamer, decoding, steps, pad)
        if streamer is not None:
            streamer.end()
        sequences = padded(ids, decoding.new_tokens, pad).to(input_ids.device)
        return Generation(sequences, decoding.statistics) if generation_config.return_dict_in_generate else sequences


def _check_supported(generation_config) -> None:
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value} (num_beams={generation_config.num_beams}): eagle_fast decodes greedily or by sampling; "
            "call base_model.generate"
        )
    wanted = [name for name in RECORDS if getattr(generation_config, name, None)]
    if wanted:
        raise ValueError(f"{', '.join(wanted)}: not recorded during speculative decoding; call base_model.generate")


def _says_nothing(value: Any) -> bool:
    """Whether an input is as good as none: what wrappers of several modalities get with text alone."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.any()  # token types of text
    return value is None or value == {}


def _check_inputs(model_kwargs: dict) -> None:
    """Inputs of the model that would change its text, and that rounds don't have."""
    names = [name for name, value in model_kwargs.items() if name not in PREPARED and not _says_nothing(value)]
    for name in CACHE_ARGUMENTS:
        if model_kwargs.get(name) is not None and model_kwargs[name].get_seq_length():
            names.append(name)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is not None:  # transformers passes its own along, which count the tokens, and drops a mask of ones
        mask = torch.ones_like(positions) if mask is None else mask
        if ((positions != mask.cumsum(-1) - 1) & (mask != 0)).any():
            names.append("position_ids")
    if names:
        raise ValueError(f"{', '.join(names)}: not possible with speculative decoding; call base_model.generate")


def _streamer_of_generate():
    """The streamer that the running `generate` of transformers was called with; it has the prompt already."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not (frame.f_code.co_name == "generate" and "streamer" in frame.f_locals):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["streamer"]


def _stream(streamer, decoding: Decoding, steps: int, pad: int) -> int:
    """Hand over the steps that all sequences have made; returns how many that are. Ended sequences go on as padding."""
    texts = decoding.new_tokens
    made = [len(text) for text, done in zip(texts, decoding.done, strict=True) if not done]
    ready = min(made) if made else max(len(text) for text in texts)
    for step in range(steps, ready):
        streamer.put(torch.tensor([text[step] if step < len(text) else pad for text in texts]))
    return max(steps, ready)
