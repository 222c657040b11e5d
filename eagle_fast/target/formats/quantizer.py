"""The quantizer that transformers loads packed weights with: linear layers that become `PackedLinear`, all else stock.

What it is registered under is the quant_method of the config that it is asked for by: the whole way through
from_pretrained is that of transformers, and no other library is needed.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eagle_fast.messages import warn_user
from eagle_fast.target.formats.arriving import ArrivingLinear, fit_to_files, make_room
from eagle_fast.target.formats.choose import format_of
from eagle_fast.target.formats.rounding import Rounding
from eagle_fast.target.formats.scheme import Format

METHOD = "eagle_fast"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What is to be packed: a checkpoint as its own quantization_config says (`stored`), or weights rounded to bits;
    lm_head and embedding rounded to `lm_head_bits`."""

    def __init__(
        self,
        stored: dict[str, Any] | None = None,
        bits: int | None = None,
        lm_head_bits: int | None = None,
        quant_method: str = METHOD,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.stored, self.bits, self.lm_head_bits = stored, bits, lm_head_bits

    @property
    def format(self) -> Format | None:
        """Of the layers; None where they are plain. Raises Unreadable."""
        if self.stored is not None:
            return format_of(self.stored)
        return None if self.bits is None else Rounding(self.bits)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Takes the tensors of a file as they are, one after the other."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **options):
        super().__init__(quantization_config, **options)
        self.pre_quantized = False  # transformers reads ahead where it is

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        found = self.quantization_config.format
        make_room(model, found, self.quantization_config.lm_head_bits)
        fit_to_files(model, [str(each) for each in checkpoint_files or ()])
        ignored = model._keys_to_ignore_on_load_unexpected  # a list, or in later releases a set
        ignored = [] if ignored is None else ignored
        more = [each for each in (found.beside if found else ()) if each not in ignored]
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, *more])

    def param_element_size(self, model, param_name, param):
        """transformers asks a device for as many bytes at once before it loads."""
        module = model.get_submodule(param_name.rpartition(".")[0])
        if isinstance(module, ArrivingLinear) and param is not module.bias:
            return module.packed_bytes_a_number
        return param.element_size()

    def is_serializable(self):
        """Asked by save_pretrained, whose error speaks of warnings."""
        warn_user(
            "packed weights are not written: keep the checkpoint that the model was loaded from, and load it again "
            "with these options"
        )
        return False

    @property
    def is_trainable(self):
        return False


def packed_config(config: PreTrainedConfig, asked: PackedConfig) -> PreTrainedConfig:
    """The config of a packed checkpoint, with this quantizer to load it."""
    config = copy.deepcopy(config)
    config.quantization_config = {
        "quant_method": METHOD, "stored": asked.stored, "lm_head_bits": asked.lm_head_bits,
    }  # fmt: skip
    return config
