"""One decoder layer of a draft head, and how its weights are merged and taken apart again.

D head size, Hq/Hkv query/key heads, I intermediate size: q, k and v are one product, so are gate and up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagle_fast.head.activation import find_activation, gated_by
from eagle_fast.head.config import HeadConfig
from eagle_fast.layers.linear import FewRowsLinear


class DraftLayer(nn.Module):
    """The weights of one decoder layer, with what an attention function needs to know about it."""

    def __init__(self, config: HeadConfig, index: int, tensors: dict[str, Tensor]):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_windows[index] if config.sliding_windows else 0  # 0: sees everything
        self.rope_interleaved, self.eps = config.rope_interleaved, config.rms_norm_eps

        def norm(name: str) -> nn.Parameter | None:
            return optional(tensors, f"layers.{index}.{name}.weight")

        def linear(*names: str) -> FewRowsLinear:
            return merged_linear(*(weight_and_bias(tensors, f"layers.{index}.{name}") for name in names))

        self.input_norm = norm("input_layernorm")  # in EAGLE-3's first layer on the embedding
        self.hidden_norm = norm("hidden_norm")
        self.post_norm = frozen(tensors[f"layers.{index}.post_attention_layernorm.weight"])
        self.q_norm, self.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        self.activation = find_activation(config.activation)  # of the gate; None: SiLU, fused with the product

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP's output [..., H], or parts of it as `FewRowsLinear.sums` gives them."""
        act = self.activation
        return self.down.sums(self.gate_up.gated(x) if act is None else gated_by(act, self.gate_up(x)))

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Checkpoint names and tensors: views into the merged weights."""
        query, key, inner = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.down.in_features
        parts: dict[str, Tensor | None] = {
            **split_linear(self.qkv, {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}),
            **split_linear(self.o, {"self_attn.o_proj": self.o.out_features}),
            **split_linear(self.gate_up, {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
            **split_linear(self.down, {"mlp.down_proj": self.down.out_features}),
            "input_layernorm.weight": self.input_norm,
            "hidden_norm.weight": self.hidden_norm,
            "post_attention_layernorm.weight": self.post_norm,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
        }
        return {f"layers.{index}.{name}": tensor for name, tensor in parts.items() if tensor is not None}


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def optional(tensors: dict[str, Tensor], name: str) -> nn.Parameter | None:
    return frozen(tensors[name]) if name in tensors else None


def weight_and_bias(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")


def merged_linear(*parts: tuple[Tensor, Tensor | None]) -> FewRowsLinear:
    """One frozen linear layer from the rows of several."""
    weights, biases = [weight for weight, _ in parts], [bias for _, bias in parts if bias is not None]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
    return FewRowsLinear.of(weight, bias)


def split_linear(linear: nn.Module, rows: dict[str, int]) -> dict[str, Tensor]:
    """The named parts of a merged linear layer, which must not have been replaced by a quantized one."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise ValueError("the head's weights are quantized: export it before, or load it without quantization")
    parts = dict(zip((f"{name}.weight" for name in rows), linear.weight.split(list(rows.values())), strict=True))
    if linear.bias is not None:
        parts |= zip((f"{name}.bias" for name in rows), linear.bias.split(list(rows.values())), strict=True)
    return parts
