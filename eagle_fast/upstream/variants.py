"""`EaModel` with the signatures and results of EAGLE's branches and of forks. B sequences."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.loading import known_path, load_head
from eagle_fast.messages import warn_user
from eagle_fast.model import EaModel

FIXED_TREE = "tree_choices is not used: trees grow by the head's scores, as large as total_token, depth and top_k say"


class MaskByPosition(EaModel):
    """Of EAGLE's branches for batches: attention_mask may be the second argument by position. Such a call returns lists
    of token ids without padding; with log=True (lists, new tokens, last rounds, seconds), one of each for a sequence.
    """

    lists = False  # whether all calls return lists

    def eagenerate(self, input_ids, *args, **options):
        return self._answer(True, super().eagenerate, input_ids, args, options)

    def naivegenerate(self, input_ids, *args, **options):
        return self._answer(False, super().naivegenerate, input_ids, args, options)

    def _answer(self, speculative: bool, method, input_ids, args: tuple, options: dict[str, Any]):
        if options.pop("tree_choices", None) is not None:
            warn_user(FIXED_TREE)
        options.pop("cpu_only", None)  # of its clock
        by_position = bool(args) and (args[0] is None or getattr(args[0], "ndim", 0) == 2)
        if not (by_position or self.lists):
            return method(input_ids, *args, **options)
        if by_position:
            options["attention_mask"], args = args[0], args[1:]
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "max_length")
        options.update(zip(names, args, strict=False))
        return self._lists(speculative, input_ids, options)

    def _lists(self, speculative: bool, input_ids: torch.Tensor, options: dict[str, Any]):
        log, mask = options.pop("log", False), options.get("attention_mask")
        prompts = [
            row.tolist() if mask is None else row[kept.bool().to(row.device)].tolist()
            for row, kept in zip(input_ids, input_ids if mask is None else mask, strict=True)
        ]
        method: Any = self.ea_generate if speculative else self.naive_generate
        stream = method(input_ids, return_dict_in_generate=True, **options)
        began, seconds, rounds, counts, out = time.time(), [0.0] * len(prompts), [0] * len(prompts), None, None
        for out in stream:
            grown = out.statistics.new_tokens
            for row, count in enumerate(grown):
                if counts is None or count > counts[row]:
                    seconds[row], rounds[row] = time.time() - began, rounds[row] + 1
            counts = list(grown)
        assert out is not None
        assert counts is not None
        new = out.sequences[:, input_ids.shape[1] :].tolist()
        texts = [prompt + text[:count] for prompt, text, count in zip(prompts, new, counts, strict=True)]
        return (texts, counts, [each - 1 for each in rounds], seconds) if log else texts


class Lists(MaskByPosition):
    """Of eagle.modelbsne1."""

    lists = True


class AcceptLengths(EaModel):
    """Of HASS: with log=True a fourth value, how many drafted tokens each round accepted. For one sequence."""

    bonus = 0  # of a round's tokens, how many more are counted

    def eagenerate(self, input_ids, *args, **options):
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "max_length", "log", "is_llama3")
        options.update(zip(names, args, strict=False))
        if not options.pop("log", False):
            return super().eagenerate(input_ids, **options)
        if len(input_ids) != 1:
            raise ValueError(f"log=True with accept lengths, and {len(input_ids)} sequences: pass one")
        seen = [input_ids]
        for ids in self.ea_generate(input_ids, **options):
            seen.append(ids)
        lengths = [ids.shape[1] for ids in seen]
        accepted = [after - before - 1 + self.bonus for before, after in pairwise(lengths)]
        return seen[-1], lengths[-1] - lengths[0], len(accepted) - 1 + self.bonus, accepted


class OfSpecBench(AcceptLengths):
    """Of Spec-Bench: rounds in place of the last one's index, and all tokens that each round gave."""

    bonus = 1


class EAGLE:
    """Of eagle.modeling_eagle: a loaded model and the folder of a head."""

    def __init__(self, base_model: PreTrainedModel, ea_model_path: str, use_tree_attn: bool = True):
        if not use_tree_attn:
            raise ValueError(
                "use_tree_attn=False: for a chain, make EaModel.from_pretrained(..., top_k=1) in its place"
            )
        self.model = Lists(base_model, load_head(known_path("ea_model_path", ea_model_path), base_model))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        **options,
    ) -> list:
        """Token ids of prompts and answers, without padding; of a single prompt not in a list of texts."""
        options.pop("token_type_ids", None)
        texts = self.model.eagenerate(
            input_ids, attention_mask, temperature, top_p, top_k, max_new_tokens, max_length, **options
        )
        return texts if len(texts) > 1 else texts[0]
