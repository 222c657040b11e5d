"""`import eagle_fast.compat` makes `eagle.model` importable: scripts written for SafeAILab/EAGLE run as they are.

    import eagle_fast.compat
    from eagle.model.ea_model import EaModel          # eagle_fast's

or, without touching the script, `python -m eagle_fast.compat SCRIPT [ARGUMENTS]` and, in a checkout of EAGLE,
`python -m eagle_fast.compat -m eagle.evaluation.gen_ea_answer_llama3chat [ARGUMENTS]`. What is there:

    eagle.model.ea_model             EaModel, setup_multi_gpu_inference
    eagle.model.multi_gpu_inference  run_multi_gpu_inference, setup_multi_gpu_inference
    eagle.model.utils                what loops of plain decoding call, and the names that a star import brings along
    eagle.model.kv_cache             initialize_past_key_values, for such loops
    eagle.model.choices              the trees of the checkout that lies beside
    eagle.modelbsne1, eagle.modeling_eagle    batches and any model, as in EAGLE's version 1
    model                            the same as eagle.model, for scripts that are started inside of EAGLE's folder

All else of `eagle` is the checkout's. Scripts that drive SafeAILab's rounds themselves (cnets, tree_decoding) need
SafeAILab's package: they end with an error that says so, and replacing its functions is one too. A package `eagle` that
is installed beside this one is hidden, with a warning; if its `model` is imported already, that is an ImportError.
"""

from __future__ import annotations

import sys

from eagle_fast.model import EaModel
from eagle_fast.upstream.finder import install
from eagle_fast.upstream.loops import initialize_past_key_values, prepare_logits_processor
from eagle_fast.upstream.runner import run_script

__all__ = ["EaModel", "initialize_past_key_values", "install", "prepare_logits_processor", "run_script"]

if __name__ == "__main__":
    run_script(sys.argv[1:])
else:
    install()
