"""Exact EAGLE speculative decoding on stock Hugging Face models.

from eagle_fast import EaModel
model = EaModel.from_pretrained(base_model_path="...", ea_model_path="...", device_map="auto")
output_ids = model.eagenerate(input_ids, temperature=0.0, max_new_tokens=512)
"""

from typing import TYPE_CHECKING

from eagle_fast.lazy import names_on_demand as _names_on_demand
from eagle_fast.old_names import install as _install_old_names

if TYPE_CHECKING:
    from eagle_fast.config import SamplingParams, TreeConfig
    from eagle_fast.decoding.generation import Generation, NaNLogitsError, Statistics
    from eagle_fast.model import EaModel
    from eagle_fast.multi_gpu import run_multi_gpu_inference, setup_multi_gpu_inference
    from eagle_fast.target import UnsupportedModel
else:  # when they are asked for, since torch and transformers take seconds
    __getattr__ = _names_on_demand(
        __name__,
        {
            "SamplingParams": "eagle_fast.config",
            "TreeConfig": "eagle_fast.config",
            "Generation": "eagle_fast.decoding.generation",
            "NaNLogitsError": "eagle_fast.decoding.generation",
            "Statistics": "eagle_fast.decoding.generation",
            "EaModel": "eagle_fast.model",
            "run_multi_gpu_inference": "eagle_fast.multi_gpu",
            "setup_multi_gpu_inference": "eagle_fast.multi_gpu",
            "UnsupportedModel": "eagle_fast.target",
            **dict.fromkeys(("config", "decoding", "head", "layers", "loading", "model", "multi_gpu", "target"), ""),
        },
    )

__all__ = [
    "EaModel",
    "Generation",
    "NaNLogitsError",
    "SamplingParams",
    "Statistics",
    "TreeConfig",
    "UnsupportedModel",
    "run_multi_gpu_inference",
    "setup_multi_gpu_inference",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install_old_names()
