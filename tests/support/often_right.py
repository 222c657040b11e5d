"""EAGLE heads for the models of `zoo.py`, written as checkpoint folders in the format of SafeAILab/EAGLE.

`write_often_right_head`: weights that are built, not trained, and guess most of the target's next tokens. What follows
token t on average is measured on the target (`_averages`); the head only has to know which token it stands on.

    EAGLE-1/2   fc copies the embedding, attention and MLP add nothing: output(t) = embed(t), and embed(t) is the
                target's own average final hidden state on t. The target's lm_head does the rest.
    EAGLE-3     the embedding enters through attention only, so every row must attend to itself. Embeddings share a
                constant coordinate; q and k turn it into the same vector everywhere, and after the rotary encoding
                q_i . k_j = PEAK * sum_m cos((i - j) theta_m), largest by far at i = j. Values carry the new
                embedding minus the previous hidden state, the residual adds that state back: output(t) = embed(t).
                lm_head is the least-squares map from embeddings to the target's average logits.

Such a head is right only if its rows hold the right tokens and see the right keys; it ignores the target's features.
`write_random_head`: random weights in the same formats, for comparing numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

PEAK = 26.0  # a row's own score leads all others by at least 0.5 * PEAK
NUM_HEADS, NUM_KV_HEADS = 4, 2


def write_often_right_head(
    model: PreTrainedModel,
    folder: str | Path,
    kind: str = "eagle3",
    *,
    draft_vocab_size: int | None = None,
    hidden_size: int | None = None,
) -> Path:
    """Write a head whose best guess is usually the token that `model`, a sharp model of the zoo, takes next.

    EAGLE-3 (`kind="eagle3"`) only: `draft_vocab_size` leaves tokens out of the head's vocabulary, `hidden_size` makes
    the head that wide, with an embedding of its own. `kind="eagle"` writes an EAGLE-1/2 head.
    """
    config = _config(model, kind, draft_vocab_size, hidden_size)
    if kind == "eagle3":
        config["head_dim"] = config["hidden_size"] // NUM_KV_HEADS  # values can carry a whole hidden state
    weights = {name: torch.zeros(shape) for name, shape in _shapes(config, kind).items()}
    _fill_norms(weights)
    hidden, logits = _averages(model)
    if kind == "eagle":
        raw = hidden @ model.get_output_embeddings().weight.float().cpu().T
        scale = (raw * logits).sum() / raw.square().sum()  # some targets scale their logits after lm_head
        weights["embed_tokens.weight"] = scale * hidden
        weights["fc.weight"][:, : config["hidden_size"]] = torch.eye(config["hidden_size"])
        return _save(folder, config, weights)

    embedding = model.get_input_embeddings().weight.detach().float().cpu()
    if "embed_tokens.weight" in weights:
        embedding = weights["embed_tokens.weight"] = _embedding(*weights["embed_tokens.weight"].shape)
    normed = embedding * embedding.square().mean(-1, keepdim=True).rsqrt()
    _attend_to_self(weights, config, constant=normed[0, 0].item())
    kept = _choose_vocabulary(weights, config)
    weights["lm_head.weight"] = torch.linalg.lstsq(normed, logits[:, kept]).solution.T
    return _save(folder, config, weights)


def write_random_head(
    model: PreTrainedModel,
    folder: str | Path,
    kind: str = "eagle3",
    seed: int = 0,
    *,
    draft_vocab_size: int | None = None,
    hidden_size: int | None = None,
    **settings,
) -> Path:
    """Write a head with random weights; arguments as above.

    `settings` are fields of config.json and shape the weights: `bias=False` (no fc.bias) or `qkv_bias=True` for an
    EAGLE-1/2 head, `head_dim=32`, `rope_theta=5e5`, `num_key_value_heads=4` and the like.
    """
    config = _config(model, kind, draft_vocab_size, hidden_size) | settings
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else 1 / math.sqrt(shape[1]))
        for name, shape in _shapes(config, kind).items()
    }
    _fill_norms(weights)
    if kind == "eagle3":
        _choose_vocabulary(weights, config)
    return _save(folder, config, weights)


def _config(model: PreTrainedModel, kind: str, draft_vocab_size: int | None, hidden_size: int | None) -> dict:
    """The fields that SafeAILab's checkpoints have. No `rope_theta`: absent means 10000, whatever the target has."""
    assert kind in ("eagle", "eagle3"), kind
    assert kind == "eagle3" or draft_vocab_size is hidden_size is None, "an EAGLE-1/2 head takes these from its target"
    vocab_size, target_size = model.get_input_embeddings().weight.shape
    config = {
        "architectures": ["LlamaForCausalLM" if kind == "eagle" else "LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size or target_size,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if kind == "eagle3":
        config["draft_vocab_size"] = draft_vocab_size or vocab_size
        if hidden_size is not None:
            config["target_hidden_size"] = target_size
    return config


def _shapes(config: dict, kind: str) -> dict[str, tuple[int, ...]]:
    """Every floating-point tensor of a checkpoint, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    rows = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    layer, wide = ("layers.0.", hidden) if kind == "eagle" else ("midlayer.", 2 * hidden)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"{layer}self_attn.{name}_proj.weight": (heads * head_dim, wide) for name, heads in rows.items()},
        f"{layer}self_attn.o_proj.weight": (hidden, config["num_attention_heads"] * head_dim),
        f"{layer}mlp.gate_proj.weight": (inner, hidden),
        f"{layer}mlp.up_proj.weight": (inner, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, inner),
        f"{layer}post_attention_layernorm.weight": (hidden,),
    }
    if kind == "eagle":
        shapes |= {"embed_tokens.weight": (config["vocab_size"], hidden), "fc.weight": (hidden, 2 * hidden)}
        if config.get("bias", True):
            shapes["fc.bias"] = (hidden,)
        if config.get("qkv_bias", False):
            shapes |= {f"{layer}self_attn.{name}_proj.bias": (heads * head_dim,) for name, heads in rows.items()}
        return shapes
    if "target_hidden_size" in config:
        shapes["embed_tokens.weight"] = (config["vocab_size"], hidden)
    return shapes | {
        "fc.weight": (hidden, 3 * config.get("target_hidden_size", hidden)),
        f"{layer}hidden_norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
    }


def _fill_norms(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight += 1


def _choose_vocabulary(weights: dict[str, Tensor], config: dict) -> Tensor:
    """[Vd] target ids that the head can say, ascending. A smaller vocabulary adds its maps to the checkpoint."""
    size, full = config["draft_vocab_size"], config["vocab_size"]
    kept = torch.randperm(full, generator=torch.Generator().manual_seed(1))[:size].sort().values
    if size < full:
        weights["d2t"] = kept - torch.arange(size)
        weights["t2d"] = torch.zeros(full, dtype=torch.bool).index_fill(0, kept, True)
    return kept


def _averages(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(input of lm_head [V, H], logits [V, V]): row t is the target's mean over many random texts, standing on t."""
    inputs: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    vocab_size = head.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(24)])
    with torch.no_grad():
        logits = model(tokens.to(head.weight.device), use_cache=False).logits
    hook.remove()
    order = tokens.flatten().argsort().view(vocab_size, -1)
    return tuple(t.float().cpu().flatten(0, 1)[order].mean(1) for t in (inputs[0], logits))


