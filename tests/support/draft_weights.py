"""Random weights of small draft heads under plain names, the switches of their formulas, and checkpoints on disk.

Target: hidden size 48, 61 tokens, 12 layers. Head: 4 query heads on 2 key heads of 16 (64 wide, not 48), MLP 80.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file

H, V, LAYERS, VD = 48, 61, 12, 23
HEADS, KV_HEADS, D, MLP = 4, 2, 16, 80
TARGET = dict(target_hidden_size=H, target_vocab_size=V, num_target_layers=LAYERS)
DEFAULT_LAYERS = (2, 6, 9)


@dataclass
class Truth:
    """What the head computes. `weights` under plain names; a switch that is off has no weight there."""

    weights: dict[str, torch.Tensor]
    eagle3: bool = True
    features: tuple[int, ...] | None = DEFAULT_LAYERS  # None: the final hidden state
    ids: list[int] | None = None
    theta: float = 10000.0
    eps: float = 1e-6
    interleaved: bool = False
    activation: str = "silu"
    norm_before_residual: bool = False
    norm_output: bool = False
    layers: int = 1
    windows: tuple[int, ...] = (0, 0, 0)
    embedding: torch.Tensor | None = None  # the target's, unless the head has its own
    lm_head: torch.Tensor | None = None


@dataclass
class Sample:
    truth: Truth
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    target: dict[str, int] = field(default_factory=lambda: dict(TARGET))
    arguments: dict[str, Any] = field(default_factory=dict)
    warns: str | None = None
    storage: str = "safetensors"  # or "bin", "sharded", "odd name"

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors = {
            name: tensor.clone() if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in self.tensors.items()
        }
        if self.storage == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        elif self.storage == "sharded":
            names = sorted(tensors)
            shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
            for file, part in shards.items():
                save_file({name: tensors[name] for name in part}, folder / file)
            index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(tensors, folder / ("eagle.safetensors" if self.storage == "odd name" else "model.safetensors"))
        return folder


# -- weights


def matrix(rows, columns):
    return torch.randn(rows, columns) / columns**0.5


def norm(width):
    return 1 + 0.3 * torch.randn(width)


def decoder_layer(prefix, columns, hidden=H, qk_norm=False, bias=(), norms=("post_attention_layernorm",)):
    tensors = {
        "self_attn.q_proj.weight": matrix(HEADS * D, columns),
        "self_attn.k_proj.weight": matrix(KV_HEADS * D, columns),
        "self_attn.v_proj.weight": matrix(KV_HEADS * D, columns),
        "self_attn.o_proj.weight": matrix(hidden, HEADS * D),
        "mlp.gate_proj.weight": matrix(MLP, hidden),
        "mlp.up_proj.weight": matrix(MLP, hidden),
        "mlp.down_proj.weight": matrix(hidden, MLP),
    }
    tensors |= {f"{name}.weight": norm(hidden) for name in norms}
    if qk_norm:
        tensors |= {"self_attn.q_norm.weight": norm(D), "self_attn.k_norm.weight": norm(D)}
    for name in bias:
        tensors[f"{name}.bias"] = torch.randn(len(tensors[f"{name}.weight"]))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def eagle1_weights(layers=1, fc_bias=True, bias=(), norms=()):
    first = ("post_attention_layernorm", *norms)
    weights = {"fc.weight": matrix(H, 2 * H)} | ({"fc.bias": torch.randn(H)} if fc_bias else {})
    weights |= decoder_layer("layers.0.", H, bias=bias, norms=first)
    for i in range(1, layers):
        weights |= decoder_layer(f"layers.{i}.", H, norms=("post_attention_layernorm", "input_layernorm"))
    return weights


def eagle3_weights(features=3, layers=1, hidden=H, draft_vocab=VD, qk_norm=False, bias=()):
    weights = {"fc.weight": matrix(hidden, features * H), "norm.weight": norm(hidden)}
    norms = ("post_attention_layernorm", "input_layernorm", "hidden_norm")
    weights |= decoder_layer("layers.0.", 2 * hidden, hidden, qk_norm, bias, norms)
    for i in range(1, layers):
        weights |= decoder_layer(f"layers.{i}.", hidden, hidden, qk_norm, bias, norms[:2])
    return weights | {"lm_head.weight": 3 * matrix(draft_vocab, hidden)}


def vocabulary():
    """(ids, d2t, t2d) of a random draft vocabulary."""
    ids = torch.randperm(V)[:VD].sort().values
    return ids.tolist(), ids - torch.arange(VD), torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)


def renamed(tensors, **prefixes):
    """Tensors with name prefixes replaced; a dot is spelled as two underscores, a bare name as it is."""
    pairs = [(old.replace("__", "."), new) for old, new in prefixes.items()]

    def rename(name):
        return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), name)

    return {rename(name): tensor for name, tensor in tensors.items()}


def llama(**extra):
    return dict(
        model_type="llama", hidden_act="silu", hidden_size=H, intermediate_size=MLP, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, num_hidden_layers=1, rms_norm_eps=1e-6, vocab_size=V,
        max_position_embeddings=2048,
    ) | extra  # fmt: skip


def plain_eagle3(truth_options=None, config=None, maps="d2t t2d", prefix="midlayer.", **weight_options):
    """An EAGLE-3 sample and the pieces that formats vary."""
    weights = eagle3_weights(**weight_options)
    ids, d2t, t2d = vocabulary()
    tensors = renamed(weights, layers__0__=prefix)
    tensors |= {name: tensor for name, tensor in (("d2t", d2t), ("t2d", t2d)) if name in maps.split()}
    truth = Truth(weights, ids=ids, layers=weight_options.get("layers", 1), **(truth_options or {}))
    return Sample(truth, tensors, llama(draft_vocab_size=VD) | (config or {}))
