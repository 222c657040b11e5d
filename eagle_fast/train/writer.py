"""Training texts that the target writes itself: users' questions, if none are given, and always the answers.

A question is the target's continuation of its chat template where the user's turn begins (the idea of Xu et al.,
"Magpie", 2024), often after a few words that steer it to a topic (`openings`). Nothing else goes in, so no data set
is needed, and the answers are what the head will have to guess.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eagle_fast.train.chat import ChatFormat
from eagle_fast.train.completer import Completer, Completion, Job

MIN_QUESTION = 3
MAX_SEEN = 1_000_000  # questions remembered, so as not to repeat them
QUESTION_MIN_P = 0.03  # keeps questions sensible at temperature 1


class Text(NamedTuple):
    """A prompt and the target's answer to it, which begins at token `start`."""

    tokens: np.ndarray  # [L] int32
    start: int


@dataclass(frozen=True)
class Sources:
    """Where questions come from, and how they are answered. Prompts and openings are token ids."""

    chat: ChatFormat
    prompts: list[list[int]]  # given ones, up to where the answer begins
    openings: list[list[int]]
    prompt_share: float = 1.0  # of all questions, if prompts are given
    opening_share: float = 0.6  # of the target's own questions
    greedy_share: float = 0.5  # of the answers; the others at temperature 1
    max_question: int = 192
    max_answer: int = 384

    @property
    def max_prompt(self) -> int:
        """Longest prompt of an answer."""
        suffix = len(self.chat.suffix or ())
        longest = max((len(prompt) for prompt in self.prompts), default=0)
        return max(len(self.chat.prefix) + self.max_question + suffix, longest)

    @property
    def max_new(self) -> int:
        """Longest completion of a prompt."""
        return max(self.max_question, self.max_answer)


class Writer:
    """Writes texts with a `Completer`; those under way when enough are done go on at the next call."""

    def __init__(self, completer: Completer, sources: Sources, seed: int = 0):
        self.completer, self.sources = completer, sources
        self.openings = [each for each in sources.openings if len(each) < sources.max_question]  # others leave no room
        self.rng = np.random.default_rng(seed)
        self.waiting: deque[list[int]] = deque()  # questions that have no answer yet
        self.seen: set[int] = set()
        self.num_asked = self.num_dropped = 0  # dropped: questions without an end, and repeated ones

    def write(self, enough: Callable[[int], bool]) -> list[Text]:
        """Texts, until `enough` says so, which is asked with the number of tokens of answers so far."""
        texts: list[Text] = []
        count = 0
        while not enough(count):
            for completion in self.completer.advance(self._next_job):
                if completion.job.tag == "question":
                    self._ask(completion)
                else:
                    prompt = np.array(completion.job.prompt, dtype=np.int32)
                    texts.append(Text(np.concatenate([prompt, completion.tokens]), len(prompt)))
                    count += len(completion.tokens)
        return texts

    def _next_job(self) -> Job:
        source = self.sources
        if self.waiting:
            return self._answer(self.waiting.popleft())
        if source.prompts and self.rng.random() < source.prompt_share:
            return self._answer(source.prompts[self.rng.integers(len(source.prompts))])
        if source.chat.suffix is None:
            return Job(source.chat.prefix, source.max_answer, temperature=1.0, tag="answer")
        opening: list[int] = []
        if self.openings and self.rng.random() < source.opening_share:
            opening = self.openings[self.rng.integers(len(self.openings))]
        room = source.max_question - len(opening)
        return Job(source.chat.prefix + opening, room, temperature=1.0, min_p=QUESTION_MIN_P, tag="question")

    def _answer(self, prompt: list[int]) -> Job:
        greedy = self.rng.random() < self.sources.greedy_share
        return Job(prompt, self.sources.max_answer, temperature=0.0 if greedy else 1.0, tag="answer")

    def _ask(self, completion: Completion) -> None:
        """Queue a question that came to an end, without the end token, which the chat template writes."""
        chat = self.sources.chat
        assert chat.suffix is not None
        question = completion.job.prompt + completion.tokens[:-1].tolist()
        words = tuple(question[len(chat.prefix) :])
        self.num_asked += 1
        if not completion.ended or len(words) < MIN_QUESTION or hash(words) in self.seen:
            self.num_dropped += 1
            if self.num_asked > 8 * len(self.completer.jobs) and self.num_dropped > 0.99 * self.num_asked:
                raise ValueError("the target does not bring its own questions to an end: pass prompts from a file")
            return
        if len(self.seen) >= MAX_SEEN:
            self.seen.clear()
        self.seen.add(hash(words))
        self.waiting.append(question + chat.suffix)
