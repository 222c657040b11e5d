"""Exact EAGLE speculative decoding on stock Hugging Face models.

from eagle_fast import EaModel
model = EaModel.from_pretrained(base_model_path="...", ea_model_path="...", device_map="auto")
output_ids = model.eagenerate(input_ids, temperature=0.0, max_new_tokens=512)
"""

from eagle_fast.config import SamplingParams, TreeConfig
from eagle_fast.decoding.generation import Generation, NaNLogitsError, Statistics
from eagle_fast.model import EaModel
from eagle_fast.multi_gpu import run_multi_gpu_inference, setup_multi_gpu_inference
from eagle_fast.old_names import install as _install_old_names
from eagle_fast.target import UnsupportedModel

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

_install_old_names()
