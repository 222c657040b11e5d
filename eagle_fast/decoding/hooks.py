"""What logits processors and stopping criteria give back, checked: they are code of the user, called one by one.

V vocabulary. What they raise comes out as it is; a StopIteration needs help, since decoding is a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from eagle_fast.messages import shown


class HookStopped(ValueError):
    """A processor or criterion raised StopIteration, which cannot pass through a generator."""


class StopsComeOut:
    """A context in which a StopIteration of a hook comes out as what it is, once it has left the generators."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, HookStopped) and error.__cause__ is not None:
            raise error.__cause__


def processed(processors: LogitsProcessorList, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """scores [1, V] of the token after ids [1, L], after the processors; raises ValueError for what are no scores."""
    for each in processors:
        given = _call(each, LogitsProcessorList([each]), ids, scores)
        scores = _check_scores(f"the logits processor {_name(each)}", given, scores)
    return scores


def verdict(criteria: Iterable, ids: torch.Tensor, scores: Any, batch: int = 1) -> bool:
    """Whether one of the criteria ends the text ids [1, L], one of `batch`; all of them are asked."""
    return any([_check_verdict(each, _ask(each, ids, scores, batch)) for each in criteria])


def _ask(criterion, ids: torch.Tensor, scores: Any, batch: int):
    """What a criterion says of one text. One that was made for so many rows, as lm-eval's, gets that many of it."""
    try:
        return _call(criterion, criterion, ids, scores)
    except IndexError:
        if batch == 1:
            raise
    given = _call(criterion, criterion, ids.expand(batch, -1), scores)
    return given[:1] if isinstance(given, torch.Tensor) and given.dim() == 1 else given


def _call(hook, call: Callable, ids: torch.Tensor, scores: Any):
    try:
        return call(ids, scores)
    except StopIteration as stop:
        raise HookStopped(
            f"the logits processor or criterion {_name(hook)} raised StopIteration, which cannot leave a generator: "
            "let it raise another exception"
        ) from stop
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # transformers' own, made from an option of `generate`: users have no such code to look into
        if isinstance(error, torch.OutOfMemoryError) or type(hook).__module__.partition(".")[0] != "transformers":
            raise
        settings = ", ".join(f"{name}={shown(value)}" for name, value in vars(hook).items() if name != "model")
        raise ValueError(
            f"transformers' {_name(hook)} cannot work with {settings}: {type(error).__name__}: {error}; change the "
            "option that it was made from"
        ) from error


def _check_scores(who: str, given, before: torch.Tensor) -> torch.Tensor:
    remedy = f"return the scores as a float tensor of shape {list(before.shape)}"
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{who} returned {shown(given)} in place of scores: {remedy}")
    if not given.is_floating_point() or not _holds_rows(given):
        raise ValueError(f"{who} returned scores of {given.dtype}, {given.layout}, on {given.device}: {remedy}")
    if given.shape != before.shape:
        raise ValueError(
            f"{who} made scores of shape {list(given.shape)} from {list(before.shape)}: they see one sequence at a "
            "time; decode the prompts one by one if they need the whole batch"
        )
    return given.detach().to(before.device)


def _check_verdict(criterion, given) -> bool:
    if isinstance(given, (bool, np.bool_)):
        return bool(given)
    if isinstance(given, torch.Tensor) and given.dtype == torch.bool and _holds_rows(given) and given.numel() == 1:
        return bool(given)
    raise ValueError(
        f"the stopping criterion {_name(criterion)} returned {shown(given)}: return True or False, or a bool tensor of "
        "shape [1]; criteria see one sequence at a time"
    )


def _holds_rows(tensor: torch.Tensor) -> bool:
    return not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_meta


def _name(hook) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
