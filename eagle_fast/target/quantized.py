"""Quantized checkpoints that are not packed here (see `packing`): how they are loaded so that decoding gives one text,
or why they are refused.

What transformers can turn into plain weights when it loads them is loaded so; other kinds run through their library's
own layers, if these treat every row of their input alone (see `sound`).
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import BitsAndBytesConfig, CompressedTensorsConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_compressed_tensors_available
from transformers.utils import quantization_config as quantization_configs

from eagle_fast.messages import warn_user
from eagle_fast.target.anatomy import Anatomy, UnsupportedModel

GgufConfig: Any = getattr(quantization_configs, "GgufConfig", None)  # releases without it never keep weights packed
DEQUANTIZE = "dequantize" if "dequantize" in inspect.signature(CompressedTensorsConfig).parameters else "run_compressed"
DENSE = (
    "its weights are dequantized as they are loaded and take {bytes} bytes each: {reason}. The text is exactly that of "
    "the dequantized model"
)


def bitsandbytes_config(asked: list[str]) -> BitsAndBytesConfig:
    """The config that load_in_4bit or load_in_8bit stand for; in 8 bits with no threshold, and with a warning."""
    if asked == ["load_in_8bit"]:
        warn_user(
            "load_in_8bit=True is loaded with llm_int8_threshold=0.0 rather than 6.0: with a threshold, bitsandbytes "
            "picks outlier columns over all rows together, and no token's result is its own"
        )
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(**dict.fromkeys(asked, True))


def quantization_options(
    config: PreTrainedConfig | None, options: dict[str, Any], what: str = "the checkpoint", reason: str = ""
) -> dict[str, Any]:
    """`options` of from_pretrained with the quantization_config that makes the target decodable.

    config: the checkpoint's; None of GGUF files, which have none. what: how to call the checkpoint in an error.
    reason: why its weights are not packed here. Raises ValueError, and UnsupportedModel where no option makes the model
    decodable.
    """
    asked = options.get("quantization_config")
    _check_bitsandbytes(asked, "quantization_config asks for", "pass llm_int8_threshold=0.0")
    if options.get("gguf_file") is not None:
        return options | _gguf_options(asked)
    if config is None:
        return options
    stored = Anatomy(config).quantization
    _check_bitsandbytes(stored, f"{what} is", 'set "llm_int8_threshold": 0.0 in its config.json')
    if stored.get("quant_method") != "compressed-tensors":
        return options
    if not is_compressed_tensors_available():
        raise ValueError(
            f"{what} is in the format of compressed-tensors, and not read without it ({reason}): pip install "
            "compressed-tensors"
        )
    if asked is not None:
        return options
    warn_user(DENSE.format(bytes=_bytes(options.get("dtype"), config), reason=reason))
    dense: dict[str, Any] = {DEQUANTIZE: DEQUANTIZE == "dequantize"}
    return options | {"quantization_config": CompressedTensorsConfig(**dense)}


@contextmanager
def without_its_warning() -> Iterator[None]:
    """Around from_pretrained: transformers warns of a quantization_config beside the checkpoint's, which is ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield


def drop_wrappers(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """After loading weights as plain ones: take off what old releases leave of compressed-tensors.

    That is forwards that round activations, so that the text does not depend on the release, and dictionaries that
    could bring offloaded weights.
    """
    asked = options.get("quantization_config")
    dense = isinstance(asked, CompressedTensorsConfig) and getattr(asked, DEQUANTIZE) == (DEQUANTIZE == "dequantize")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if not dense or (len(places) > 1 and places & {"cpu", "disk"}):
        return
    with suppress(ImportError, AttributeError):  # releases of the library without it wrap nothing
        importlib.import_module("compressed_tensors.offload").remove_dispatch(model)
    for module in model.modules():
        forward = vars(module).get("forward")
        if hasattr(module, "quantization_scheme") or getattr(forward, "__func__", None) is type(module).forward:
            vars(module).pop("forward", None)


def _gguf_options(asked: Any) -> dict[str, Any]:
    """The options that a GGUF file is loaded with."""
    if asked is None:
        warn_user(DENSE.format(bytes="2 or 4", reason="there are no kernels for GGUF's blocks"))
        return {} if GgufConfig is None else {"quantization_config": GgufConfig(dequantize=True)}
    if GgufConfig is not None and isinstance(asked, GgufConfig) and not asked.dequantize:
        raise ValueError(
            "quantization_config=GgufConfig(dequantize=False) keeps the weights in GGUF's blocks, which decoding "
            "cannot read: leave it out, or pass GgufConfig(dequantize=True)"
        )
    return {}


def _check_bitsandbytes(settings: Any, what: str, remedy: str) -> None:
    """UnsupportedModel for int8 of bitsandbytes with a threshold."""
    fields = settings if isinstance(settings, dict) else dict(inspect.getmembers(settings))
    threshold = fields.get("llm_int8_threshold", 6.0)
    if fields.get("load_in_8bit") and threshold:
        raise UnsupportedModel(
            f"{what} bitsandbytes int8 with llm_int8_threshold={threshold}: it picks outlier columns over all rows "
            f"together, so no token's result is its own; {remedy}"
        )


def _bytes(dtype: Any, config: PreTrainedConfig) -> int:
    """Of a weight, once it is dequantized."""
    dtype = config.dtype if dtype in (None, "auto") else dtype
    return 4 if str(dtype).endswith("float32") else 2
