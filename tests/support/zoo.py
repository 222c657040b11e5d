"""Tiny stock transformers models with random weights, one per way in which model families differ.

`make(name)` builds a causal language model of `FAMILIES` (or `REFUSED`) from its real config class: 131 tokens, hidden
size 64, 6 layers, windows and chunks short enough to bite. Its weights are random except in two places, so that greedy
text is varied, top-2 gaps are wide, and a small draft head can be built for it (`often_right.py`):

    embed(t)   = R * e(t)                       constant length, zero mean, first coordinate the same for every token
    lm_head(v) = sum_i weight_i * e(t_i) + noise    t_i: the tokens whose i-th favourite successor is v

R is set by bisection: attention and MLP branches read normalized inputs, so their share of the residual stream falls as
R grows, until FOLLOW of all tokens are followed by their first favourite. Context decides the rest. Greedy text runs
along `successors(VOCAB)[0]`, one cycle through the whole vocabulary, and leaves it where context says so.
"""

from __future__ import annotations

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gptj import modeling_gptj

VOCAB, HIDDEN, LAYERS, WINDOW = 131, 64, 6, 7
FOLLOW = 0.88  # share of tokens that are followed by their first favourite
TOP_LOGIT = 12.0  # mean distance of the largest logit from the mean logit
MARGIN = 0.3  # least lead of the first favourite, in units of its strength, before context
FAVOURITES = (1.0, 0.5, 0.4)  # how strongly a token asks for its first, second, third successor

_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
_SHARED = dict(shared_expert_intermediate_size=48, decoder_sparse_step=1)
_LLAMA4 = dict(
    num_local_experts=4,
    num_experts_per_tok=1,
    head_dim=16,
    intermediate_size_mlp=96,
    attention_chunk_size=8,
    interleave_moe_layer_step=2,
)
_GPT = dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=1024)
_GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=0.5, attention_multiplier=0.25, logits_scaling=8.0)
_ONE_FULL_IN_TWO = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 3)
_ONE_FULL_IN_THREE = dict(
    sliding_window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = dict(
    rope_type="yarn",
    rope_theta=150000.0,
    factor=4.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=128,
)
# Text longer than 64 tokens crosses from the short to the long factors.
_LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 8,
    long_factor=[2.0] * 8,
    original_max_position_embeddings=64,
)

# name -> settings of its config; "of" is the model_type where the name is not.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "llama3_rope": dict(of="llama", rope_parameters=_LLAMA3_ROPE),
    "qwen2": {},
    "qwen2_sliding": dict(of="qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3),
    "qwen3": dict(head_dim=16),
    "mistral": dict(sliding_window=WINDOW, head_dim=16),
    "mixtral": dict(**_MOE, sliding_window=None),
    "qwen2_moe": dict(**_MOE, **_SHARED),
    "qwen3_moe": dict(**_MOE, head_dim=16, decoder_sparse_step=1),
    "olmoe": dict(**_MOE),
    "granitemoe": dict(**_MOE, **_GRANITE),
    "gpt_oss": dict(**_MOE, **_ONE_FULL_IN_TWO, head_dim=16, rope_parameters=_YARN),
    "llama4_text": dict(**_LLAMA4),
    "llama4_temperature": dict(
        **_LLAMA4,
        of="llama4_text",
        no_rope_layers=[1, 0, 1, 0, 1, 0],
        attn_temperature_tuning=True,
        floor_scale=5,
        attn_scale=0.7,
    ),
    "gemma": dict(head_dim=32, num_key_value_heads=1),
    "gemma2": dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3_text": dict(**_ONE_FULL_IN_THREE, head_dim=16, query_pre_attn_scalar=16),
    "phi": dict(num_key_value_heads=4, intermediate_size=128),
    "phi3": dict(sliding_window=WINDOW),
    "phi3_longrope": dict(
        of="phi3", sliding_window=None, original_max_position_embeddings=64, rope_parameters=_LONGROPE
    ),
    "olmo2": {},
    "olmo3": dict(**_ONE_FULL_IN_THREE),
    "granite": dict(**_GRANITE),
    "smollm3": dict(no_rope_layers=[1, 1, 1, 0, 1, 1]),
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(**_ONE_FULL_IN_THREE, logit_scale=0.25),
    "glm": dict(head_dim=16),
    "glm4": dict(head_dim=16),
    "exaone4": dict(**_ONE_FULL_IN_TWO),
    "seed_oss": dict(head_dim=16),
    "hunyuan_alpha": dict(
        of="hunyuan_v1_dense",
        head_dim=16,
        max_position_embeddings=32768,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=1.0, alpha=50.0),
    ),
    "starcoder2": dict(sliding_window=None),
    "stablelm": {},
    "gpt2": dict(**_GPT),
    "gpt_neox": {},
    "opt": dict(ffn_dim=96, word_embed_proj_dim=HIDDEN),
}

