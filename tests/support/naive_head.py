"""A draft head's forward, naively: one sequence, fp64, row by row. Shares no code with the package."""

from __future__ import annotations

import torch
from draft_weights import HEADS, KV_HEADS, D, H, Truth

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast"), ACTIVATIONS["gelu_pytorch_tanh"])


class Naive:
    """One sequence, fp64, a row at a time: keys and values in lists, attention in a loop over heads."""

    def __init__(self, truth: Truth, embedding: torch.Tensor, lm_head: torch.Tensor):
        self.truth = truth
        self.weights = {name: tensor.double() for name, tensor in truth.weights.items()}
        self.embedding = (embedding if truth.embedding is None else truth.embedding).double()
        shared = lm_head if truth.ids is None else lm_head[truth.ids]
        own = self.weights.get("lm_head.weight", truth.lm_head)
        self.lm_head = (shared if own is None else own).double()
        self.keys: list[list] = [[] for _ in range(truth.layers)]
        self.values: list[list] = [[] for _ in range(truth.layers)]

    def embed_features(self, features):
        """g of one row from the target's features [A*Ht]."""
        if not self.truth.eagle3:
            return features
        parts = features.split(H)
        if "fc_norm.0.weight" in self.weights:
            parts = [self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
        features = self.norm(torch.cat(list(parts)), "input_norm")
        return self.linear(features, "fc") if "fc.weight" in self.weights else features

    def row(self, token, g):
        """(what is fed back, what lm_head reads, logits) after one more row."""
        embedded, t = self.embedding[token], self.truth
        if t.eagle3:
            n = self.norm(g, "layers.0.hidden_norm")
            y = n if t.norm_before_residual else g
            x = torch.cat([self.norm(embedded, "layers.0.input_layernorm"), n])
        else:
            y = self.linear(torch.cat([self.norm(embedded, "enorm"), self.norm(g, "hnorm")]), "fc")
            x = self.norm(y, "layers.0.input_layernorm")
        for i in range(t.layers):
            if i:
                x = self.norm(y, f"layers.{i}.input_layernorm")
            y = y + self.attention(x, i)
            x = self.norm(y, f"layers.{i}.post_attention_layernorm")
            gate, up = self.linear(x, f"layers.{i}.mlp.gate_proj"), self.linear(x, f"layers.{i}.mlp.up_proj")
            y = y + self.linear(ACTIVATIONS[t.activation](gate) * up, f"layers.{i}.mlp.down_proj")
        state = self.norm(y, "norm")
        logits = self.lm_head @ state + self.weights.get("lm_head.bias", 0.0)
        return (state if t.norm_output else y), state, logits

    def norm(self, x, name):
        weight = self.weights.get(f"{name}.weight")
        return x if weight is None else x / (x.pow(2).mean() + self.truth.eps).sqrt() * weight

    def linear(self, x, name):
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def attention(self, x, i):
        name, position = f"layers.{i}.self_attn", len(self.keys[i])
        query, key, value = (self.linear(x, f"{name}.{p}_proj").view(-1, D) for p in "qkv")
        query = [self.rotate(self.norm(head, f"{name}.q_norm"), position) for head in query]
        self.keys[i].append([self.rotate(self.norm(head, f"{name}.k_norm"), position) for head in key])
        self.values[i].append(value)
        window = self.truth.windows[i]
        seen = range(max(0, position - window + 1) if window else 0, position + 1)
        out = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            scores = torch.stack([query[h] @ self.keys[i][j][kv] / D**0.5 for j in seen])
            out.append(torch.stack([self.values[i][j][kv] for j in seen]).T @ scores.softmax(0))
        return self.linear(torch.cat(out), f"{name}.o_proj")

    def rotate(self, x, position):
        angles = [position / self.truth.theta ** (2 * p / D) for p in range(D // 2)]
        cos, sin = torch.tensor(angles, dtype=x.dtype).cos(), torch.tensor(angles, dtype=x.dtype).sin()
        if self.truth.interleaved:
            a, b = x[0::2], x[1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten()
        a, b = x[: D // 2], x[D // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin])
