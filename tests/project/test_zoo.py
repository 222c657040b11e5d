"""The zoo's promises: varied text, wide gaps, and built heads that are right often, judged by a naive draft loop.

The naive head follows the papers' formulas (EAGLE: arXiv 2401.15077, EAGLE-3: arXiv 2503.01840) and knows nothing of
eagle_fast: every step runs all rows again, without a cache. Row i pairs the target's features of token i with the
embedding of token i + 1; rows that the draft adds use the head's own output in place of features.
"""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from often_right import write_often_right_head, write_random_head
from safetensors.torch import load_file
from zoo import FAMILIES, LAYERS, REFUSED, VOCAB, make

PROMPT = [5, 17, 33, 90, 64, 7, 12, 100]


def rms_norm(x, weight, eps=1e-6):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rotate(x, theta=10000.0):
    """x [heads, T, D], rows at positions 0..T-1."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class NaiveHead:
    """An EAGLE-1/2 or EAGLE-3 head read from its folder: `features` of the target and one forward over all rows."""

    def __init__(self, folder, model):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights, self.model = load_file(folder / "model.safetensors"), model
        self.eagle3 = "norm.weight" in self.weights
        self.layer = "midlayer." if self.eagle3 else "layers.0."
        embedding = self.weights.get("embed_tokens.weight")
        self.embedding = model.get_input_embeddings().weight if embedding is None else embedding

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x):
        return rms_norm(x, self.weights[f"{name}.weight"])

    def features(self, tokens):
        """[T, H]: fc over three layers' inputs (EAGLE-3), or what the target's lm_head reads (EAGLE-1/2)."""
        seen = {}
        layers = next(m for m in self.model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
        places = dict(enumerate(layers)) | {"final": self.model.get_output_embeddings()}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, place=place: seen.update({place: args[0][0]}))
            for place, module in places.items()
        ]
        self.model(tokens[None])
        for hook in hooks:
            hook.remove()
        if not self.eagle3:
            return seen["final"]
        return self.linear("fc", torch.cat([seen[2], seen[LAYERS // 2], seen[LAYERS - 3]], dim=-1))

    def attention(self, x):
        q, k, v = (
            self.linear(f"{self.layer}self_attn.{name}_proj", x).unflatten(-1, (heads, -1)).transpose(0, 1)
            for name, heads in (("q", self.config["num_attention_heads"]), ("k", 2), ("v", 2))
        )
        out = F.scaled_dot_product_attention(
            rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True, scale=1 / math.sqrt(q.shape[-1])
        )
        return self.linear(f"{self.layer}self_attn.o_proj", out[0].transpose(0, 1).flatten(1))

    def __call__(self, tokens, hidden):
        """Rows of tokens [T] and hidden [T, H] -> (outputs [T, H], the last row's logits over target ids [V])."""
        embedded = self.embedding[tokens]
        if self.eagle3:
            embedded = self.norm(f"{self.layer}input_layernorm", embedded)
            x, residual = torch.cat([embedded, self.norm(f"{self.layer}hidden_norm", hidden)], dim=-1), hidden
        else:
            x = residual = self.linear("fc", torch.cat([embedded, hidden], dim=-1))
        y = residual + self.attention(x)
        z = self.norm(f"{self.layer}post_attention_layernorm", y)
        gate = F.silu(self.linear(f"{self.layer}mlp.gate_proj", z))
        y = y + self.linear(f"{self.layer}mlp.down_proj", gate * self.linear(f"{self.layer}mlp.up_proj", z))
        if not self.eagle3:
            return y, self.model.get_output_embeddings()(y[-1])
        logits = torch.full((VOCAB,), -torch.inf)
        ids = torch.arange(self.config["draft_vocab_size"]) + self.weights.get("d2t", 0)
        logits[ids] = self.linear("lm_head", self.norm("norm", y[-1]))
        return y, logits

    def draft(self, text, features, depth):
        """The `depth` tokens that the head expects after `text` [n + 1], given the features [n] of all but the last."""
        tokens, hidden, drafted = text[1:], features, []
        for _ in range(depth):
            outputs, logits = self(tokens, hidden)
            drafted.append(logits.argmax())
            tokens, hidden = torch.cat([tokens, drafted[-1][None]]), torch.cat([hidden, outputs[-1:]])
        return torch.stack(drafted)


@torch.no_grad()
def mean_accepted(model, folder, text, depth=8):
    """Tokens a round when a chain of `depth` is drafted along `text`, the target's own greedy text after PROMPT."""
    head = NaiveHead(folder, model)
    features, at, rounds = head.features(text), len(PROMPT), 0
    while at + depth < len(text):
        drafted = head.draft(text[: at + 1], features[:at], depth)
        at += 1 + int((drafted == text[at + 1 : at + 1 + depth]).cumprod(0).sum())
        rounds += 1
    return (at - len(PROMPT)) / rounds


def greedy(model, num_tokens):
    """(text [prompt + num_tokens], gap between the two largest logits of every step)."""
    out = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0], best[:, 0] - best[:, 1]


