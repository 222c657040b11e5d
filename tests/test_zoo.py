"""The zoo's promises: varied text, wide gaps, and built heads that are right often, judged by a naive draft loop.

The naive head follows the papers' formulas (EAGLE: arXiv 2401.15077, EAGLE-3: arXiv 2503.01840) and knows nothing of
eagle_fast: every step runs all rows again, without a cache. Row i pairs the target's features of token i with the
embedding of token i + 1; rows that the draft adds use the head's own output in place of features.
"""

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
        """Rows (embedding of tokens [T], hidden [T, H]) -> (outputs [T, H], logits over the target's vocabulary [V])."""
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
