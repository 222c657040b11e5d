"""The format of a checkpoint, by its quantization_config; or the reason why it is none that is read here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eagle_fast.target.formats.awq import Awq
from eagle_fast.target.formats.compressed import Compressed
from eagle_fast.target.formats.fp8 import FbgemmFp8, Fp8
from eagle_fast.target.formats.gptq import Gptq
from eagle_fast.target.formats.scheme import Format, Unreadable

FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": Compressed,
    "fp8": Fp8,
    "fbgemm_fp8": FbgemmFp8,
}


def format_of(settings: dict[str, Any]) -> Format:
    """Of a quantization_config. Raises Unreadable."""
    method = settings.get("quant_method")
    if method not in FORMATS:
        raise Unreadable(f"its quant_method is {method!r}, and {', '.join(FORMATS)} are read natively")
    try:
        return FORMATS[method](settings)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"its quantization_config is odd ({type(error).__name__}: {error})") from error
