"""Decoder layers of Llama's shape in nine launches instead of about forty.

B sequences, T rows, H hidden size, D head size, Hq/Hkv query and key heads, I intermediate size.

    n = norm(h);  q, k, v = W_qkv n;  rotate, write k and v;  h = h + W_o attention(q)
    n = norm(h);  h = h + W_down (silu(g) * u) with g, u = W_gate_up n

A fused layer replaces a stock one on the twin. Its weights, dense or packed, are merged as `merged` says. Families are
named, in `anatomy`, since only the code of a layer says what it computes; tests hold every one of them against its
stock layer.

The norm that reads a layer's output (the next layer's, or the final one) is computed along with the output, by the
kernel that adds the residual; a `Handover` brings it to its reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from eagle_fast_kernels.draft_head import rope_append, rope_append_ref
from eagle_fast_kernels.launch import use_triton
from eagle_fast_kernels.rms_norm import add_parts, add_parts_ref, add_rms_norm, add_rms_norm_ref, rms_norm
from torch import nn

from eagle_fast.target.anatomy import LlamaLayer, Norm, llama_layer, llama_norm
from eagle_fast.target.interface import binding_of
from eagle_fast.target.merged import can_be_read, merged, single, weight_of


class Ops(NamedTuple):
    """What a layer is computed by: kernels, which check their arguments, or their twins. On a CPU the checks of a layer
    would take as long as a tenth of its products."""

    rope_append: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    add_parts: Callable[..., torch.Tensor]


KERNELS = Ops(rope_append, add_rms_norm, add_parts)
TWINS = Ops(rope_append_ref, add_rms_norm_ref, add_parts_ref)


class Handover:
    """The normed form of hidden states, from the layer that computed it to the module that reads them next."""

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None

    def give(self, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        self.hidden, self.normed = hidden, normed

    def take(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The normed form of these hidden states, if they are the ones (a hook or a copy may have changed them)."""
        normed = self.normed if self.hidden is hidden else None
        self.clear()
        return normed

    def clear(self) -> None:
        self.hidden = self.normed = None


