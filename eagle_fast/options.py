"""Options that a method does not take: a TypeError that names the method, what it takes, and who takes them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import Any

from transformers import GenerationConfig

from eagle_fast.inputs import reason
from eagle_fast.messages import listed

OWN = frozenset({"self", "speculative", "target", "show_padding"})  # between methods, and no user's


def option_names(*functions: Callable) -> list[str]:
    """Names of the arguments of functions that hand their **options on to the next."""
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    found = [
        each.name for f in functions for each in inspect.signature(f).parameters.values() if each.kind not in kinds
    ]
    return [name for name in dict.fromkeys(found) if name not in OWN]


def perhaps(name: str, taken: Collection[str]) -> str:
    """The name that was meant, as the rest of a sentence; "" if none is close."""
    close = difflib.get_close_matches(name, taken, 1)
    return f", {close[0]} perhaps" if close else ""


def refuse_unknown(
    method: str, options: Collection[str], taken: list[str], of_generate: Collection[str] = (), base_model: Any = None
) -> None:
    """Raise TypeError for options that are not among those taken.

    of_generate: what `generate` takes, besides the settings of transformers' GenerationConfig; of methods that decode,
    and so is base_model.
    """
    unknown = [name for name in options if name not in taken]
    if not unknown:
        return
    name = unknown[0]
    hint = perhaps(name, taken)
    why = None if base_model is None else reason(name, base_model, everywhere=True)
    if why is not None:
        raise TypeError(f"{method}() takes no {name!r}: {why}")
    if name in of_generate or (of_generate and hasattr(GenerationConfig(), name)):
        hint = f"; generate() takes it, as transformers' does: call generate(input_ids, {name}=...)"
        if name == "do_sample":
            hint += f", or {method}(..., temperature=1.0)"
    raise TypeError(f"{method}() takes no {name!r}{hint}. {method}() takes {listed(taken, len(taken))}")
