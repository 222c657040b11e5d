"""Weights of 16 or 32 bits rounded to 4 or 8 while they are loaded.

8 bits: a scale for each row. 4 bits: a scale for each group of columns of a row, the largest group that divides the
columns. A scale that leaves the outermost weights out may round all others better: of a few, the one with the least
squared error is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eagle_fast.layers.cuts import GROUPS
from eagle_fast.layers.linear import quantize
from eagle_fast.target.formats.scheme import KINDS, MIDDLE, Codes, Scheme, Stored, Unreadable

BITS = tuple(KINDS)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest weight
BLOCK = 2**22  # numbers, rounded at a time


@dataclass(frozen=True)
class RoundingScheme:
    """Of one layer. group: columns, of 4 bits. dtype: of the weight, and of the scales of groups."""

    bits: int
    group: int
    dtype: torch.dtype

    def stored(self, rows: int, columns: int) -> Stored:
        return {"weight": ((rows, columns), self.dtype)}

    def num_bytes(self, rows: int, columns: int) -> int:
        groups = columns // self.group if self.bits == 4 else 1
        return rows * columns * self.bits // 8 + rows * groups * 4

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        weight = tensors["weight"]
        if self.bits == 8:
            numbers, scales = quantize(weight)
            codes = numbers.view(torch.uint8).bitwise_xor_(MIDDLE[8])
            return Codes("int8", codes, scales[:, None], None, None, columns)
        parts = [rounded_groups(part, self.group) for part in weight.split(max(1, BLOCK // columns))]
        codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        return Codes("int4", codes, scales, None, None, self.group)


def rounded_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes, uint8 [N, K], scales [N, G] in the weight's dtype) of weight [N, K] in 4 bits.

    A group's largest weight, times a clip, is the number -8, so scales may be negative.
    """
    rows = weight.float().unflatten(1, (-1, group))
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    least = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(rows, dtype=torch.uint8), torch.zeros_like(largest, dtype=weight.dtype)
    for clip in CLIPS:
        scale = (largest * (clip / -MIDDLE[4])).to(weight.dtype)
        wide = scale.float()
        numbers = (rows / torch.where(wide == 0, 1.0, wide)).round_().clamp_(-MIDDLE[4], MIDDLE[4] - 1)
        error = (numbers * wide - rows).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better, (numbers + MIDDLE[4]).to(torch.uint8), codes)
        scales = torch.where(better, scale, scales)
    return codes.flatten(1), scales.flatten(1)


class Rounding:
    """All linear layers of the decoder in `bits` bits."""

    def __init__(self, bits: int):
        self.bits, self.name = bits, f"rounded to {bits} bits at load"
        self.notes, self.beside = list[str](), list[str]()

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        if not inside:
            return None
        group = next((each for each in GROUPS if linear.in_features % each == 0), 0)
        if self.bits == 4 and not group:
            raise Unreadable(f"{name} has {linear.in_features} inputs, which no group of 128, 64 or 32 divides")
        return RoundingScheme(self.bits, group, linear.weight.dtype)
