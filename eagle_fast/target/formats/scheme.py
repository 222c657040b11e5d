"""What every format is read into: codes with scales, which `kernels/packed.py` takes.

N, K rows and columns of a weight, G groups of columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]  # a layer's tensors by name: shape, dtype
KINDS = {4: "int4", 8: "int8"}
MIDDLE = {4: 8, 8: 128}  # the code of 0 in symmetric weights


class Unreadable(Exception):
    """These weights are not read here; the message says why, as the rest of a sentence about the checkpoint."""


class Codes(NamedTuple):
    """A weight [N, K]: (codes - zeros) * scales. Column k of the codes multiplies column order[k] of the input."""

    kind: str  # "int4", "int8" or "fp8"
    codes: Tensor  # uint8, or float8_e4m3fn [N, K]
    scales: Tensor  # [N, G]
    zeros: Tensor | None  # uint8 [N, G]; None: 8 of 4 bits, 128 of 8
    order: Tensor | None  # [K]; None: as they come
    group_size: int  # columns; K where there is one group


class Scheme(Protocol):
    """How the weight of one linear layer is stored."""

    def stored(self, rows: int, columns: int) -> Stored:
        """The tensors of a layer's weight in the file. Scales are asked for in float32, which holds every kind."""

    def num_bytes(self, rows: int, columns: int) -> int:
        """About as many as the packed weight takes."""

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        """What these tensors say."""


class FileScheme:
    """What is the same for all files: a packed weight takes what it does in the file."""

    def stored(self, rows: int, columns: int) -> Stored:
        raise NotImplementedError

    def num_bytes(self, rows: int, columns: int) -> int:
        """See `Scheme`. Scales count as float32: the file's own, and those that the kernel reads beside them."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.stored(rows, columns).values())


class Format(Protocol):
    """What a quantization_config says of a whole checkpoint."""

    name: str  # for messages: "GPTQ, 4 bits in groups of 128"
    notes: list[str]  # sentences about what is not done as the file would have it
    beside: list[str]  # patterns of tensors in the file that are not read

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        """Of a linear layer of this name; None where its weight is plain. inside: whether of a decoder layer."""


def fields(words: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Numbers of `bits` bits, uint8 [..., m * 32 / bits], of int32 words [..., m].

    places[i]: which field of a word number i lies in, from the lowest; None: field i.
    """
    shifts = torch.tensor(places or range(32 // bits), dtype=torch.int32, device=words.device) * bits
    return ((words[..., None] >> shifts) & (1 << bits) - 1).to(torch.uint8).flatten(-2)


def group_of(size: Any, columns: int) -> int:
    """Columns of a group: all of them where a file says -1 or nothing."""
    return columns if size is None or size <= 0 else size


def whole(value: Any, name: str, *allowed: int) -> int:
    """A number that a config gives. Unreadable if it is none of those allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise Unreadable(f"its {name} is {value!r}, and {' or '.join(map(str, allowed))} can be read")
    return value


def names(settings: Mapping[str, Any], *keys: str) -> list[str]:
    """Names of modules, or patterns of them, under the first of these keys that has any."""
    for key in keys:
        found = settings.get(key) or []
        if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
            raise Unreadable(f"its {key} is {found!r}, and a list of names can be read")
        if found:
            return list(found)
    return []


def group_size(value: Any) -> int:
    """That a config gives; -1 for one group."""
    return whole(-1 if value is None else value, "group_size", -1, 32, 64, 128)


def symmetric(zeros: Tensor, bits: int) -> Tensor | None:
    """Zero points; None where they all are the middle."""
    return None if bool((zeros == MIDDLE[bits]).all()) else zeros


def in_order(found: Codes, groups: Tensor | None) -> Codes:
    """The same with the columns of a group side by side.

    groups: that each column belongs to [K], where a file has columns in the order of their importance (act-order).
    """
    if groups is None:
        return found
    columns, size = found.codes.shape[1], found.group_size
    expected = torch.arange(columns, device=groups.device) // size
    if bool((groups == expected).all()) or bool((groups < 0).all()):
        return found
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order].long(), expected):
        raise ValueError(
            f"its groups of columns (g_idx) are not of {size} columns each, or the file lacks them: is it whole?"
        )
    codes = found.codes.view(torch.uint8)[:, order].view(found.codes.dtype)
    return found._replace(codes=codes, order=order)
