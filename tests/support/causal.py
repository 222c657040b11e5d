"""Attention for a draft head on its own, without a slab."""

import torch
from eagle_fast_kernels.draft_head import rope_ref
from eagle_fast_kernels.rms_norm import given_norm_ref

POSITIONS = 10  # most rows of a sequence


class CausalAttention:
    """Attention over everything that came before, keys and values kept by concatenation. Differentiable."""

    def __init__(self, head):
        self.cos, self.sin = head.rope_table(POSITIONS)
        self.kept = {}

    def __call__(self, index, layer, qkv, positions):
        heads = qkv.unflatten(-1, (-1, layer.head_dim))
        q, k, v = heads.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), 2)
        table = positions, self.cos, self.sin, layer.rope_interleaved
        q = rope_ref(given_norm_ref(q, layer.q_norm, layer.eps), *table)
        k = rope_ref(given_norm_ref(k, layer.k_norm, layer.eps), *table)
        if index in self.kept:
            k, v = torch.cat((self.kept[index][0], k), 1), torch.cat((self.kept[index][1], v), 1)
        self.kept[index] = k, v
        distance = positions[:, :, None] - torch.arange(k.shape[1], device=k.device)
        seen = (distance >= 0) & ((distance < layer.window) if layer.window else True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], scale=layer.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)
