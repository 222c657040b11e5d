"""Loading options that transformers 5 no longer takes, in the words that it takes."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig

QUANTIZED = ("load_in_4bit", "load_in_8bit")


def modern(options: dict[str, Any]) -> dict[str, Any]:
    """options of from_pretrained with load_in_4bit and load_in_8bit as a quantization_config; False leaves them out.

    Raises ValueError if they are given beside a quantization_config.
    """
    asked = [name for name in QUANTIZED if options.get(name)]
    options = {name: value for name, value in options.items() if name not in QUANTIZED}
    if not asked:
        return options
    if options.get("quantization_config") is not None:
        raise ValueError(f"{asked} beside quantization_config: say it in quantization_config alone")
    return options | {"quantization_config": BitsAndBytesConfig(**dict.fromkeys(asked, True))}
