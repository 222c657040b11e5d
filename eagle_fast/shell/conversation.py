"""Turns of user and model, kept and taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle_fast.decoding.statistics import Statistics
from eagle_fast.shell.settings import Settings


class Conversation:
    """messages: all turns, without the system's. plain: decode without the head. total and prompt_tokens: of all
    answers."""

    def __init__(self, settings: Settings, system: str | None = None):
        self.settings, self.system = settings, system
        self.messages: list[dict[str, Any]] = []
        self.plain, self.total, self.prompt_tokens = False, Statistics(), 0

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """What the model is to answer."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def count(self, statistics: Statistics, prompt_tokens: int) -> None:
        """Of one more answer."""
        self.total += statistics
        self.prompt_tokens += prompt_tokens

    def take_back(self) -> str | None:
        """The last thing that the user said, which is no part of it any more, nor is what followed. None: nothing."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return None
        said = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return said

    def save(self, path: str | Path) -> None:
        """Append it to a file of prompts. Raises ValueError."""
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.prompt}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}") from error
