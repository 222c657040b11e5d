"""transformers' `generate` with our rounds inside.

`EaModel.generate(...)` has the meaning of `PreTrainedModel.generate`; `EaModel.custom_generate` is the callable for
`hf_model.generate(..., custom_generate=...)`. transformers prepares inputs, processors and criteria either way.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import abc
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from eagle_fast.config import whole_number
from eagle_fast.decoding.generation import Decoding
from eagle_fast.decoding.hooks import StopsComeOut
from eagle_fast.decoding.memory import check_memory
from eagle_fast.decoding.processors import split_warpers
from eagle_fast.decoding.records import NOT_RECORDED
from eagle_fast.decoding.request import make_request, pad_id, padded
from eagle_fast.decoding.states import IdleStates
from eagle_fast.decoding.validate import check_flags, check_hooks, check_prompts, id_list
from eagle_fast.inputs import OF_OTHER_MODES, is_no_text, refuse_inputs
from eagle_fast.messages import shown
from eagle_fast.stop_strings import check_stop_strings, stop_criterion
from eagle_fast.target import Target
from eagle_fast.target.anatomy import generating_model
from eagle_fast.target.interface import CACHE_ARGUMENTS

RECORDS = ("output_scores", "output_logits", *NOT_RECORDED)  # of a generation config
MAX_NGRAM = 2**20
PREPARED = (
    *("attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache"),
    *CACHE_ARGUMENTS,
    *NOT_RECORDED,  # make_request says more
)


class HFGenerateMixin:
    """The part of `EaModel` that speaks transformers' generation interface."""

    base_model: PreTrainedModel
    target: Target
    states: IdleStates
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
        output_logprobs: bool = False,
        reuse_cache: bool = False,
        **kwargs,
    ):
        """Like `PreTrainedModel.generate` for greedy search and sampling; also takes `seed`, `shared_noise`,
        `output_logprobs` and `reuse_cache`, see `eagenerate`.

        Returns ids [B, L + longest], or a `Generation` with return_dict_in_generate=True, on the model's device. A
        sequence that has ended goes on as padding, also where a stopping criterion has ended it. output_scores and
        output_logits give the tensors of transformers up to each sequence's end, and `Generation` says what behind it;
        without return_dict_in_generate=True they are a ValueError.
        Processors and criteria see what transformers shows them, but one sequence at a time, and not after its end.
        A streamer gets the prompt, then one call for every step with a token of each sequence. stop_strings use
        tokenizer=, by default the target's own. Beam search, assisted decoding, attentions, hidden states and inputs
        other than token ids are ValueErrors. As in transformers, sampling is limited to the best 50 tokens unless
        top_k= says otherwise.
        """
        refuse_inputs(
            [name for name, value in kwargs.items() if is_no_text(name) and not _says_nothing(value)], self.base_model
        )
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError("cache_implementation='paged' would bypass eagle_fast: leave it out")
        _check_generate(generation_config, streamer, kwargs, self.base_model.generation_config)
        self._follow()
        given = inputs if inputs is not None else kwargs.get("input_ids")
        if given is not None:
            check_prompts(given, kwargs.get("attention_mask"), self.target.vocab_size)
        kwargs["stopping_criteria"], generation_config = self._stop_strings(generation_config, tokenizer, kwargs)
        device = self.target.device
        entered = False

        @functools.wraps(self.custom_generate)  # whose arguments transformers looks up
        def loop(*args, **options):
            nonlocal entered
            entered = True
            return self.custom_generate(*args, **options)

        stock_generate = _stock_generate(self.base_model)
        try:
            there = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()
            }
            return stock_generate(
                None if inputs is None else inputs.to(device),
                generation_config,
                custom_generate=loop,
                ef_streamer=streamer,
                seed=seed,
                shared_noise=shared_noise,
                output_logprobs=output_logprobs,
                reuse_cache=reuse_cache,
                **there,
            )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            options = kwargs if generation_config is None else kwargs | {"generation_config": generation_config}
            clear = isinstance(error, ValueError) and any(name in str(error) for name in options)
            if entered or clear or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(_cannot_use(error, options)) from error

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
        if strings is not None:
            check_stop_strings(strings)
            criteria.append(stop_criterion(self.tokenizer if tokenizer is None else tokenizer, strings))
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
        output_logprobs=False,
        reuse_cache=False,
        ef_streamer=None,
        **model_kwargs,
    ):
        """transformers' custom decoding loop: `hf_model.generate(ids, custom_generate=ea_model.custom_generate)`.

        transformers 5 does not hand a streamer on to a callable: it is looked up in the calling frame, or passed as
        ef_streamer=. Nor does it hand on a tokenizer, so stop_strings work with `EaModel.generate` only.
        """
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(
                f"generation_config is a {type(generation_config).__name__}: transformers calls custom_generate "
                "itself, as in base_model.generate(input_ids, custom_generate=model.custom_generate)"
            )
        if not any(model is each for each in (self.base_model, generating_model(self.base_model))):
            raise ValueError("this EaModel decodes its own base_model: call base_model.generate(...)")
        as_dict = check_flags(return_dict_in_generate=generation_config.return_dict_in_generate)[0]
        _check_supported(generation_config)
        _check_inputs(model_kwargs, self.base_model)
        self._follow()
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
            return_dict_in_generate=as_dict,
            output_logprobs=output_logprobs,
            **{name: getattr(generation_config, name, False) for name in RECORDS},
            **(settings if generation_config.do_sample else {}),  # type: ignore[arg-type]  # of the sampler only
        )
        lengths = {"max_new_tokens": longest - length, "max_length": longest}
        check_memory(self.states, True, len(request.prompts), request.longest, lengths)
        pad = getattr(generation_config, "_pad_token_tensor", None)
        pad = pad_id(self.base_model) if pad is None else int(pad)
        if ef_streamer is not None:
            ef_streamer.put(input_ids.cpu())
        steps = 0
        with StopsComeOut(), closing(self._rounds(True, request)) as running:
            for decoding in running:
                if streamer is not None:
                    steps = _stream(streamer, decoding, steps, pad)
        if streamer is not None:
            streamer.end()
        sequences = padded(ids, decoding.new_tokens, pad).to(input_ids.device)
        return decoding.result(sequences, pad) if as_dict else sequences


