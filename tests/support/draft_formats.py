"""Small draft heads in every public format.

`FORMATS` maps a name to a function that gives a `Sample`: the tensors and config.json as that trainer writes them, and
the head's `Truth`: its weights under plain names and the switches of the formulas.
"""

from __future__ import annotations

import torch
from draft_weights import (
    HEADS,
    KV_HEADS,
    MLP,
    VD,
    D,
    H,
    Sample,
    Truth,
    V,
    eagle1_weights,
    eagle3_weights,
    llama,
    matrix,
    norm,
    plain_eagle3,
    renamed,
    vocabulary,
)  # fmt: skip

# -- EAGLE-1 and -2


def safeailab_eagle1():
    weights = eagle1_weights()
    own = torch.randn(V, H)
    truth = Truth(weights, eagle3=False, features=None, embedding=own)
    return Sample(truth, weights | {"embed_tokens.weight": own}, llama(), storage="bin")


def eagle1_qwen2_qkv_bias():
    bias = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    weights = eagle1_weights(fc_bias=False, bias=bias)
    truth = Truth(weights, eagle3=False, features=None, theta=1e6)
    return Sample(truth, weights, llama(qkv_bias=True, bias=False, rope_theta=1e6, model_type="mixtral"))


def eagle1_two_layers():
    weights = eagle1_weights(layers=2)
    return Sample(Truth(weights, eagle3=False, features=None, layers=2), weights, llama(num_hidden_layers=2))


def vllm_eagle1():
    weights = eagle1_weights()
    head, own = 3 * matrix(V, H), torch.randn(V, H)
    dummies = {"layers.0.input_layernorm.weight": norm(H), "norm.weight": norm(H)}
    tensors = renamed(
        weights | dummies | {"embed_tokens.weight": own},
        layers__="model.layers.",
        norm="model.norm",
        embed="model.embed",
    )
    config = {"model_type": "eagle", "model": llama(), "eagle_fc_bias": True, "truncated_vocab_size": V}
    truth = Truth(weights, eagle3=False, features=None, lm_head=head, embedding=own)
    return Sample(truth, tensors | {"lm_head.weight": head}, config)


def vllm_eagle1_token_map():
    weights, ids = eagle1_weights(), vocabulary()[0]
    head = 3 * matrix(V, H)
    config = {"model_type": "eagle", "model": llama(), "truncated_vocab_size": VD}
    truth = Truth(weights, eagle3=False, features=None, ids=ids, lm_head=head[ids])
    return Sample(truth, weights | {"lm_head.weight": head, "token_map": torch.tensor(ids)}, config)


def speculators_eagle1():
    weights = eagle1_weights(fc_bias=False)
    tensors = renamed(weights, fc__="fusion_fc.", layers__0__="transformer.")
    config = {
        "speculators_model_type": "eagle",
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "transformer_layer_config": llama(),
        "layernorms": False,
        "fusion_bias": False,
    }
    return Sample(Truth(weights, eagle3=False, features=None), tensors, config)


def modelopt_eagle1():
    weights = eagle1_weights(fc_bias=False, norms=("input_layernorm",)) | {"norm.weight": norm(H)}
    eagle = {"use_aux_hidden_state": False, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True}
    config = llama(architectures=["LlamaForCausalLMEagle"], eagle_config=eagle)
    return Sample(Truth(weights, eagle3=False, features=None), weights, config)


def eagle1_normed_fc_inputs():
    weights = eagle1_weights() | {"enorm.weight": norm(H), "hnorm.weight": norm(H)}
    return Sample(Truth(weights, eagle3=False, features=None), weights, llama(add_para_norm=True))


# -- EAGLE-3


def safeailab_eagle3():
    return plain_eagle3()


def angelslim():
    config = dict(architectures=["Eagle3LlamaForCausalLM"], head_dim=10, tie_word_embeddings=True, rope_theta=5e5)
    sample = plain_eagle3(dict(theta=5e5), config)
    sample.storage, sample.warns = "sharded", "head_dim 10 -> 16"
    return sample


def specforge():
    eagle = {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}
    return plain_eagle3(config=dict(architectures=["LlamaForCausalLMEagle3"], head_dim=D, eagle_config=eagle))


def specforge_before_879():
    sample = plain_eagle3(config=dict(norm_output=True))
    sample.arguments = dict(norm_output=False)
    return sample


def _speculators(layer, **extra):
    return {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3DraftModel"],
        "speculators_version": "0.3.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x/y"}},
        "transformer_layer_config": layer,
        "draft_vocab_size": VD,
    } | extra


