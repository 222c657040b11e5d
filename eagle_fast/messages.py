"""How messages to the user are put: warnings that point at the user's own line, lists of names that stay short."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

PACKAGE = __name__.partition(".")[0]


def warn_user(message: str) -> None:
    """A UserWarning at the first line up the stack that is not this package's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in the order given, those beyond `most` as a number."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(value: Any) -> str:
    """A value as Python writes it, if that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"<{type(value).__name__}>"
