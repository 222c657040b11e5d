"""How messages to the user are put: warnings that point at the user's own line, values and lists of
names that stay short."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

PACKAGE = __name__.partition(".")[0]
DECORATORS = ("contextlib", "torch.utils._contextlib")  # whose frames lie between ours


def warn_user(message: str) -> None:
    """A UserWarning at the first line up the stack that is not this package's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE or module in DECORATORS


def shown(value: object, most: int = 60) -> str:
    """repr of whatever a user passed, cut behind `most` characters; the name of its type where it has none."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of the object's own, or an int of more digits than Python writes
        return f"<a {type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in the order given, those beyond `most` as a number."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(value: Any) -> str:
    """A value as Python writes it, if that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"<{type(value).__name__}>"
