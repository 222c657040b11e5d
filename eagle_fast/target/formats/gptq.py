"""GPTQ, of both versions: words along the columns, zero points along the rows, groups in any order (act-order)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eagle_fast.target.formats.scheme import (
    KINDS,
    Codes,
    FileScheme,
    Scheme,
    Stored,
    Unreadable,
    fields,
    group_of,
    group_size,
    in_order,
    symmetric,
    whole,
)

VERSIONS = ("gptq", "gptq_v2")
ONES = {4: 0x11111111, 8: 0x01010101}  # one in every field: what the first version takes off its words of zero points


@dataclass(frozen=True)
class GptqScheme(FileScheme):
    """Of one layer. version 1 stores zero points less one, taken off the words as whole numbers."""

    bits: int
    group: int
    version: int

    def stored(self, rows: int, columns: int) -> Stored:
        groups, in_a_word = -(-columns // group_of(self.group, columns)), 32 // self.bits
        return {
            "qweight": ((-(-columns // in_a_word), rows), torch.int32),
            "qzeros": ((groups, -(-rows // in_a_word)), torch.int32),
            "scales": ((groups, rows), torch.float32),
            "g_idx": ((columns,), torch.int32),
        }

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        codes = fields(tensors["qweight"].T.contiguous(), self.bits)[:, :columns]
        words = tensors["qzeros"] + (ONES[self.bits] if self.version == 1 else 0)
        zeros = symmetric(fields(words, self.bits)[:, :rows].T, self.bits)
        size = group_of(self.group, columns)
        return in_order(Codes(KINDS[self.bits], codes, tensors["scales"].T, zeros, None, size), tensors["g_idx"])


class Gptq:
    """A checkpoint of AutoGPTQ, GPTQModel or optimum.

    Rules for single modules (`dynamic`) are followed: those that leave a module out, and those that change its bits or
    its groups.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.notes, self.beside = settings, list[str](), list[str]()
        stated = settings.get("checkpoint_format") or settings.get("format") or VERSIONS[0]
        if stated not in VERSIONS:
            raise Unreadable(f"its checkpoint_format is {stated!r}, and {' or '.join(VERSIONS)} can be read")
        self.version = 1 + VERSIONS.index(stated)
        self.rules: dict[str, Any] = settings.get("dynamic") or {}
        listed = settings.get("modules_in_block_to_quantize") or []
        self.inside = [name for each in listed for name in ([each] if isinstance(each, str) else each)]
        default = self._scheme({})
        for changes in self.rules.values():  # refused before anything is loaded
            if changes:
                self._scheme(changes)
        groups = f"groups of {default.group}" if default.group > 0 else "one group a row"
        act_order = ", act-order" if settings.get("desc_act") else ""
        self.name = f"GPTQ, {default.bits} bits in {groups}{act_order}"

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        of_head = bool(self.settings.get("lm_head")) and name.rpartition(".")[2] == "lm_head"
        if not of_head and (not inside or (self.inside and not name.endswith(tuple(self.inside)))):
            return None
        for pattern, changes in self.rules.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
                return None if pattern.startswith("-:") else self._scheme(changes or {})
        return self._scheme({})

    def _scheme(self, changes: Mapping[str, Any]) -> GptqScheme:
        found = {**self.settings, **changes}
        return GptqScheme(whole(found["bits"], "bits", 4, 8), group_size(found.get("group_size")), self.version)
