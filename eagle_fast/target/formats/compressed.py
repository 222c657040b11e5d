"""compressed-tensors: groups of layers with a scheme each; integers in words or bytes, or fp8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eagle_fast.target.formats.fp8 import ACTIVATIONS, CACHED, BlockScheme
from eagle_fast.target.formats.scheme import (
    KINDS,
    MIDDLE,
    Codes,
    FileScheme,
    Scheme,
    Stored,
    Unreadable,
    fields,
    group_of,
    group_size,
    in_order,
    names,
    symmetric,
    whole,
)

PACKED, BYTES = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
BESIDE = [r"\.(input|output)_scale$", r"\.(input|output)_zero_point$", r"\.[kvq]_(scale|zero_point)$"]


@dataclass(frozen=True)
class WholeScheme(FileScheme):
    """Of one layer: whole numbers in words, or a byte each. one: a single scale for all rows."""

    bits: int
    group: int
    symmetric: bool
    in_words: bool
    act_order: bool = False
    one: bool = False

    def stored(self, rows: int, columns: int) -> Stored:
        groups, in_a_word = -(-columns // group_of(self.group, columns)), 32 // self.bits
        found: Stored = {"weight_scale": ((1,) if self.one else (rows, groups), torch.float32)}
        if self.in_words:
            found["weight_packed"] = (rows, -(-columns // in_a_word)), torch.int32
            found["weight_shape"] = (2,), torch.int64
        else:
            found["weight"] = (rows, columns), torch.int8
        if not self.symmetric:
            words = ((-(-rows // in_a_word), groups), torch.int32)
            found["weight_zero_point"] = words if self.in_words else ((rows, groups), torch.int8)
        if self.act_order:
            found["weight_g_idx"] = (columns,), torch.int32
        return found

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        if self.in_words:
            shape = tensors["weight_shape"].tolist()
            if shape != [rows, columns]:
                raise ValueError(
                    f"a weight of {rows} x {columns} has a weight_shape of {shape}, or the file lacks it: is it whole?"
                )
            codes = fields(tensors["weight_packed"], self.bits)[:, :columns].contiguous()
        else:
            codes = self._from_zero(tensors["weight"])
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            zeros = fields(zeros.T.contiguous(), self.bits)[:, :rows].T if self.in_words else self._from_zero(zeros)
            zeros = symmetric(zeros, self.bits)
        scales = tensors["weight_scale"].reshape(1, 1).expand(rows, 1) if self.one else tensors["weight_scale"]
        found = Codes(KINDS[self.bits], codes, scales, zeros, None, group_of(self.group, columns))
        return in_order(found, tensors.get("weight_g_idx"))

    def _from_zero(self, numbers: Tensor) -> Tensor:
        """Signed bytes as codes."""
        return (numbers.to(torch.int16) + MIDDLE[self.bits]).to(torch.uint8)


class Compressed:
    """A checkpoint of llm-compressor. Activations that it would round are not."""

    def __init__(self, settings: dict[str, Any]):
        self.notes, self.beside = list[str](), list(BESIDE)
        if settings.get("quantization_status", "compressed") != "compressed":
            raise Unreadable(f"its quantization_status is {settings['quantization_status']!r}, not 'compressed'")
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise Unreadable(f"it is sparse ({sparsity})")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise Unreadable("its layers turn their input (transform_config)")
        self.ignored = names(settings, "ignore")
        self.targets: dict[str, Scheme | None] = {}
        said: list[str] = []
        for group in settings["config_groups"].values():
            scheme, words = _scheme(group, group.get("format") or settings["format"])
            self.targets |= dict.fromkeys(group["targets"], scheme)
            said += [] if words in said else [words]
            rounded = group.get("input_activations") or group.get("output_activations")
            if rounded and not self.notes:
                self.notes.append(ACTIVATIONS.format(bits=rounded.get("num_bits", 8)))
        if settings.get("kv_cache_scheme"):
            self.notes.append(CACHED)
        self.name = f"compressed-tensors, {' and '.join(said)}"

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        if any(_is_named(name, each) or each == "Linear" for each in self.ignored):
            return None
        by_name = [each for each in self.targets if _is_named(name, each)]
        for each in [*sorted(by_name, key=lambda target: ("re:" in target, target)), "Linear"]:
            if each in self.targets:
                return self.targets[each]
        return None


def _is_named(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _scheme(group: Mapping[str, Any], form: str) -> tuple[Scheme | None, str]:
    """(of the layers of a group, how to call it)."""
    weights = group.get("weights")
    if not weights:
        return None, "plain weights"
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if form != PACKED and form not in BYTES:
        raise Unreadable(f"its format is {form!r}, and {', '.join((PACKED, *BYTES))} can be read")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise Unreadable(f"its scales are by {strategy}, and scales by tensor, channel, group or block can be read")
    if weights.get("type", "int") == "float":
        return _fp8(weights, strategy, form)
    bits = whole(weights["num_bits"], "num_bits", 4, 8)
    if strategy == "block":
        raise Unreadable("its whole numbers are in blocks")
    size = group_size(weights.get("group_size")) if strategy == "group" else -1
    even = bool(weights.get("symmetric", True))
    if strategy == "tensor" and not even:
        raise Unreadable("it has one zero point for a whole weight")
    act_order = weights.get("actorder") in ("group", "dynamic", True)  # two words for one
    scheme = WholeScheme(bits, size, even, form == PACKED, act_order, strategy == "tensor")
    beside = "" if even else ", zero points"
    return scheme, f"{bits} bits{f' in groups of {size}' if size > 0 else ''}{beside}{', act-order' * act_order}"


def _fp8(weights: Mapping[str, Any], strategy: str, form: str) -> tuple[Scheme, str]:
    whole(weights["num_bits"], "num_bits of floats", 8)
    if form == PACKED or not weights.get("symmetric", True):
        raise Unreadable(f"its floats are in the format {form!r}, or have zero points")
    if strategy == "tensor":
        return BlockScheme(None, "weight_scale", (1,)), "FP8"
    if strategy == "channel":
        return BlockScheme((1, 0), "weight_scale"), "FP8"
    if strategy == "group":
        return BlockScheme((1, whole(weights.get("group_size"), "group_size", 32, 64, 128)), "weight_scale"), "FP8"
    rows, columns = weights["block_structure"]
    return BlockScheme((int(rows), whole(columns, "block_structure", 32, 64, 128)), "weight_scale"), "FP8 in blocks"
