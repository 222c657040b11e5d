"""Targets whose weights are packed as they are loaded: whether, and what transformers is told."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from eagle_fast.loading_options import CONFIG_OPTIONS, transformers_options
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.formats.scheme import Unreadable
from eagle_fast.target.packing import Bits, Packing, packing_at_load, packing_of_file


def packing_of(
    config: PreTrainedConfig | None,
    path: str,
    options: dict[str, Any],
    bits: Bits,
    what: str,
    dtype: torch.dtype | None,
) -> tuple[Packing | None, str]:
    """(how the weights are packed here, or None; why they are not, where they are packed in the file).

    options: of from_pretrained. dtype: of what is not packed, None for the checkpoint's. Raises ValueError.
    """
    trusted = bool(options.get("trust_remote_code"))
    if bits:
        if is_adapter(path):
            raise ValueError(f"{bits}, but {what} is an adapter: merge it into its model first")
        return packing_at_load(bits, config, options, what, dtype, trust_remote_code=trusted), ""
    if config is None or "quantization_config" in options or not Anatomy(config).is_quantized:
        return None, ""
    if is_adapter(path):
        return None, "adapters go with layers of their library"
    try:
        return packing_of_file(config, dtype, trust_remote_code=trusted), ""
    except Unreadable as reason:
        return None, str(reason)


def packed_options(packing: Packing, path: str, options: dict[str, Any], config: Any) -> dict[str, Any]:
    """Options of from_pretrained for a target that is packed as it is loaded.

    A config that is given takes no fields beside it, so they are put into it.
    """
    fields = {
        name: value
        for name, value in options.items()
        if Anatomy(config).has_field(name) and name not in transformers_options()
    }
    if fields and packing.asked.stored is not None and options.get("config") is None:
        hub = {key: options[key] for key in CONFIG_OPTIONS if key in options}
        config = AutoConfig.from_pretrained(path, **hub, **fields)
        options = {name: value for name, value in options.items() if name not in fields}
    return options | packing.options(config)


def is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "adapter_config.json"))