def speculators_llama():
    layer = llama(head_dim=D, rope_parameters={"rope_type": "default", "rope_theta": 3e5}, rms_norm_eps=1e-5)
    config = _speculators(layer, norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[1, 5, 8])
    truth = dict(norm_before_residual=True, theta=3e5, eps=1e-5, features=(1, 5, 8))
    sample = plain_eagle3(truth, prefix="layers.0.")
    own = torch.randn(V, H)
    sample.truth.embedding, sample.config = own, config
    sample.tensors |= {"embed_tokens.weight": own, "verifier_norm.weight": norm(H), "verifier_lm_head.weight": norm(H)}
    return sample


def speculators_qwen3_deep():
    layer = dict(
        model_type="qwen3", hidden_size=H, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=HEADS
    )
    layer |= dict(num_key_value_heads=KV_HEADS, vocab_size=V, sliding_window=4, use_sliding_window=True)
    layer |= dict(layer_types=["sliding_attention", "full_attention"])  # head_dim is left to q_norm
    config = _speculators(layer, norm_before_fc=True, norm_output=True, target_hidden_size=None)
    sample = plain_eagle3(dict(norm_output=True, windows=(4, 0)), prefix="layers.0.", layers=2, qk_norm=True)
    wide = {"input_norm.weight": norm(3 * H)}
    sample.truth.weights |= wide
    sample.tensors, sample.config = sample.tensors | wide, config
    return sample


def speculators_old():
    layer = {
        k: v for k, v in llama().items() if k not in ("rms_norm_eps", "max_position_embeddings", "num_hidden_layers")
    }
    config = _speculators(
        layer, architectures=["Eagle3Speculator"], auto_map={"": "eagle3.py"}, norm_before_residual=False
    )
    sample = plain_eagle3(prefix="layers.0.")
    sample.config = config | {"has_no_defaults_at_init": False}
    return sample


def modelopt_2025():
    eagle = {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True, "use_last_layernorm": True}
    return plain_eagle3(config=dict(eagle_config=eagle, head_dim=D, rope_scaling=None, rope_theta=10000.0), maps="d2t")


def modelopt_2026():
    """One vocabulary; norms that eagle_config names; boundaries that begin above 1 and end at the last output."""
    eagle = {
        "eagle_aux_hidden_state_layer_ids": [8, 10, 12],
        "norm_before_fc": True,
        "return_hidden_post_norm": True,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
    }
    weights = eagle3_weights(draft_vocab=V) | {"input_norm.weight": norm(3 * H)}
    truth = Truth(weights, features=(8, 10, 12), norm_output=True)
    return Sample(truth, weights, llama(eagle_config=eagle, draft_vocab_size=V))


def modelopt_final_hidden():
    weights = eagle3_weights()
    for name in ("fc.weight", "layers.0.hidden_norm.weight"):
        del weights[name]
    ids, d2t, _ = vocabulary()
    config = llama(eagle_config={"use_aux_hidden_state": False}, draft_vocab_size=VD)
    return Sample(Truth(weights, features=None, ids=ids), weights | {"d2t": d2t}, config)


def final_hidden_through_fc():
    """TensorRT-LLM's DeepSeek heads: narrower than the target, one feature, their own embedding."""
    weights = eagle3_weights(features=1, hidden=32)
    own, (ids, d2t, _) = torch.randn(V, 32), vocabulary()
    config = llama(
        hidden_size=32, eagle_config={"use_aux_hidden_state": False}, num_eagle_features=1, draft_vocab_size=VD
    )
    truth = Truth(weights, features=None, ids=ids, embedding=own)
    return Sample(truth, weights | {"d2t": d2t, "embed_tokens.weight": own}, config)


def no_last_norm():
    sample = plain_eagle3(config=dict(eagle_config={"use_last_layernorm": False}))
    for tensors in (sample.tensors, sample.truth.weights):
        tensors.pop("norm.weight", None)
    return sample


def modelopt_megatron_deep():
    sample = plain_eagle3(config=dict(num_hidden_layers=2), maps="", layers=2, draft_vocab=V)
    sample.config["draft_vocab_size"], sample.truth.ids = V, None
    second = "layers.1.input_layernorm.weight"
    tensors = renamed(sample.tensors, midlayer__="midlayer.0.")
    tensors["layers.1.hidden_norm.weight"] = tensors.pop(second)
    sample.tensors = renamed(tensors, layers__1__="midlayer.1.")
    return sample


