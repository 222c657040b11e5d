"""Whether a target's weights are packed here: what is known before it is loaded, and what is said when it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from eagle_fast.messages import listed, short, warn_user
from eagle_fast.target.anatomy import Anatomy, decoder_layers
from eagle_fast.target.formats.arriving import make_room, num_parameters, shrink
from eagle_fast.target.formats.quantizer import PackedConfig, packed_config
from eagle_fast.target.formats.rounding import BITS
from eagle_fast.target.formats.scheme import Format, Unreadable
from eagle_fast.target.merged import can_be_read
from eagle_fast.target.placement import GIB, model_bytes, skeleton

LM_HEAD_BITS = (8,)
PACKED_TENSORS = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_g_idx", "SCB", "absmax",
)  # fmt: skip


class Packing(NamedTuple):
    """A target whose linear layers are packed as they are loaded. model: on the meta device, of the size to come."""

    asked: PackedConfig
    format: Format | None
    model: PreTrainedModel

    @property
    def name(self) -> str:
        """For messages."""
        names = [self.format.name] if self.format else []
        if self.asked.lm_head_bits is not None:
            names.append(f"lm_head and embedding rounded to {self.asked.lm_head_bits} bits at load")
        return ", ".join(names)

    @property
    def notes(self) -> list[str]:
        return self.format.notes if self.format else []

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What from_pretrained is told of it. config: the checkpoint's."""
        if self.asked.stored is None:
            return {"quantization_config": self.asked}
        return {"config": packed_config(config, self.asked)}


class Bits(NamedTuple):
    """What is asked for at load, as the arguments are called."""

    target_bits: Any = None
    lm_head_bits: Any = None

    @property
    def given(self) -> dict[str, Any]:
        """By the arguments' names."""
        return {name: each for name, each in self._asdict().items() if each is not None}

    def __bool__(self) -> bool:
        return bool(self.given)

    def __str__(self) -> str:
        return ", ".join(f"{name}={short(each)}" for name, each in self.given.items())

    def check(self) -> None:
        """Raises ValueError."""
        for name, value, allowed in zip(self._fields, self, (BITS, LM_HEAD_BITS), strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in allowed):
                said = " or ".join(str(each) for each in sorted(allowed, reverse=True))
                raise ValueError(f"{name}={short(value)}: use {said}, or leave it out")


def packing_of_file(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options) -> Packing:
    """How a checkpoint's weights are packed. dtype: of the others; options: of `skeleton`. Raises Unreadable."""
    return _packing(PackedConfig(stored=Anatomy(config).quantization), config, dtype, **options)


def packing_at_load(
    bits: Bits, config: PreTrainedConfig | None, given: dict[str, Any], what: str, dtype: torch.dtype | None, **options
) -> Packing:
    """Weights rounded to so many bits. given: options of from_pretrained. Raises ValueError."""
    bits.check()
    if "quantization_config" in given:
        raise ValueError(f"{bits} beside quantization_config: pass one of them")
    stored = None if config is None else Anatomy(config).quantization or None
    if config is None or (stored and bits.target_bits is not None):
        raise ValueError(f"{bits}, but {what} is quantized already: leave {' and '.join(bits.given)} out")
    try:
        return _packing(PackedConfig(stored, *bits), config, dtype, **options)
    except Unreadable as reason:
        raise ValueError(f"{bits} is not possible for {what}: {reason}") from reason


def _packing(asked: PackedConfig, config: PreTrainedConfig, dtype: torch.dtype | None, **options) -> Packing:
    found = asked.format
    model = skeleton(config, dtype, **options)
    make_room(model, found, asked.lm_head_bits)
    shrink(model)
    return Packing(asked, found, model)


def check_all_read(unexpected: Iterable[str], packing: Packing | None, what: str) -> None:
    """ValueError for tensors that nobody read: what they belong to would be random, or wrong."""
    unexpected = list(unexpected)
    if packing is not None and packing.asked.lm_head_bits is not None and "lm_head.weight" in unexpected:
        raise ValueError(
            f"lm_head_bits={packing.asked.lm_head_bits}, but {what} has an lm_head beside the embedding that its "
            "config.json says is one with it (tie_word_embeddings): leave lm_head_bits out"
        )
    left = sorted(name for name in unexpected if name.rpartition(".")[2] in PACKED_TENSORS)
    if left:
        raise ValueError(
            f"{what} has packed tensors where its config.json speaks of plain weights: {listed(left)}; is the "
            "config.json its own?"
        )


def say_how_it_runs(model: PreTrainedModel, what: str, packing: Packing | None, reason: str) -> None:
    """One line about a loaded target that is quantized. reason: why its weights are not packed here."""
    size = f"{_said(model_bytes(model))} of weights"
    if packing is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        wide = f"which in {dtype} would be {_said(num_parameters(model) * model.dtype.itemsize)}"
        notes = "".join(f"; {each}" for each in packing.notes)
        warn_user(f"{what} ({packing.name}) runs from its packed weights: {size}, {wide}{notes}")
    elif _has_foreign_linears(model):
        method = Anatomy(model).quantization.get("quant_method", "a library")
        warn_user(
            f"{what} runs through the linear layers of {getattr(method, 'value', method)}, and its decoder layers are "
            f"not fused, which is slower: {size}" + (f"; {reason}" if reason else "")
        )


def _said(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count > GIB / 10 else f"{count / 2**20:.2f} MiB"


def _has_foreign_linears(model: PreTrainedModel) -> bool:
    """Whether a library's quantized linear layers are in the decoder."""
    found = decoder_layers(model, Anatomy(model).num_layers)
    if found is None or not Anatomy(model).is_quantized:
        return False
    return any(hasattr(each, "in_features") and not can_be_read(each) for each in found[1].modules())
