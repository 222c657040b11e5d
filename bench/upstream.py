"""What a round of a SafeAILab/EAGLE checkout takes at a target's shapes, with random weights.

    PYTHON bench/upstream.py CHECKOUT '{"shape": ..., "draft_vocab": 32000, "tree": [60, 7, 10], "context": 512, ...}'

`round.py --upstream` calls it, with a Python that has the checkout's dependencies; nothing of eagle_fast is imported
here. The checkout's own loops run: the time of a round is the difference between a long and a short call, over that of
their rounds, so that neither prefill nor anything else done once counts. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

CLASSES = {
    "llama": ("modeling_llama_kv", "LlamaForCausalLM", "LlamaConfig"),
    "qwen3": ("modeling_qwen3_kv", "Qwen3ForCausalLM", "Qwen3Config"),
}
SHORT, LONG = 4, 36  # tokens; random weights accept next to nothing, so about as many rounds


def build(settings: dict, dtype: torch.dtype, device: str):
    """The checkout's EaModel over random weights, put together without its files."""
    shape = dict(settings["shape"])
    module, name, config_name = CLASSES[shape.pop("model_type")]
    shape["rope_theta"] = shape.pop("rope_parameters")["rope_theta"]
    config = getattr(transformers, config_name)(**shape)
    cnets = importlib.import_module("eagle.model.cnets")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    head_config = importlib.import_module("eagle.model.configs").EConfig(
        **{name: shape[name] for name in names}, draft_vocab_size=settings["draft_vocab"], num_hidden_layers=1,
        max_position_embeddings=shape["max_position_embeddings"], rope_theta=shape["rope_theta"],
    )  # fmt: skip
    nodes, depth, top_k = settings["tree"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            target = getattr(importlib.import_module(f"eagle.model.{module}"), name)(config).eval()
            head = cnets.Model(head_config, bias=False, total_tokens=nodes, depth=depth, top_k=top_k, threshold=1.0)
    finally:
        torch.set_default_dtype(default)
    if head_config.draft_vocab_size == head_config.vocab_size:
        del head.d2t, head.t2d
    head.to(device).to(dtype).diff_device = False
    head.init_tree()
    model = torch.nn.Module.__new__(importlib.import_module("eagle.model.ea_model").EaModel)
    torch.nn.Module.__init__(model)
    model.base_model, model.ea_layer, model.config, model.use_eagle3 = target, head, config, True
    model.tokenizer = SimpleNamespace(eos_token_id=-1)  # nothing ends a text of random weights
    return model.eval()


def milliseconds(generate: Callable, ids: torch.Tensor, settings: dict) -> tuple[float, int]:
    """Time of a round, and the rounds that it was taken over."""
    temperature = settings["temperature"]
    options = {"temperature": temperature, "top_p": 0.9 if temperature else 0.0, "log": True}
    taken = []
    for new_tokens in (SHORT, SHORT, LONG):  # the first compiles and allocates
        synchronize(ids)
        started = time.perf_counter()
        *_, index = generate(ids, max_new_tokens=new_tokens, max_length=ids.shape[1] + 256, **options)
        synchronize(ids)
        taken.append((time.perf_counter() - started, index + 1))
    (short, few), (long, many) = taken[1:]
    return (long - short) / (many - few) * 1e3, many - few


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of SafeAILab/EAGLE")
    parser.add_argument("settings", type=json.loads, help="JSON: shape, draft_vocab, tree, context, dtype, device, ...")
    args = parser.parse_args()
    checkout, settings = args.checkout.resolve(), args.settings
    sys.path.insert(0, str(checkout))
    device = settings["device"]
    torch.manual_seed(0)
    with torch.no_grad():
        model = build(settings, getattr(torch, settings["dtype"]), device)
        ids = torch.randint(0, model.config.vocab_size, (1, settings["context"]), device=device)
        round_ms, rounds = milliseconds(model.eagenerate, ids, settings)
        plain_ms, _ = milliseconds(model.naivegenerate, ids, settings)
    record = {"round_ms": round(round_ms, 2), "plain_ms": round(plain_ms, 2), "rounds": rounds}
    print(json.dumps({**record, "torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