class FusedNorm(nn.Module):
    """Stands in for a stock RMSNorm that reads hidden states."""

    def __init__(self, norm: Norm, handover: Handover):
        super().__init__()
        (self.weight, self.eps), self.handover = norm, handover

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] -> [..., H]."""
        normed = self.handover.take(hidden_states)
        return rms_norm(hidden_states, self.weight, self.eps) if normed is None else normed


class FusedLayer(nn.Module):
    """Stands in for a stock decoder layer; called like it."""

    def __init__(self, stock: LlamaLayer, handover: Handover):
        super().__init__()
        self.layer_index, self.head_dim, self.scale = stock.layer_index, stock.head_dim, stock.scale
        self.qkv, self.gate_up = merged(stock.q, stock.k, stock.v), merged(stock.gate, stock.up)
        self.o, self.down = single(stock.o), single(stock.down)
        self.num_heads, self.num_kv_heads = (each.out_features // self.head_dim for each in (stock.q, stock.k))
        self.input_norm, self.post_norm = FusedNorm(stock.input_norm, handover), stock.post_norm
        self.next_norm: FusedNorm | None = None  # what reads the output, as far as that is known
        self.head_norms: dict[str, Any] = {}  # of q and k, as `rope_append` takes them
        if stock.q_norm is not None and stock.k_norm is not None:
            self.head_norms = {"q_norm": stock.q_norm.weight, "k_norm": stock.k_norm.weight, "eps": stock.q_norm.eps}
        self.binding = binding_of(stock.attention)

    @property
    def device(self) -> torch.device:
        return self.post_norm.weight.device

    def forward(self, hidden_states: torch.Tensor, *_, position_embeddings, **options) -> torch.Tensor:
        """hidden_states [B, T, H] -> [B, T, H]. Step and slab come from the binding, whatever else the model passes."""
        shape = hidden_states.shape
        ops = KERNELS if use_triton(hidden_states) else TWINS
        residual = hidden_states.reshape(-1, shape[-1])
        attended = self._attend(self.qkv.sums(self.input_norm(hidden_states)), position_embeddings, ops)
        attended = self.o.sums(attended.view(len(residual), -1))
        normed, residual = ops.add_rms_norm(attended, residual, *self.post_norm)
        out = self.down.sums(self.gate_up.gated(normed))
        if self.next_norm is None:
            return ops.add_parts(out, residual).view(shape)
        following = self.next_norm
        normed, out = (each.view(shape) for each in ops.add_rms_norm(out, residual, following.weight, following.eps))
        following.handover.give(out, normed)
        return out

    def _attend(self, qkv: torch.Tensor, position_embeddings, ops: Ops) -> torch.Tensor:
        """Attention of rows qkv [B, T, (Hq + 2 Hkv) D], or parts, written to the slab first -> [B, T, Hq, D]."""
        batch, count, _ = qkv.shape[-3:]
        cos, sin = position_embeddings
        if cos.shape[0] == batch:
            cos, sin = cos.reshape(batch * count, -1), sin.reshape(batch * count, -1)
        else:
            cos, sin = (each.expand(batch, -1, -1).reshape(batch * count, -1) for each in (cos, sin))
        step, slab = self.binding.step, self.binding.slab
        keys, values = slab.keys[self.layer_index], slab.values[self.layer_index]
        query = ops.rope_append(
            qkv, None, cos, sin, keys, values, step.first_rows(batch, qkv.device), self.num_heads, self.num_kv_heads,
            **self.head_norms,
        )  # fmt: skip
        return step.attend(query, keys, values, scale=self.scale, window=self.binding.window)


def can_fuse(stock: LlamaLayer, owners: Counter[int]) -> bool:
    """Whether all products are linear layers that can be read, each with a weight of its own, and without biases that
    the fused layer lacks. owners: how many hold each tensor, by its id."""
    unbiased = stock.o, stock.gate, stock.up, stock.down
    linears = stock.q, stock.k, stock.v, *unbiased
    if not all(map(can_be_read, linears)) or any(each.bias is not None for each in unbiased):
        return False
    weights = [weight_of(each) for each in linears]
    return len({each.is_inference() for each in weights}) == 1 and all(owners[id(each)] == 1 for each in weights)


def share_hooks(stock: nn.Module, fused: nn.Module) -> None:
    """Let what is called before the stock module be called before the fused one."""
    fused._forward_pre_hooks = stock._forward_pre_hooks
    fused._forward_pre_hooks_with_kwargs = stock._forward_pre_hooks_with_kwargs


def fuse_layers(layers: nn.ModuleList, decoder: nn.Module, touched: set[nn.Module]) -> Handover:
    """Replace what can be fused in the twin's decoder and its list of layers; returns what they hand over through.

    touched: modules with hooks or a forward of the user's, on them or inside; they stay stock, which runs these.
    """
    handover = Handover()
    held = layers.named_parameters, layers.named_buffers
    owners = Counter(id(weight) for named in held for _, weight in named(remove_duplicate=False))
    for index, layer in enumerate(layers):
        stock = llama_layer(layer)
        if stock is not None and layer not in touched and can_fuse(stock, owners):
            fused = layers[index] = FusedLayer(stock, handover)
            share_hooks(layer, fused)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the separate weights took, before the next layer is merged
    final: Any = getattr(decoder, "norm", None)
    norm = llama_norm(final)
    if norm is not None and final not in touched and isinstance(layers[-1], FusedLayer):
        decoder.norm = FusedNorm(norm, handover)
        share_hooks(final, decoder.norm)
    for layer, following in zip(layers, [*layers[1:], decoder], strict=True):
        reader = following.input_norm if isinstance(following, FusedLayer) else getattr(following, "norm", None)
        if isinstance(layer, FusedLayer) and isinstance(reader, FusedNorm) and reader.device == layer.device:
            layer.next_norm = reader
    return handover
