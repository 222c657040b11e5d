"""Two functions for a model over several GPUs of one machine, in one process: no process group, no torchrun.

`setup_multi_gpu_inference` loads the pair, `run_multi_gpu_inference` also continues a text. Both do what
`EaModel.from_pretrained(device_map=...)` does; docs/multi-gpu.md says which device_map to take.
"""

from __future__ import annotations

import os
import warnings

from eagle_fast.config import SamplingParams, check_positive
from eagle_fast.loading import names_options
from eagle_fast.messages import shown
from eagle_fast.model import EaModel
from eagle_fast.prompts import check_text

Path = str | os.PathLike


@names_options
def setup_multi_gpu_inference(
    model_path: Path,
    device_map="auto",
    use_eagle3: bool | None = None,
    ea_model_path: Path | None = None,
    total_token: int = 60,
    depth: int = 7,
    top_k: int = 10,
    threshold: float = 1.0,
    **options,
) -> EaModel:
    """A target and its head, spread over the GPUs as device_map says: "auto", "balanced", "balanced_low_0",
    "sequential", a device, or a dict of modules.

    tensor_parallel=2 among the options cuts every layer over two GPUs instead, which work on it together.
    The tree's three numbers, use_eagle3, threshold and options (dtype, max_memory, ...) are those of
    `EaModel.from_pretrained`, and so are the errors.
    """
    return EaModel.from_pretrained(
        use_eagle3, model_path, ea_model_path, total_token, depth, top_k, threshold, device_map=device_map, **options
    )


@names_options
def run_multi_gpu_inference(
    base_model_path: Path,
    ea_model_path: Path,
    input_text: str,
    use_eagle3: bool | None = None,
    total_token: int = 60,
    depth: int = 7,
    top_k: int = 10,
    threshold: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 0.0,
    max_new_tokens: int = 512,
    max_length: int = 2048,
    device_map="auto",
    *,
    sampling_top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    **options,
) -> str:
    """Load a pair, continue input_text and return both as one text, without special tokens.

    The text is continued as it stands ("Once upon a time"): no chat template is put around it. To put a question to a
    chat model, pass what its tokenizer's apply_chat_template(..., tokenize=False) gives, or use
    `setup_multi_gpu_inference` and the model's `chat`. Everything is loaded anew with each call.
    temperature, top_p, min_p and seed are those of `eagenerate`; sampling_top_k is its top_k, which is the tree's here.
    options go to `EaModel.from_pretrained`. Raises ValueError, besides its own, for an input_text that is no text.
    """
    if not isinstance(input_text, str):
        raise ValueError(f"input_text is a {type(input_text).__name__}: pass a str")
    if not input_text:
        raise ValueError("input_text is empty: there is no token to continue from")
    check_text(input_text, "input_text")
    with warnings.catch_warnings():  # before the minutes of loading; the call itself warns
        warnings.simplefilter("ignore")
        SamplingParams(temperature, top_p, sampling_top_k, min_p, seed)
    check_positive(max_new_tokens=max_new_tokens, max_length=max_length)
    model = setup_multi_gpu_inference(
        base_model_path, device_map, use_eagle3, ea_model_path, total_token, depth, top_k, threshold, **options
    )
    tokenizer = model.get_tokenizer()
    input_ids = tokenizer.encode(input_text, return_tensors="pt")
    if not input_ids.numel():
        raise ValueError(f"input_text={shown(input_text)} has no tokens: there is nothing to continue from")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": sampling_top_k, "min_p": min_p, "seed": seed}
    output_ids = model.eagenerate(input_ids, max_new_tokens=max_new_tokens, max_length=max_length, **sampling)
    return tokenizer.decode(output_ids[0], skip_special_tokens=True)
