"""Processes that multiprocessing spawns: `eagle.model` is found in them too, before the script is imported there.

A spawned process begins with a dict that its parent has pickled, and imports the parent's script next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any


class First:
    """What a process calls when it reads this."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call

    def __reduce__(self):
        return self.call, ()


def hand_on(begin: Callable[[], Callable[[], Any] | None]) -> None:
    """Let every process that is spawned from now on call, first of all, what `begin()` gives then; None: nothing."""
    stock = spawn.get_preparation_data

    @functools.wraps(stock)
    def preparation(name: str) -> dict[str, Any]:
        call = begin()
        return ({} if call is None else {"eagle_fast": First(call)}) | stock(name)

    spawn.get_preparation_data = preparation  # type: ignore[assignment]
