"""Text on a terminal as its tokens arrive, with a colour for those that the head drafted.

A round's last token is the target's own choice; those before it were drafted by the head and accepted by the target.
"""

from __future__ import annotations

import os
import shutil
import sys
from itertools import groupby
from typing import Any, TextIO

from eagle_fast.text import TextStream

DRAFTED, PLAIN = "\033[32m", "\033[0m"  # green, and back
WIDEST = 100  # columns of a line


def takes_colour(out: TextIO) -> bool:
    """Whether this is a terminal whose user did not ask for plain text (NO_COLOR)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Pieces:
    """Cuts a text that grows by rounds into what was drafted and what was not."""

    def __init__(self, tokenizer: Any):
        self.stream = TextStream(tokenizer)

    @property
    def text(self) -> str:
        """Of all tokens so far."""
        return self.stream.text

    def take(self, ids: list[int]) -> list[tuple[str, bool]]:
        """All tokens so far, of which the new ones are those of one round: (text, drafted) of what is new."""
        new = [self.stream.take(token) for token in ids[len(self.stream.ids) :]]
        found = ("".join(new[:-1]), True), ("".join(new[-1:]), False)
        return [piece for piece in found if piece[0]]


class Typewriter:
    """Prints a text as it grows, by whole words on a terminal.

    coloured: mark drafted tokens. tokenizer: has `decode`.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None, coloured: bool | None = None):
        self.pieces, self.out = Pieces(tokenizer), out or sys.stdout
        self.coloured = takes_colour(self.out) if coloured is None else coloured
        self.width = min(shutil.get_terminal_size().columns, WIDEST) if self.out.isatty() else 0  # 0: never break lines
        self.column = 0
        self.word: list[tuple[str, bool]] = []  # characters that wait for the end of their word, drafted or not

    def show(self, ids: list[int]) -> None:
        """All tokens so far; the new ones are those of one round."""
        for text, drafted in self.pieces.take(ids):
            for character in text:
                if character.isspace() or not self.width:
                    self._flush()
                    self._put(character, drafted)
                else:
                    self.word.append((character, drafted))
        self.out.flush()

    def end(self) -> None:
        """Whatever still waits, and a line of its own for what comes next."""
        self._flush()
        print(file=self.out, flush=True)

    def _flush(self) -> None:
        if self.width and self.column and self.column + len(self.word) > self.width:
            self._put("\n", False)
        for drafted, characters in groupby(self.word, lambda each: each[1]):
            self._put("".join(character for character, _ in characters), drafted)
        self.word.clear()

    def _put(self, text: str, drafted: bool) -> None:
        """A part of a word, or one character."""
        marked = drafted and self.coloured and not text.isspace()
        self.out.write(f"{DRAFTED}{text}{PLAIN}" if marked else text)
        self.column = 0 if text == "\n" else self.column + len(text)
