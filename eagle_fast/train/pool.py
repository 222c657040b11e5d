"""The texts that are trained on at present, in batches of like length.

B sequences, L their length padded to a multiple of 32, J steps of the rollout, R rows that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eagle_fast.train.writer import Text

PAD_TO = 32


class Batch(NamedTuple):
    tokens: Tensor  # [B, L + J], padded behind
    asked: Tensor  # [R] positions in [B * L] after which the head should know the next token


def plan(texts: Sequence[Text], num_tokens: int, rng: np.random.Generator) -> list[list[int]]:
    """The texts of each batch, by index, of at most `num_tokens` padded tokens, in random order."""
    lengths = np.array([len(text.tokens) for text in texts])
    mixed = np.argsort(lengths + rng.uniform(0, PAD_TO, len(texts)))  # nearly by length, another way each time
    batches: list[list[int]] = []
    widest = 0
    for index in mixed.tolist():
        widest = max(widest, padded(lengths[index]))
        if not batches or (len(batches[-1]) + 1) * widest > num_tokens:
            batches.append([])
            widest = padded(lengths[index])
        batches[-1].append(index)
    return [batches[index] for index in rng.permutation(len(batches))]


def padded(length: int) -> int:
    return -(-int(length) // PAD_TO) * PAD_TO


def collate(texts: Sequence[Text], num_steps: int, device: torch.device, whole: bool = False) -> Batch:
    """Texts as a batch. Asked is where the answer's tokens are to be guessed, or all tokens if `whole`."""
    width = padded(max(len(text.tokens) for text in texts))
    tokens = np.zeros((len(texts), width + num_steps), dtype=np.int64)
    asked = []
    for row, (words, start) in enumerate(texts):
        tokens[row, : len(words)] = words
        first = max(0 if whole else start - 1, num_steps)  # every step has a row that guesses this token
        asked.append(np.arange(row * width + first, row * width + len(words) - 1))
    return Batch(_to(tokens, device), _to(np.concatenate(asked), device))


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; a GPU reads it later, without being waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def save_texts(path: Path, texts: Sequence[Text]) -> None:
    """All texts in one file, complete or not there."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([text.tokens for text in texts]),
            lengths=np.array([len(text.tokens) for text in texts]),
            starts=np.array([text.start for text in texts]),
        )
    temporary.replace(path)


def load_texts(path: Path) -> list[Text]:
    with np.load(path) as stored:
        parts = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
        return [Text(words, int(start)) for words, start in zip(parts, stored["starts"], strict=True)]
