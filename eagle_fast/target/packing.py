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

PACKED_TENSORS = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_g_idx",
)  # fmt: skip


class Packing(NamedTuple):
    """A target whose linear layers are packed as they are loaded. model: on the meta device, of the size to come."""

    asked: PackedConfig
    format: Format
    model: PreTrainedModel

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What from_pretrained is told of it. config: the checkpoint's."""
        if self.asked.stored is None:
            return {"quantization_config": self.asked}
        return {"config": packed_config(config, self.asked.stored)}


def packing_of_file(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options) -> Packing:
    """How a checkpoint's weights are packed. dtype: of the others; options: of `skeleton`. Raises Unreadable."""
    return _packing(PackedConfig(stored=Anatomy(config).quantization), config, dtype, **options)


def packing_at_load(
    bits: Any, config: PreTrainedConfig | None, given: dict[str, Any], what: str, dtype: torch.dtype | None, **options
) -> Packing:
    """Weights rounded to `bits` bits. given: options of from_pretrained. Raises ValueError."""
    name = f"target_bits={short(bits)}"
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{name}: use 8 or 4, or leave it out")
    if "quantization_config" in given:
        raise ValueError(f"{name} beside quantization_config: pass one of them")
    if config is None or Anatomy(config).is_quantized:
        raise ValueError(f"{name}, but {what} is quantized already: leave target_bits out")
    try:
        return _packing(PackedConfig(bits=bits), config, dtype, **options)
    except Unreadable as reason:
        raise ValueError(f"{name} is not possible for {what}: {reason}") from reason


def _packing(asked: PackedConfig, config: PreTrainedConfig, dtype: torch.dtype | None, **options) -> Packing:
    found = asked.format
    model = skeleton(config, dtype, **options)
    make_room(model, found)
    shrink(model)
    return Packing(asked, found, model)


def check_all_read(unexpected: Iterable[str], what: str) -> None:
    """ValueError for packed tensors that nobody read: what they belong to would be random, or wrong."""
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
        notes = "".join(f"; {each}" for each in packing.format.notes)
        warn_user(f"{what} ({packing.format.name}) runs from its packed weights: {size}, {wide}{notes}")
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
