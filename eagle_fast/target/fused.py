"""Decoder layers of Llama's shape in nine launches instead of about forty.

B sequences, T rows, H hidden size, D head size, Hq/Hkv query and key heads, I intermediate size.

    n = norm(h);  q, k, v = W_qkv n;  rotate, write k and v;  h = h + W_o attention(q)
    n = norm(h);  h = h + W_down (silu(g) * u) with g, u = W_gate_up n

A fused layer replaces a stock one on the twin. Its merged weights are the storage, and the stock parameters become
views into it, so memory does not double and the user's model computes what it did. Families are named here, since only
the code of a layer says what it computes; tests hold every one of them against its stock layer.

The norm that reads a layer's output (the next layer's, or the final one) is computed along with the output, by the
kernel that adds the residual; a `Handover` brings it to its reader.
"""

from __future__ import annotations

from typing import Any

import torch
from eagle_fast_kernels.draft_head import rope_append
from eagle_fast_kernels.linear import few_rows_sums, gated_matmul
from eagle_fast_kernels.rms_norm import add_parts, add_rms_norm, rms_norm
from eagle_fast_kernels.tree_attention import tree_attention
from torch import nn

from eagle_fast.layers.attention import PrefillStep, prefill_attention
from eagle_fast.layers.linear import is_plain
from eagle_fast.target.interface import LayerBinding

FAMILIES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


class Handover:
    """The normed form of hidden states, from the layer that computed it to the module that reads them."""

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None

    def give(self, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        self.hidden, self.normed = hidden, normed

    def take(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The normed form of these hidden states, if they are the ones (a hook or a copy may have changed them)."""
        normed = self.normed if self.hidden is hidden else None
        self.hidden = self.normed = None
        return normed


class FusedNorm(nn.Module):
    """Stands in for a stock RMSNorm that reads hidden states."""

    def __init__(self, stock: Any):
        super().__init__()
        self.weight, self.variance_epsilon = stock.weight, stock.variance_epsilon
        self.handover = Handover()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] -> [..., H]."""
        normed = self.handover.take(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon) if normed is None else normed


class FusedLayer(nn.Module):
    """Stands in for a stock decoder layer; called like it."""

    def __init__(self, stock: Any):
        super().__init__()
        attention, mlp = stock.self_attn, stock.mlp
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.scale = attention.scaling
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv, self.qkv_bias = merge(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up, _ = merge(mlp.gate_proj, mlp.up_proj)
        self.o, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.input_norm, self.post_norm = FusedNorm(stock.input_layernorm), stock.post_attention_layernorm
        self.next_norm: FusedNorm | None = None  # what reads the output, as far as that is known
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.attention_type = getattr(stock, "attention_type", "full_attention")
        self.binding: LayerBinding = attention.eagle_binding

    def forward(self, hidden_states: torch.Tensor, *_, position_embeddings, **options) -> torch.Tensor:
        """hidden_states [B, T, H] -> [B, T, H]. Step and slab come from the binding, whatever else the model passes."""
        shape = hidden_states.shape
        residual = hidden_states.reshape(-1, shape[-1])
        qkv = few_rows_sums(self.input_norm(hidden_states), self.qkv, bias=self.qkv_bias)
        attended = self._attend(qkv, position_embeddings)
        attended = few_rows_sums(attended.view(len(residual), -1), self.o)
        post = self.post_norm
        normed, residual = add_rms_norm(attended, residual, post.weight, post.variance_epsilon)
        out = few_rows_sums(gated_matmul(normed, self.gate_up), self.down)
        if self.next_norm is None:
            return add_parts(out, residual).view(shape)
        weight, eps = self.next_norm.weight, self.next_norm.variance_epsilon
        normed, out = (each.view(shape) for each in add_rms_norm(out, residual, weight, eps))
        self.next_norm.handover.give(out, normed)
        return out

    def _attend(self, qkv: torch.Tensor, position_embeddings) -> torch.Tensor:
        """Attention of rows qkv [B, T, (Hq + 2 Hkv) D], or parts, written to the slab first -> [B, T, Hq, D]."""
        batch, count, _ = qkv.shape[-3:]
        cos, sin = (each.expand(batch, -1, -1).reshape(batch * count, -1) for each in position_embeddings)
        step, slab, window = self.binding.context.step, self.binding.context.slab, self.binding.window
        assert step is not None
        assert slab is not None
        keys, values = slab.keys[self.layer_idx], slab.values[self.layer_idx]
        slots = step.first_rows(batch, qkv.device)
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.variance_epsilon}
        query = rope_append(qkv, None, cos, sin, keys, values, slots, self.num_heads, self.num_kv_heads, **norms)
        if isinstance(step, PrefillStep):
            return prefill_attention(query, keys, values, step, scale=self.scale, window=window)
        local: dict[str, Any] = {"window": window, "depths": step.depths} if window else {}
        return tree_attention(query, keys, values, step.lengths, step.ancestors, scale=self.scale, **local)


def merge(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of the layers stacked; their own parameters become views into the stack."""
    weights = [linear.weight.detach() for linear in linears]
    weight = _stacked(weights)
    if weight is None:
        weight = torch.cat(weights)
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    return weight, torch.cat([bias.detach() for bias in biases]) if biases else None


def _stacked(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """The stack that these weights are the views of already, if they are: a model may get a second target."""
    first, offset = weights[0], weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not weight.is_contiguous() or weight.storage_offset() != offset:
            return None
        offset += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def can_fuse(layer: Any) -> bool:
    """A layer of a known family, of plain linear layers without biases that the fused one lacks, with SiLU."""
    if type(layer).__name__ not in FAMILIES:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    plain = all(map(is_plain, linears))
    unbiased = plain and all(each.bias is None for each in linears[3:])
    return unbiased and "SiLU" in type(mlp.act_fn).__name__


def share_hooks(stock: nn.Module, fused: nn.Module) -> None:
    """Let what is called before the stock module be called before the fused one."""
    fused._forward_pre_hooks = stock._forward_pre_hooks
    fused._forward_pre_hooks_with_kwargs = stock._forward_pre_hooks_with_kwargs


def fuse_layers(layers: nn.ModuleList, decoder: nn.Module) -> None:
    """Replace what can be fused in the twin's decoder and its list of layers."""
    for index, layer in enumerate(layers):
        if can_fuse(layer):
            fused = layers[index] = FusedLayer(layer)
            share_hooks(layer, fused)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the separate weights took, before the next layer is merged
    final = getattr(decoder, "norm", None)
    if final is not None and isinstance(layers[-1], FusedLayer) and type(final).__name__ in NORMS:
        fused_norm = decoder.norm = FusedNorm(final)
        share_hooks(final, fused_norm)
    for layer, following in zip(layers, [*layers[1:], decoder], strict=True):
        norm = following.input_norm if isinstance(following, FusedLayer) else getattr(following, "norm", None)
        if isinstance(layer, FusedLayer) and isinstance(norm, FusedNorm) and norm.weight.device == layer.o.device:
            layer.next_norm = norm