def _stock_generate(base_model: Any) -> Callable:
    """What the model's class has: on the model itself there may be one that calls ours."""
    generate = getattr(type(base_model), "generate", None)
    return base_model.generate if generate is None else functools.partial(generate, base_model)


def _check_generate(config, streamer, options: dict[str, Any], own: GenerationConfig) -> None:
    """What transformers would stumble over, or use without a look. own: base_model's config."""
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config is a {type(config).__name__}: pass a GenerationConfig, or its settings as arguments"
        )
    for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        size = whole_number(options.get(name, getattr(config, name, None)))
        if size is not None and size > MAX_NGRAM:  # transformers loops over it
            raise ValueError(f"{name}={shown(size)}: no text repeats so many tokens; leave it out")
    healing = [options.get("token_healing"), *(getattr(each, "token_healing", None) for each in (config, own))]
    if next((each for each in healing if each is not None), False):
        raise ValueError(
            "token_healing: transformers keeps the tokenizer from loops of others; pass the healed prompt, "
            "base_model.heal_tokens(input_ids, tokenizer)"
        )
    if isinstance(streamer, type):
        raise ValueError(f"streamer is the class {streamer.__name__}: pass an object of it, {streamer.__name__}(...)")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer is a {type(streamer).__name__}: pass an object with put() and end()")


def _cannot_use(error: Exception, options: dict) -> str:
    """What transformers said of these options of `generate` before anything was decoded."""
    given = ", ".join(
        f"{name}={shown(value)}" for name, value in options.items() if name not in ("input_ids", "inputs")
    )
    return f"transformers' generate cannot use {given}: {type(error).__name__}: {error}"


def _check_supported(generation_config) -> None:
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        settings = {name: getattr(generation_config, name, None) for name in OF_OTHER_MODES}
        causes = ", ".join(
            f"{name}={shown(value)}"
            for name, value in settings.items()
            if (value != 1 if name == "num_beams" else value is not None)
        )
        raise ValueError(
            f"{mode.value} ({causes}): eagle_fast decodes greedily or by sampling; call base_model.generate"
        )


def _says_nothing(value: Any) -> bool:
    """Whether an input is as good as none: what wrappers of several modalities get with text alone."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided:
            return False
        return not value.is_floating_point() and not value.any()  # token types of text
    return value is None or value == {}


def _check_inputs(model_kwargs: dict, base_model: Any) -> None:
    """Inputs of the model that would change its text, and that rounds don't have."""
    names = [name for name, value in model_kwargs.items() if name not in PREPARED and not _says_nothing(value)]
    for name in CACHE_ARGUMENTS:
        cache = model_kwargs.get(name)
        if cache is not None and (not isinstance(cache, Cache) or cache.get_seq_length()):
            names.append(name)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is not None and not isinstance(positions, torch.Tensor):
        names.append("position_ids")
    elif positions is not None:  # transformers passes its own along, which count the tokens, and drops a mask of ones
        mask = torch.ones_like(positions) if mask is None else mask
        if ((positions != mask.cumsum(-1) - 1) & (mask != 0)).any():
            names.append("position_ids")
    refuse_inputs(names, base_model)


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
        streamer.put(torch.tensor([text[step] if step < len(text) else pad for text in texts], device="cpu"))
    return max(steps, ready)
