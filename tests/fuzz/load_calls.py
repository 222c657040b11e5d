"""Odd calls of loading, with odd arguments, configs and files: each is refused with a sentence that helps, or right.

    python tests/fuzz/load_calls.py --calls 1000 --seed 1 --jobs 2
    python tests/fuzz/load_calls.py --seed 1 --only 1234         # that one alone, in this process

    refused   ValueError, NaNLogitsError, UnsupportedModel; TypeError for an unknown name; in words, with the argument,
              the field, the tensor or the file
    right     the loaded pair decodes what stock `generate` of its base model does
    vague     refused, but without such a name
    raw       any other exception
    wrong     another text
    hung      no end within the time; crashed: the process died

Float32, on the CPU, without a network.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
sys.path.append(str(Path(__file__).parent.parent / "support"))

import torch
import transformers
from decoders import prompt
from load_cases import FAMILIES, Call, loaded, make_call, originals
from workers import Outcome, main

from eagle_fast import EaModel, NaNLogitsError, UnsupportedModel
from eagle_fast.multi_gpu import setup_multi_gpu_inference

SECONDS = 20  # a call may take
NEW = 5
CPU = torch.device("cpu")


def outcome(seed: int, number: int) -> Outcome:
    """Make a call and judge it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = make_call(seed, number, Path(folder))
        torch.manual_seed(0)
        try:
            verdict, said = judge(load(call))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            verdict, said = judge_error(error, call)
    return Outcome(verdict, call.method, f"{call.method}: {call.note}: {said}")


def load(call: Call) -> EaModel:
    options = dict(call.options)
    if call.method == "setup_multi_gpu":
        return setup_multi_gpu_inference(options.pop("base_model_path"), **options)
    if call.method != "EaModel":
        return EaModel.from_pretrained(**options)
    plain = EaModel.from_pretrained(base_model_path=loaded("llama"), ea_model_path=originals("llama") / "head")
    own = {"base_model": plain.base_model, "ea_layer": plain.ea_layer}
    return EaModel(**own | {name: options[name] for name in call.words if name in options})


def judge(model: EaModel) -> tuple[str, str]:
    """Of a pair that was loaded: a short text."""
    ids = prompt(5, CPU)
    settings = model.base_model.generation_config
    settings.max_length, settings.use_cache = None, True  # with 0 for False, stock generate's text is not the model's
    try:
        expected = model.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
    except Exception as error:
        expected, said = None, f"stock generate cannot: {type(error).__name__}: {error}"
    text = model.eagenerate(ids, max_new_tokens=NEW)[0].tolist()
    if expected is None:
        return "right", said
    return ("right" if text == expected else "wrong"), f"{text}, stock {expected}"


def judge_error(error: BaseException, call: Call) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError) and any(f"() takes no {name!r}" in text for name in call.words):
        return "refused", text
    if not isinstance(error, (ValueError, NaNLogitsError, UnsupportedModel)) or isinstance(error, UnicodeError):
        return "raw", text + "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    ours = traceback.extract_tb(error.__traceback__)[-1].filename
    if "/eagle_fast/" not in ours:
        return "raw", f"{text}\n  raised in {ours}"
    if isinstance(error, NaNLogitsError):
        return "refused", text
    named = any(plain(word) in plain(text) for word in call.words)
    return ("refused" if named and len(text.split()) > 4 else "vague"), text


def plain(text: str) -> str:
    """In one spelling of names: the first layer of a head has two."""
    return text.lower().replace("_", " ").replace("-", " ").replace("midlayer.", "layers.0.")


def prepare() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    for family in FAMILIES:
        originals(family)


def describe(seed: int, number: int) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        call = make_call(seed, number, Path(folder))
    return call.method, f"{call.method}: {call.note}"


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor do the workers see a GPU
    sys.exit(main("load_calls", __doc__))
