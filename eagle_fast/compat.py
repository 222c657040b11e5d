"""`import eagle_fast.compat` makes `eagle.model` importable: scripts written for SafeAILab/EAGLE run as they are.

    import eagle_fast.compat
    from eagle.model.ea_model import EaModel          # eagle_fast's

or, without touching the script, `python -m eagle_fast.compat SCRIPT [ARGUMENTS]`. What is there:

    eagle.model.ea_model             EaModel, setup_multi_gpu_inference
    eagle.model.multi_gpu_inference  run_multi_gpu_inference, setup_multi_gpu_inference
    eagle.model.utils                prepare_logits_processor, and the names that a star import of it brings along
    eagle.model.kv_cache             initialize_past_key_values, to be imported: it cannot be used here

Scripts that drive SafeAILab's loop themselves (cnets, tree buffers, their cache) need SafeAILab's package. A package
`eagle` that is installed beside this one is hidden, with a warning; if it is imported already, that is an ImportError.
"""

from __future__ import annotations

import copy
import random
import runpy
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eagle_fast.model import EaModel
from eagle_fast.multi_gpu import run_multi_gpu_inference, setup_multi_gpu_inference


def prepare_logits_processor(
    temperature: float = 0.0, repetition_penalty: float = 0.0, top_p: float = 0.0, top_k: int = 0
) -> LogitsProcessorList:
    """transformers' processors for these settings, in transformers' order; empty at temperature 0.

    For a decoding loop around another model: `eagenerate` wants temperature, top_p and top_k themselves.
    """
    processors = LogitsProcessorList()
    if temperature <= 1e-5:
        return processors
    if repetition_penalty > 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if 0 < top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


def initialize_past_key_values(*args, **options):
    """Always a NotImplementedError: a cache of SafeAILab's layout is of no use to a stock model."""
    raise NotImplementedError(
        "eagle_fast keeps its caches itself. For decoding without speculation call model.naivegenerate(input_ids); a "
        "script with a decoding loop of its own needs SafeAILab's package"
    )


# Scripts do `from eagle.model.utils import *` and then use torch, random, ... without importing them.
_STAR: dict[str, Any] = {
    "copy": copy, "random": random, "time": time, "torch": torch, "List": list, "Tuple": tuple,
    "LogitsProcessorList": LogitsProcessorList, "RepetitionPenaltyLogitsProcessor": RepetitionPenaltyLogitsProcessor,
    "TemperatureLogitsWarper": TemperatureLogitsWarper, "TopKLogitsWarper": TopKLogitsWarper,
    "TopPLogitsWarper": TopPLogitsWarper, "prepare_logits_processor": prepare_logits_processor,
}  # fmt: skip

_SETUP: dict[str, Any] = {"EaModel": EaModel, "setup_multi_gpu_inference": setup_multi_gpu_inference}
MODULES: dict[str, dict[str, Any]] = {
    "eagle": {},
    "eagle.model": {},
    "eagle.model.ea_model": _SETUP,
    "eagle.model.multi_gpu_inference": _SETUP | {"run_multi_gpu_inference": run_multi_gpu_inference},
    "eagle.model.utils": _STAR,
    "eagle.model.kv_cache": {"initialize_past_key_values": initialize_past_key_values},
}


class _Absent(MetaPathFinder):
    """Says what else of `eagle` there is, where Python would say "No module named 'eagle.model.cnets'"."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("eagle.") and _is_ours(sys.modules.get("eagle")):
            there = ", ".join(name for name, contents in MODULES.items() if contents)
            raise ModuleNotFoundError(f"{fullname}: `eagle` is eagle_fast.compat here and has {there}", name=fullname)
        return None


def install() -> None:
    """Make `eagle.model` importable; a second time changes nothing. See the module's docstring."""
    present = sys.modules.get("eagle")
    if _is_ours(present):
        return
    if present is not None:
        raise ImportError(
            f"`eagle` is imported already, from {_place(present.__spec__)}: import eagle_fast.compat before it, or "
            "leave out the one of them that you don't want"
        )
    hidden = find_spec("eagle")
    if hidden is not None:
        warnings.warn(
            f"eagle_fast.compat hides the package `eagle` at {_place(hidden)}: `import eagle` gives eagle_fast now. "
            "To use that package, don't import eagle_fast.compat",
            stacklevel=2,
        )
    for name, contents in MODULES.items():
        module = ModuleType(name, f"Names of SafeAILab/EAGLE's {name}, from eagle_fast.compat.")
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=not contents)
        if not contents:
            module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    sys.meta_path.append(_Absent())


def _is_ours(module: ModuleType | None) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin == __file__


def _place(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "an unknown place"
    return spec.origin or ", ".join(spec.submodule_search_locations or []) or "an unknown place"


def run_script(arguments: Sequence[str]) -> None:
    """Run a Python script as `python SCRIPT ARGUMENTS` would, with `eagle.model` at hand."""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m eagle_fast.compat SCRIPT [ARGUMENTS]")
    install()
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import eagle_fast.compat  # under its own name; this module is a second copy

    eagle_fast.compat.run_script(sys.argv[1:])
else:
    install()
