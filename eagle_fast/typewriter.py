"""Text on a terminal as its tokens arrive, with a colour for those that the head drafted.

A round's last token is the target's own choice; those before it were drafted by the head and accepted by the target.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, TextIO

DRAFTED, PLAIN = "\033[32m", "\033[0m"  # green, and back
WIDEST = 100  # columns of a line


def takes_colour(out: TextIO) -> bool:
    """Whether this is a terminal whose user did not ask for plain text (NO_COLOR)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Typewriter:
    """Prints a text as it grows, by whole words on a terminal; what does not end a whole character waits.

    coloured: mark drafted tokens. tokenizer: has `decode`.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None, coloured: bool | None = None):
        self.tokenizer, self.out = tokenizer, out or sys.stdout
        self.coloured = takes_colour(self.out) if coloured is None else coloured
        self.width = min(shutil.get_terminal_size().columns, WIDEST) if self.out.isatty() else 0  # 0: never break lines
        self.count, self.shown, self.column = 0, "", 0
        self.word: list[tuple[str, bool]] = []  # characters that wait for the end of their word, drafted or not

    def show(self, ids: list[int]) -> None:
        """All tokens so far; the new ones are those of one round."""
        if len(ids) - self.count > 1:
            self._grow(ids[:-1], drafted=True)
        self._grow(ids, drafted=False)
        self.count = len(ids)
        self.out.flush()

    def end(self) -> None:
        """Whatever still waits, and a line of its own for what comes next."""
        self._flush()
        print(file=self.out, flush=True)

    def _grow(self, ids: list[int], drafted: bool) -> None:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return
        for character in text[len(self.shown) :]:
            if character.isspace() or not self.width:
                self._flush()
                self._put(character, drafted)
            else:
                self.word.append((character, drafted))
        self.shown = text

    def _flush(self) -> None:
        if self.width and self.column and self.column + len(self.word) > self.width:
            self._put("\n", False)
        for character, drafted in self.word:
            self._put(character, drafted)
        self.word.clear()

    def _put(self, character: str, drafted: bool) -> None:
        marked = drafted and self.coloured and not character.isspace()
        self.out.write(f"{DRAFTED}{character}{PLAIN}" if marked else character)
        self.column = 0 if character == "\n" else self.column + 1
