"""What a terminal, or a pipe, is shown: answers on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from eagle_fast.shell.answer import Step
from eagle_fast.text import TextStream

DRAFTED = Style(color="green")
WIDTH = 120  # of a pipe
ESCAPE, SHOWN = "\x1b", "\u241b"  # a model must not drive the terminal


class Screen:
    """colors: accepted drafts in colour, on a terminal that has any; may be switched between answers."""

    def __init__(self, colors: bool = False):
        self.colors = colors
        width = None if sys.stdout.isatty() else WIDTH
        self.answers, self.notes = Console(highlight=False, width=width), Console(stderr=True, highlight=False)

    @property
    def is_interactive(self) -> bool:
        """Whether somebody types."""
        return sys.stdin.isatty()

    def ask(self) -> str | None:
        """The next line, None where there are no more. A line that ends with a backslash goes on."""
        line, more = self._line("> "), ""
        while line is not None and line.endswith("\\"):
            more += line[:-1] + "\n"
            line = self._line("… ")
        return None if line is None and not more else more + (line or "")

    def _line(self, prompt: str) -> str | None:
        if self.is_interactive and sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  # editing, and the lines before by the arrow keys
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.is_interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner meanwhile, where somebody looks."""
        if self.notes.is_terminal and self.answers.is_terminal:
            with self.notes.status(Text(what), spinner_style="dim"):
                yield
        else:
            yield

    def write(self, piece: str, style: Style | None = None) -> None:
        """A piece of an answer, as it is in a pipe."""
        if self.answers.is_terminal:
            piece = piece.replace(ESCAPE, SHOWN)
            if style is not None and self.answers.color_system is not None:
                piece = style.render(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    def round(self, stream: TextStream, step: Step) -> None:
        """Write what a round brought."""
        for place, token in enumerate(step.tokens, start=1):
            drafted = place < len(step.tokens)
            self.write(stream.take(token), DRAFTED if self.colors and drafted else None)

    def note(self, text: str, style: str = "dim") -> None:
        """A line that is no answer."""
        self.notes.print(Text(text), style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.note(text, "red")

    def show(self, table: Any) -> None:
        """A table of rich's, as a result."""
        self.answers.print(table)
