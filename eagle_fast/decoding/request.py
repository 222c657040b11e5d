"""What a call asks for, checked, and how its result is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from eagle_fast.config import SamplingParams
from eagle_fast.decoding.records import Wanted, check_wanted
from eagle_fast.decoding.validate import (
    check_flags,
    check_hooks,
    check_prompts,
    check_seeds,
    check_stop_ids,
    id_list,
    token_budgets,
)
from eagle_fast.messages import shown, warn_user
from eagle_fast.target import Target
from eagle_fast.target.anatomy import token_settings


@dataclass(frozen=True)
class Request:
    """A call after its checks. B prompts without padding, each with the most new tokens that it may get.

    padding: ids that processors and criteria see before each prompt, where transformers' loop would show them.
    reuse_cache: take what an earlier call left in its caches, and leave it there for the next.
    """

    prompts: list[list[int]]
    budgets: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    shared_noise: bool = True
    stop_ids: frozenset[int] = frozenset()
    processors: LogitsProcessorList | None = None
    criteria: StoppingCriteriaList | None = None
    padding: list[list[int]] | None = None
    record: Wanted = field(default_factory=Wanted)
    reuse_cache: bool = False

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can reach."""
        return max(len(prompt) + budget for prompt, budget in zip(self.prompts, self.budgets, strict=True))


def make_request(
    target: Target,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: float = 0,
    min_p: float = 0.0,
    seed=None,
    max_new_tokens: int = 512,
    max_length: int = 2048,
    shared_noise: bool = True,
    eos_token_id=None,
    logits_processor=None,
    stopping_criteria=None,
    show_padding: bool = False,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    output_logits: bool = False,
    output_logprobs: bool = False,
    output_attentions: bool = False,
    output_hidden_states: bool = False,
    reuse_cache: bool = False,
) -> tuple[Request, torch.Tensor]:
    """Check everything that a call brings: the request, and input_ids on the CPU. Raises ValueError."""
    ids, prompts, padding = check_prompts(input_ids, attention_mask, target.vocab_size)
    request = Request(
        prompts=prompts,
        budgets=token_budgets(prompts, max_new_tokens, max_length, target.max_positions),
        sampling=SamplingParams(temperature, top_p, top_k, min_p, check_seeds(seed, len(prompts))),  # type: ignore[arg-type]  # top_k: 50.0 is 50
        shared_noise=check_flags(shared_noise=shared_noise)[0],
        stop_ids=check_stop_ids(eos_token_id, target.vocab_size),
        processors=LogitsProcessorList(check_hooks("logits_processor", logits_processor)),
        criteria=StoppingCriteriaList(check_hooks("stopping_criteria", stopping_criteria)),
        padding=padding if show_padding else None,
        record=check_wanted(
            return_dict_in_generate,
            input_ids.device,
            output_scores=output_scores,
            output_logits=output_logits,
            output_logprobs=output_logprobs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        ),
        reuse_cache=check_flags(reuse_cache=reuse_cache)[0],
    )
    return request, ids


def special_ids(model: PreTrainedModel, *names: str) -> list[int]:
    """The first of a model's special ids, as "eos_token_id", that its generation config or its config has. Raises
    ValueError for what is no id."""
    for name in names:
        for setting in token_settings(model, name):
            try:
                ids = id_list(setting)
            except ValueError as error:
                raise ValueError(f"{name}={shown(setting)} in base_model's (generation) config: {error}") from None
            if ids:
                return ids
    return []


def pad_id(model: PreTrainedModel) -> int:
    """What a model's texts are padded with: its pad token, else its first stop token, else 0. Raises ValueError."""
    found = (special_ids(model, "pad_token_id", "eos_token_id") or [0])[0]
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"pad_token_id={shown(found)} of base_model's generation config: set it to a token id there")
    return found


def end_of_turn(tokenizer) -> list[int]:
    """The id of Llama 3's <|eot_id|>, if the tokenizer has it; says so if not, and goes on as SafeAILab/EAGLE does."""
    token = tokenizer.get_vocab().get("<|eot_id|>")
    if token is None:
        warn_user("is_llama3=True changes nothing: the tokenizer has no <|eot_id|>")
    return [] if token is None else [token]


def pad_left(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, longest] of prompts, padded in front."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device="cpu")
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def padded(ids: torch.Tensor, texts: list[list[int]], pad: int) -> torch.Tensor:
    """[B, L + longest text] on the CPU: prompts ids [B, L] as given, then the texts, padded behind."""
    longest = max(len(text) for text in texts)
    new = torch.full((len(texts), longest), pad, dtype=torch.long, device="cpu")
    for row, text in enumerate(texts):
        new[row, : len(text)] = torch.tensor(text, dtype=torch.long, device="cpu")
    return torch.cat([ids, new], 1)