# Models whose tree cannot be verified exactly in one forward: eagle_fast refuses them when it loads them.
REFUSED: dict[str, dict] = {
    "llama_dynamic_rope": dict(of="llama", rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    "falcon": {},
    "bloom": dict(n_layer=LAYERS, n_head=4),
    "mpt": dict(d_model=HIDDEN, n_heads=4, n_layers=LAYERS),
    "diffllama": {},
    "doge": {},
    "mamba": dict(state_size=8),
    "qwen3_next": dict(
        **_MOE,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
    ),
}
# Attention of GPT-J goes through transformers' AttentionInterface from 5.24 on.
(FAMILIES if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else REFUSED)["gptj"] = dict(**_GPT, rotary_dim=8)


def make(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, sharp: bool = True, **overrides
) -> PreTrainedModel:
    """Build model `name` in eval mode on the CPU. It has no end-of-sequence token unless `overrides` names one.

    `overrides` are config settings. `sharp=False` (and any model with tied embeddings) keeps plain random weights: the
    text then depends on context through and through, and no head can be built for it.
    """
    settings = _BASE | {**FAMILIES, **REFUSED}[name] | overrides
    config = AutoConfig.for_model(settings.pop("of", name), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sharp = sharp and not config.tie_word_embeddings
    # Strong attention keeps sharp text varied; without the large embeddings it would amplify every rounding error.
    _randomize(model, generator, std=0.25 if sharp else 0.15)
    if sharp:
        _sharpen(model, generator)
    _scale_logits(model, generator)
    model.generation_config.update(eos_token_id=settings["eos_token_id"], pad_token_id=0)
    return model.to(dtype)


def successors(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """[favourites, V]: the tokens that token t asks for next, best first. The first is one cycle through all tokens."""
    generator = torch.Generator().manual_seed(seed)
    cycle = torch.randperm(vocab_size, generator=generator)
    first = torch.empty_like(cycle)
    first[cycle] = cycle.roll(-1)
    return torch.stack([first, *(torch.randperm(vocab_size, generator=generator) for _ in FAVOURITES[1:])])


def _randomize(model: PreTrainedModel, generator: torch.Generator, std: float) -> None:
    """No weight keeps an initial value that hides a mistake: norm weights differ from 1, biases and sinks from 0."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(std * noise)


def _sharpen(model: PreTrainedModel, generator: torch.Generator) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    codes = _codes(*embedding.shape, generator)
    follow = successors(len(codes))
    head.normal_(std=0.02, generator=generator)
    for strength, successor in zip(FAVOURITES, follow, strict=True):
        head.index_add_(0, successor, strength * codes)
    _widen_margins(head, codes, follow[0])

    tokens = torch.randint(len(codes), (8, 48), generator=generator)
    low, high = -2.0, 9.0  # log2 of R
    for _ in range(7):
        middle = (low + high) / 2
        embedding.copy_(2.0**middle * codes)
        share = (model(tokens, use_cache=False).logits.argmax(-1) == follow[0][tokens]).float().mean()
        low, high = (middle, high) if share < FOLLOW else (low, middle)


def _widen_margins(head: torch.Tensor, codes: torch.Tensor, best: torch.Tensor) -> None:
    """Codes are not quite orthogonal: move rows of the head until every token asks for its `best` by a clear margin.

    Without this a few tokens ask for another one, which closes short cycles that greedy text never leaves.
    """
    for _ in range(50):
        logits = codes @ head.T
        rival = logits.scatter(1, best[:, None], -torch.inf).argmax(-1)
        margin = logits.gather(1, best[:, None]) - logits.gather(1, rival[:, None])
        step = 0.05 * (margin < MARGIN) * codes
        head.index_add_(0, best, step).index_add_(0, rival, -step)


def _codes(vocab_size: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """[V, H] of length 1 and mean 0, the first coordinate 1/8, nearly orthogonal otherwise."""
    rest = torch.randn(vocab_size, size - 1, generator=generator)
    rest -= rest.mean(-1, keepdim=True)
    first = 1 / 8
    shift = first / (size - 1)  # lets the rest cancel the first coordinate in the mean
    rest *= math.sqrt(1 - first**2 - (size - 1) * shift**2) / rest.norm(dim=-1, keepdim=True)
    return torch.cat([torch.full((vocab_size, 1), first), rest - shift], dim=-1)


def _scale_logits(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give logits a fixed size, so that gaps between them are far above the rounding errors of a forward."""
    tokens = torch.randint(model.config.vocab_size, (4, 48), generator=generator)
    logits = model(tokens, use_cache=False).logits
    model.get_output_embeddings().weight.mul_(TOP_LOGIT / (logits.amax(-1) - logits.mean(-1)).mean())
