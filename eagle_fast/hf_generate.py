"""transformers' `generate` with our rounds inside.

`EaModel.generate(...)` has the meaning of `PreTrainedModel.generate`; `EaModel.custom_generate` is the callable for
`hf_model.generate(..., custom_generate=...)`. transformers prepares inputs, processors and criteria either way.
"""

from __future__ import annotations

import sys

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from eagle_fast.generation import Generation
from eagle_fast.processors import split_warpers

UNSUPPORTED_FLAGS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class HFGenerateMixin:
    """The part of `EaModel` that speaks transformers' generation interface."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer=None,
        seed: int | list[int] | None = None,
        shared_noise: bool = True,
        **kwargs,
    ):
        """Like `PreTrainedModel.generate` for greedy search and sampling; also takes `seed` and `shared_noise`.

        Returns ids [B, L + longest], or a `Generation` with return_dict_in_generate=True. Beam search, assisted
        decoding and recorded scores are ValueErrors.
        """
        return self.base_model.generate(  # type: ignore[attr-defined]
            inputs,
            generation_config,
            custom_generate=self.custom_generate,
            ef_streamer=streamer,
            seed=seed,
            shared_noise=shared_noise,
            **kwargs,
        )

    @torch.no_grad()
    def custom_generate(
        self,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        seed=None,
        shared_noise=True,
        ef_streamer=None,
        **model_kwargs,
    ):
        """transformers' custom decoding loop: `hf_model.generate(ids, custom_generate=ea_model.custom_generate)`.

        transformers 5 does not hand a streamer on to a callable: it is looked up in the calling frame, or passed as
        ef_streamer=.
        """
        if model is not self.base_model:  # type: ignore[attr-defined]
            raise ValueError("this EaModel decodes its own base_model: call base_model.generate(...)")
        _check_supported(generation_config)
        streamer = ef_streamer
        if streamer is None:
            streamer = sys._getframe(1).f_locals.get("streamer")
        elif hasattr(streamer, "put"):
            streamer.put(input_ids.cpu())
        processors, settings = split_warpers(logits_processor)
        if not generation_config.do_sample:
            settings = {"temperature": 0.0}
        criteria = [each for each in stopping_criteria if not isinstance(each, (EosTokenCriteria, MaxLengthCriteria))]
        eos = getattr(generation_config, "_eos_token_tensor", None)
        prompts, budgets, ids, sampling, rules = self._prepare(  # type: ignore[attr-defined]
            input_ids,
            attention_mask=model_kwargs.get("attention_mask"),
            max_new_tokens=max(generation_config.max_length - input_ids.shape[1], 1),
            max_length=generation_config.max_length,
            eos_token_id=[] if eos is None else eos,
            seed=seed,
            shared_noise=shared_noise,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(criteria),
            **settings,
        )
        texts: list[list[int]] = [[] for _ in prompts]
        for new, statistics in self._rounds(True, prompts, budgets, sampling, rules):  # type: ignore[attr-defined]  # noqa: B007
            for text, tokens in zip(texts, new, strict=True):
                text += tokens
            if streamer is not None:
                streamer.put(torch.tensor(new[0]) if len(new) == 1 else torch.tensor([row[-1] for row in new]))
        if streamer is not None:
            streamer.end()
        sequences = self._pad(ids, texts, _pad_of(generation_config)).to(input_ids.device)  # type: ignore[attr-defined]
        return Generation(sequences, statistics) if generation_config.return_dict_in_generate else sequences


def _pad_of(generation_config) -> int | None:
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return None if pad is None else int(pad)


def _check_supported(generation_config) -> None:
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams}: eagle_fast decodes greedily or by sampling, not with beams"
        )
    wanted = [name for name in UNSUPPORTED_FLAGS if getattr(generation_config, name, None)]
    if wanted:
        raise ValueError(f"{', '.join(wanted)}: not recorded during speculative decoding; call base_model.generate")
