"""FP8 (e4m3): a scale for each block of a weight, as DeepSeek and Qwen write it, for each row, or one for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from eagle_fast.target.formats.scheme import Codes, FileScheme, Scheme, Stored, Unreadable, group_of, names

ACTIVATIONS = "its activations, which the file would round to {bits} bits, stay in 16"
CACHED = "keys and values, which the file would round, are cached as they are"
BESIDE = r"\.(activation|act|input|output|k|v|kv)_scale(_ub)?$"


@dataclass(frozen=True)
class BlockScheme(FileScheme):
    """Of one layer: codes in fp8, and a scale for each block. block: its rows and columns, which are all where they are
    0; None for one scale."""

    block: tuple[int, int] | None
    scale: str = "weight_scale_inv"  # by its name an inverse; it is what codes are multiplied by
    shape: tuple[int, ...] = ()  # of the one scale

    def stored(self, rows: int, columns: int) -> Stored:
        shape = self.shape
        if self.block is not None:
            shape = -(-rows // self.block[0]), -(-columns // group_of(self.block[1], columns))
        return {"weight": ((rows, columns), torch.float8_e4m3fn), self.scale: (shape, torch.float32)}

    def num_bytes(self, rows: int, columns: int) -> int:
        groups = 1 if self.block is None else -(-columns // group_of(self.block[1], columns))
        return rows * columns + rows * groups * 4  # every row has scales of its own

    def codes(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
        scales = tensors[self.scale]
        if self.block is None:
            return Codes("fp8", tensors["weight"], scales.reshape(1, 1).expand(rows, 1), None, None, columns)
        scales = scales.repeat_interleave(self.block[0], 0)[:rows]
        return Codes("fp8", tensors["weight"], scales, None, None, min(group_of(self.block[1], columns), columns))


class Fp8:
    """A checkpoint of quant_method "fp8": of transformers, which states weight_block_size, or of AutoFP8."""

    def __init__(self, settings: dict[str, Any]):
        self.beside, self.notes = [BESIDE], [ACTIVATIONS.format(bits=8)]
        if settings.get("modules_to_convert"):
            raise Unreadable("it packs modules that are no linear layers (modules_to_convert)")
        if settings.get("kv_cache_scheme"):
            self.notes.append(CACHED)
        block = settings.get("weight_block_size")
        if block is not None:
            block = int(block[0]), int(block[1])
            if block[0] < 1 or block[1] not in (32, 64, 128):
                raise Unreadable(f"its weight_block_size is {block}, and blocks of 32, 64 or 128 columns can be read")
        of_transformers = "weight_block_size" in settings
        self.one_scheme = BlockScheme(block) if of_transformers else BlockScheme(None, "weight_scale")
        self.kept = names(settings, "modules_to_not_convert", "ignored_layers")
        self.name = "FP8, one scale a weight" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        return self.one_scheme if should_convert_module(name, ["lm_head", *self.kept]) else None


class FbgemmFp8:
    """A checkpoint of quant_method "fbgemm_fp8": a scale for each row."""

    def __init__(self, settings: dict[str, Any]):
        self.beside, self.notes = [BESIDE], [ACTIVATIONS.format(bits=8)]
        self.kept = names(settings, "modules_to_not_convert")
        self.name = "FP8, a scale a row"

    def scheme(self, name: str, linear: nn.Linear, inside: bool) -> Scheme | None:
        return BlockScheme((1, 0), "weight_scale") if should_convert_module(name, ["lm_head", *self.kept]) else None
