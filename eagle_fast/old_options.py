"""Loading options of older transformers, in the words that transformers 5 takes without a complaint."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig

QUANTIZED = ("load_in_4bit", "load_in_8bit")


def modern(options: dict[str, Any]) -> dict[str, Any]:
    """options of from_pretrained: load_in_4bit or load_in_8bit as a quantization_config, torch_dtype as dtype.

    Raises ValueError for what is said in both words.
    """
    asked = [name for name in QUANTIZED if options.get(name)]
    options = {name: value for name, value in options.items() if name not in QUANTIZED}
    if "torch_dtype" in options:
        if "dtype" in options:
            raise ValueError("dtype and torch_dtype are the same: pass one of them")
        options["dtype"] = options.pop("torch_dtype")
    if not asked:
        return options
    if options.get("quantization_config") is not None:
        raise ValueError(f"{asked} beside quantization_config: say it in quantization_config alone")
    return options | {"quantization_config": BitsAndBytesConfig(**dict.fromkeys(asked, True))}