def _attend_to_self(weights: dict[str, Tensor], config: dict, constant: float) -> None:
    """Attention that returns a row's own embedding - hidden state; `constant` is coordinate 0 of every embedding."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    first_of_pair = torch.arange(head_dim) < head_dim // 2  # rotary turns coordinates m and m + head_dim / 2 together
    for name, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS)):
        strength = math.sqrt(PEAK * math.sqrt(head_dim)) / constant
        weights[f"midlayer.self_attn.{name}_proj.weight"][:, 0] = strength * first_of_pair.repeat(heads)
    identity = torch.eye(hidden)
    weights["midlayer.self_attn.v_proj.weight"] = torch.cat([identity, -identity], dim=1)
    shared = NUM_HEADS // NUM_KV_HEADS  # query heads that read the same values; their outputs are averaged
    weights["midlayer.self_attn.o_proj.weight"] = (
        identity.view(hidden, NUM_KV_HEADS, 1, head_dim).expand(-1, -1, shared, -1).reshape(hidden, -1) / shared
    )


def _embedding(vocab_size: int, size: int) -> Tensor:
    embedding = torch.randn(vocab_size, size, generator=torch.Generator().manual_seed(0))
    embedding *= math.sqrt(size - 1) / embedding[:, 1:].norm(dim=-1, keepdim=True)
    embedding[:, 0] = 1.0
    return embedding


def _save(folder: str | Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder
