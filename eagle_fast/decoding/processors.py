"""Logits processors of transformers on a tree: each visited node sees exactly its own prefix.

The walk runs on the host and calls the processors once for every emitted token, with the text so far and in order:
the same calls that stock `generate` makes, so processors that keep a state (grammars, watermarks) work too. Rows of a
batch are processed one by one. Only generations with processors pay for this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from eagle_fast.decoding.round import Round
from eagle_fast.decoding.tree import Tree, Walked
from eagle_fast.decoding.validate import check_takes_two
from eagle_fast.messages import shown

_ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_NAMES = ("temperature", "top_k", "top_p", "min_p")
HookList = TypeVar("HookList", LogitsProcessorList, StoppingCriteriaList)


def split_warpers(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, dict[str, float]]:
    """(what must run on the host, settings of the sampler).

    A list's tail of temperature, top-k, top-p and min-p, in that order, is what our sampler does on the device. With
    any other order all of the list stays as it is.
    """
    settings: dict[str, float] = {"temperature": 1.0}
    tail, place = len(processors), len(_ORDER)
    while tail and 0 <= (earlier := _device_place(processors[tail - 1])) < place:
        tail, place = tail - 1, earlier
        settings[_NAMES[place]] = getattr(processors[tail], _NAMES[place])
    if any(isinstance(each, _ORDER) for each in processors[:tail]):
        return LogitsProcessorList(processors), {"temperature": 1.0}
    return LogitsProcessorList(processors[:tail]), settings


def _device_place(warper) -> int:
    """Place of a warper in `_ORDER`, -1 for what our sampler doesn't do."""
    if type(warper) not in _ORDER or getattr(warper, "filter_value", -math.inf) != -math.inf:
        return -1
    # top_p=0 keeps the best token; our sampler reads it as off
    if getattr(warper, "min_tokens_to_keep", 1) > 1 or getattr(warper, "top_p", 1.0) == 0:
        return -1
    return _ORDER.index(type(warper))


def copies_for_rows(hooks: HookList | None, batch: int) -> list[HookList] | None:
    """Processors or criteria for each sequence, None for none.

    Sequences advance at their own pace, so a state is kept for each: the first one has the originals, the others deep
    copies made at the start, which share the models and tokenizers in them. Processors of transformers that hold the
    prompts get their own, and `prefix_allowed_tokens_fn` the index of its prompt. Raises ValueError for what cannot be
    copied.
    """
    if not hooks:
        return None
    shared = {
        id(value): value
        for each in hooks
        for value in getattr(each, "__dict__", {}).values()
        if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
    }
    rows = [type(hooks)(_of_row(each, 0, batch) for each in hooks)]
    for row in range(1, batch):
        try:
            copied = copy.deepcopy(hooks, dict(shared))
        except Exception as error:
            raise ValueError(
                f"{type(hooks).__name__} cannot be copied for each of {batch} sequences ({error}): decode the prompts "
                "one by one"
            ) from error
        rows.append(type(hooks)(_of_row(each, row, batch) for each in copied))
    return rows


class Allowed(LogitsProcessor):
    """`PrefixConstrainedLogitsProcessor` for a sequence of one prompt, which gives its function the prompt's index."""

    def __init__(self, function: Callable, prompt: int):
        if not callable(function) or isinstance(function, type):
            raise ValueError(f"prefix_allowed_tokens_fn is {shown(function)}: pass a function of (batch_id, ids)")
        check_takes_two("prefix_allowed_tokens_fn", function, "(batch_id, ids)")
        self.function, self.prompt = function, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        given = self.function(self.prompt, input_ids[0])
        try:
            allowed = torch.as_tensor(given, device=scores.device)
        except (RuntimeError, TypeError, ValueError):
            allowed = scores[0, 0]
        whole = not (allowed.is_floating_point() or allowed.is_complex()) and allowed.dim() == 1
        size = scores.shape[-1]
        if not allowed.numel() and allowed.dim() == 1:
            whole = True  # of which transformers says so
        elif whole and allowed.dtype != torch.bool:
            whole = -size <= int(allowed.min()) and int(allowed.max()) < size
        if not whole:
            raise ValueError(
                f"prefix_allowed_tokens_fn({self.prompt}, ids) returned {shown(given)}: return a list of token ids "
                f"below {size}"
            )
        return PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1)(input_ids, scores)  # type: ignore[arg-type,return-value]


def _of_row(hook, row: int, batch: int):
    """A processor of transformers that holds something of every sequence, with what it holds of this one."""
    if isinstance(hook, PrefixConstrainedLogitsProcessor):
        return Allowed(hook._prefix_allowed_tokens_fn, row // hook._num_beams)  # as many sequences each prompt has
    held: dict[str, Any] = {}
    if isinstance(hook, EncoderNoRepeatNGramLogitsProcessor):
        held = {"generated_ngrams": _one(hook.generated_ngrams, row, batch), "batch_size": 1}
    elif isinstance(hook, EncoderRepetitionPenaltyLogitsProcessor):
        held = {"encoder_input_ids": _one(hook.encoder_input_ids, row, batch)}
    elif isinstance(hook, UnbatchedClassifierFreeGuidanceLogitsProcessor):
        context = dict(hook.unconditional_context)
        for name in ("input_ids", "attention_mask"):
            context[name] = _one(context[name], row, batch)
        held = {"unconditional_context": context}
    elif isinstance(getattr(hook, "prompt_ignore_length", None), torch.Tensor):  # of penalties, from 5.18 on
        held = {"prompt_ignore_length": _one(hook.prompt_ignore_length, row, batch)}
    if not held:
        return hook
    mine = copy.copy(hook)
    vars(mine).update(held)
    return mine


def _one(values, row: int, batch: int):
    """The slice of one sequence of what is held for each prompt, which may have several sequences; None of None."""
    if values is None:
        return None
    if not isinstance(values, (list, torch.Tensor)) or len(values) == 0:
        raise ValueError(f"a logits processor holds {shown(values)} as prompts: pass token ids [B, L]")
    if batch % len(values):
        raise ValueError(f"a logits processor was made for {len(values)} prompts, and {batch} sequences are decoded")
    place = row * len(values) // batch
    return values[place : place + 1]


def walk_processed(
    state: Round,
    tree: Tree,
    logits: torch.Tensor,
    process: Callable[[int, torch.Tensor], torch.Tensor],
    take: Callable[[int, int], bool],
) -> tuple[torch.Tensor, Walked]:
    """`Round.accept` under processors.

    process(row, logits [1, V]) gives the scores to choose from; take(row, token) appends the token to the sequence and
    says whether the sequence goes on.
    """
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    depths, lengths, ends = tree.depths.tolist(), state.lengths.tolist(), state.ends.tolist()
    path = torch.zeros_like(state.emitted)
    state.report.zero_()
    walked = Walked([], [], [])
    for row in range(state.batch):
        room = max(ends[row] - lengths[row], 0)
        limit, goes_on = min(state.max_path, room), True
        children: dict[int, list[int]] = {}
        for child, parent in enumerate(parents[row]):
            children.setdefault(parent, []).append(child)
        nodes: list[int] = []
        chosen: list[int] = []
        ranks: list[int] = []
        node: int | None = 0
        while node is not None and len(nodes) < limit:
            # a copy: kernels add up a row in another order where it starts at an odd address
            scores = process(row, logits[row, node][None].to(torch.float32, copy=True))
            token = state.sampling.choose_row(scores, row, lengths[row] + depths[row][node])
            nodes.append(node)
            chosen.append(token)
            goes_on = take(row, token)
            siblings = children.get(node, []) if goes_on and len(nodes) < room else []
            rank = next((n for n, child in enumerate(siblings) if tokens[row][child] == token), None)
            ranks.append(-1 - len(siblings) if rank is None else rank)
            node = None if rank is None else siblings[rank]
        state.counts[row] = len(nodes)
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.long, device=path.device)
        state.emitted[row, : len(nodes)] = torch.tensor(chosen, dtype=torch.long, device=path.device)
        if chosen:
            state.roots[row] = chosen[-1]
        walked.counts.append(len(nodes))
        walked.ranks.append(ranks)
        walked.full.append(not goes_on or len(nodes) == room)
    return path, walked
