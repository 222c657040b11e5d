"""AWQ (gemm): words along the rows, their nibbles interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from eagle_fast.target.formats.scheme import (
    Codes,
    FileScheme,
    Scheme,
    Stored,
    Unreadable,
    fields,
    group_of,
    group_size,
    names,
    symmetric,
    whole,
)

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that each of eight rows lies in


@dataclass(frozen=True)
class AwqScheme(FileScheme):
    """Of one layer, always in 4 bits."""

    group: int
    bits: int = 4

    def stored(self, rows: int, columns: int) -> Stored:
        groups, words = -(-columns // group_of(self.group, columns)), -(-rows // 8)
        return {
            "qweight": ((columns, words), torch.int32),
            "qzeros": ((groups, words), torch.int32),
            "scales": ((groups, rows), torch.float32),
        }

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        codes, zeros = (fields(tensors[name], 4, PLACES)[:, :rows].T for name in ("qweight", "qzeros"))
        size = group_of(self.group, columns)
        return Codes("int4", codes.contiguous(), tensors["scales"].T, symmetric(zeros, 4), None, size)


class Awq:
    """A checkpoint of AutoAWQ, in its form for matrix products."""

    def __init__(self, settings: dict[str, Any]):
        self.notes, self.beside = list[str](), list[str]()
        whole(settings.get("bits", settings.get("w_bit")), "bits", 4)
        form = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if form != "gemm":
            raise Unreadable(f"its version is {form!r}, and 'gemm' can be read")
        self.kept = names(settings, "modules_to_not_convert")
        self.one_scheme = AwqScheme(group_size(settings.get("group_size", settings.get("q_group_size"))))
        groups = f"groups of {self.one_scheme.group}" if self.one_scheme.group > 0 else "one group a row"
        self.name = f"AWQ, 4 bits in {groups}"

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        return self.one_scheme if inside and should_convert_module(name, self.kept) else None