def modelopt_module():
    """The draft module as it is named while training."""
    sample = plain_eagle3(maps="d2t", prefix="layers.0.")
    names = dict(
        layers__0__hidden_norm="hidden_norm", layers__0__input_layernorm="input_embeds_norm", lm_head="eagle_lm_head"
    )
    tensors = renamed(sample.tensors, **names)
    sample.tensors = {f"module.eagle_module.{name}": tensor for name, tensor in tensors.items()}
    sample.storage = "odd name"
    return sample


def eagle31_nemo():
    sample = plain_eagle3(dict(norm_output=True), dict(fc_norm=True, norm_output=True), prefix="layers.0.")
    norms = {f"fc_norm.{i}.weight": norm(H) for i in range(3)}
    sample.truth.weights |= norms
    sample.tensors = {
        name if name in ("d2t", "t2d") else f"model.{name}": t for name, t in (sample.tensors | norms).items()
    }
    return sample


def nemo_geglu():
    """NeMo's heads for Gemma: a Llama layer with the target's activation."""
    act = "gelu_pytorch_tanh"
    return plain_eagle3(dict(activation=act), dict(hidden_act=act), prefix="layers.0.")


def eagle1_gelu():
    weights = eagle1_weights(layers=2)
    truth = Truth(weights, eagle3=False, features=None, layers=2, activation="gelu")
    config = llama(num_hidden_layers=2, hidden_activation="gelu")  # Gemma 2 and 3 name it so
    return Sample(truth, weights, {key: value for key, value in config.items() if key != "hidden_act"})


def four_features():
    eagle = {"eagle_aux_hidden_state_layer_ids": [0, 3, 7, 11]}
    return plain_eagle3(dict(features=(0, 3, 7, 11)), dict(eagle_config=eagle, num_aux_hidden_states=4), features=4)


def other_hidden_size():
    sample = plain_eagle3(config=dict(hidden_size=32, target_hidden_size=H), hidden=32)
    own = torch.randn(V, 32)
    sample.truth.embedding = sample.tensors["embed_tokens.weight"] = own
    return sample


def llama4():
    config = dict(model_type="llama4_text", intermediate_size=2 * MLP, intermediate_size_mlp=MLP)
    return plain_eagle3(dict(interleaved=True), config)


def biases():
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    sample = plain_eagle3(config=dict(attention_bias=True, mlp_bias=True, bias=True), bias=names)
    extra = {"fc.bias": torch.randn(H), "lm_head.bias": torch.randn(VD)}
    sample.truth.weights |= extra
    sample.tensors |= extra
    return sample


# -- vocabularies


def targets_lm_head():
    """NVIDIA gpt-oss: draft_vocab_size null, no lm_head, the target's is used."""
    weights = eagle3_weights()
    del weights["lm_head.weight"]
    return Sample(Truth(weights), renamed(weights, layers__0__="midlayer."), llama(draft_vocab_size=None))


def targets_lm_head_rows():
    sample = plain_eagle3()
    del sample.tensors["lm_head.weight"], sample.truth.weights["lm_head.weight"]
    return sample


def tied_lm_head():
    sample = targets_lm_head()
    sample.truth.embedding = sample.truth.lm_head = sample.tensors["embed_tokens.weight"] = torch.randn(V, H)
    sample.config["tie_word_embeddings"] = True
    return sample


def absolute_d2t():
    sample = plain_eagle3()
    sample.tensors["d2t"] = torch.tensor(sample.truth.ids)
    return sample


def only_t2d():
    return plain_eagle3(maps="t2d")


def identity_d2t():
    sample = modelopt_2026()
    maps = {"d2t": torch.zeros(V, dtype=torch.long), "t2d": torch.ones(V, dtype=torch.bool)}
    sample.tensors = sample.tensors | maps
    return sample


FORMATS = {
    make.__name__: make
    for make in (
        safeailab_eagle1, eagle1_qwen2_qkv_bias, eagle1_two_layers, vllm_eagle1, vllm_eagle1_token_map,
        speculators_eagle1, modelopt_eagle1, eagle1_normed_fc_inputs, safeailab_eagle3, angelslim, specforge,
        specforge_before_879, speculators_llama, speculators_qwen3_deep, speculators_old, modelopt_2025, modelopt_2026,
        modelopt_final_hidden, final_hidden_through_fc, no_last_norm, modelopt_megatron_deep, modelopt_module,
        eagle31_nemo, nemo_geglu, eagle1_gelu, four_features, other_hidden_size, llama4, biases, targets_lm_head,
        targets_lm_head_rows, tied_lm_head, absolute_d2t, only_t2d, identity_d2t,
    )
}  # fmt: skip


def sample(name, seed=0) -> Sample:
    torch.manual_seed(seed)
    return FORMATS[name]()