@pytest.mark.parametrize("name", [*FAMILIES, *REFUSED])
@torch.no_grad()
def test_every_model_runs_and_repeats(name):
    model, again = make(name, sharp=False), make(name, sharp=False)
    logits = model(torch.tensor([PROMPT])).logits
    assert logits.shape == (1, len(PROMPT), VOCAB)
    assert torch.equal(logits, again(torch.tensor([PROMPT])).logits)
    assert logits.std() > 1
    assert model.config.vocab_size == VOCAB
    assert model.generation_config.eos_token_id is None
    assert not model.training


def test_overrides_reach_the_config():
    model = make("llama", dtype=torch.bfloat16, eos_token_id=7, tie_word_embeddings=True, num_hidden_layers=8)
    assert model.generation_config.eos_token_id == 7
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(model.base_model.layers) == 8
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, "sliding_window") for name in ("qwen2_sliding", "mistral", "phi3", "gpt_oss", "gemma2", "gemma3_text")]
    + [(name, "sliding_window") for name in ("olmo3", "cohere2", "exaone4")]
    + [("llama4_text", "attention_chunk_size")],
)
@torch.no_grad()
def test_windows_bite(name, setting):
    """Without its window a model says the same about the first tokens and something else about the last."""
    tokens = torch.arange(3, 23)[None]
    model = make(name, sharp=False)
    unlimited = make(name, sharp=False, **{setting: 512})
    unlimited.load_state_dict(model.state_dict())
    near, far = model(tokens).logits, unlimited(tokens).logits
    torch.testing.assert_close(near[:, :7], far[:, :7])
    assert (near[:, -1] - far[:, -1]).abs().max() > 0.1


@functools.cache
def sharp_model_and_text(name):
    model = make(name)
    return model, *greedy(model, 80)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "opt"])
def test_greedy_text_is_varied_and_decided(name):
    _, text, gap = sharp_model_and_text(name)
    assert len(text) == len(PROMPT) + 80
    assert text[len(PROMPT) :].unique().numel() > 20
    assert gap.min() > 1e-3


def test_context_decides_the_text_of_a_model_that_is_not_sharp():
    model = make("llama", sharp=False)
    text, gap = greedy(model, 80)
    assert text[len(PROMPT) :].unique().numel() > 20
    assert gap.min() > 1e-4
    with torch.no_grad():
        alone = model(torch.arange(VOCAB)[:, None]).logits[:, 0].argmax(-1)
    assert (alone[text[len(PROMPT) - 1 : -1]] == text[len(PROMPT) :]).float().mean() < 0.2


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "opt", "granite"])
def test_built_head_is_often_right(name, kind, tmp_path):
    model, text, _ = sharp_model_and_text(name)
    accepted = mean_accepted(model, write_often_right_head(model, tmp_path, kind), text)
    assert 3 < accepted < 8.9, "right most of the time; a head that is never wrong would leave rejection untested"


@pytest.mark.parametrize("shape", [{"draft_vocab_size": 120}, {"hidden_size": 96}])
def test_built_head_of_another_shape_is_often_right(shape, tmp_path):
    model, text, _ = sharp_model_and_text("llama")
    assert mean_accepted(model, write_often_right_head(model, tmp_path, **shape), text) > 2.5


@torch.no_grad()
def test_built_head_needs_the_right_rows(tmp_path):
    """Rows that are one token late, the mistake that the pairing of features and tokens invites, cost it everything."""
    model, text, _ = sharp_model_and_text("llama")
    head = NaiveHead(write_often_right_head(model, tmp_path), model)
    features, places = head.features(text), range(len(PROMPT), 48)
    right = [head.draft(text[: at + 1], features[:at], 1)[0] == text[at + 1] for at in places]
    late = [head.draft(text[:at], features[: at - 1], 1)[0] == text[at + 1] for at in places]
    assert sum(right) > 25
    assert sum(late) < 5


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("eagle", {}),
        ("eagle", {"bias": False, "qkv_bias": True}),
        ("eagle3", {}),
        ("eagle3", {"draft_vocab_size": 96, "head_dim": 32}),
        ("eagle3", {"hidden_size": 48}),
    ],
)
@torch.no_grad()
def test_random_heads_are_complete(kind, settings, tmp_path):
    model = make("llama", sharp=False)
    folder = write_random_head(model, tmp_path / "a", kind, **settings)
    head, other = NaiveHead(folder, model), NaiveHead(write_random_head(model, tmp_path / "b", kind, 1), model)
    text = torch.tensor(PROMPT)
    outputs, logits = head(text[1:], head.features(text)[:-1])
    assert outputs.shape == (len(PROMPT) - 1, head.config["hidden_size"])
    assert logits.isfinite().sum() == head.config.get("draft_vocab_size", VOCAB)
    assert logits[logits.isfinite()].std() > 0.3
    assert not torch.equal(logits, other(text[1:], other.features(text)[:-1])[1])
    if "t2d" in head.weights:
        ids = head.weights["t2d"].nonzero()[:, 0]
        assert torch.equal(head.weights["d2t"], ids - torch.arange(len(ids)))
