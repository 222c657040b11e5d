"""Our attention and our cache inside stock models, through transformers' `AttentionInterface` and `Cache`.

B sequences, T query rows, Hq/Hkv query and key heads, D head size, L allocated cache rows.

The layers hand over q [B, Hq, T, D] and whatever `Cache.update` returned: here the whole slab views k, v
[B, Hkv, L, D]. What else attention needs of the round is read from the `LayerBinding` on the module, since some
families drop unknown keywords of forward. No mask function is registered under our name, so transformers builds none.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from eagle_fast_kernels.tree_attention import tree_attention
from torch import nn
from transformers import AttentionInterface, GenerationMixin
from transformers.cache_utils import Cache

from eagle_fast.layers.attention import PrefillStep, TreeStep, prefill_attention
from eagle_fast.layers.slab import KVSlab

IMPLEMENTATION = "eagle_fast"
CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on, and before


@dataclass
class AttentionContext:
    """What the current forward is, shared by a target's attention layers on one device and by its cache."""

    step: PrefillStep | TreeStep | None = None
    slab: KVSlab | None = None


@dataclass(frozen=True)
class LayerBinding:
    """What one attention module needs beyond the call: the round's context and its own kind of locality."""

    context: AttentionContext
    window: int = 0
    chunk: int = 0
    capped: bool = True


def eagle_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_
):
    """The function that transformers calls; returns (out [B, T, Hq, D], None)."""
    binding: LayerBinding = module.eagle_binding
    step = binding.context.step
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": binding.window,
        "chunk": binding.chunk,
        "softcap": softcap if softcap and binding.capped else 0.0,
        "sinks": s_aux,
    }
    if isinstance(step, PrefillStep):
        return prefill_attention(query, key, value, step, **options), None
    assert isinstance(step, TreeStep), "attention outside of a prefill or a round"
    depths = step.depths if binding.window or binding.chunk else None
    out = tree_attention(query, key, value, step.lengths, step.ancestors, depths=depths, **options)
    return out, None


AttentionInterface.register(IMPLEMENTATION, eagle_attention)


class SlabCache(Cache):
    """The slab as transformers sees it. Only `update` does work; the other answers keep stock code from asking more."""

    def __init__(self, slab: KVSlab, contexts: dict[torch.device, AttentionContext]):
        self.slab, self.contexts = slab, contexts
        self.layers: list = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write k, v [B, Hkv, T, D] of this forward; return the layer's whole slab views [B, Hkv, L, D]."""
        keys, values = self.slab.keys[layer_idx], self.slab.values[layer_idx]
        step = self.contexts[keys.device].step
        if isinstance(step, PrefillStep):
            keys[:, :, step.start : step.start + step.count] = key_states
            values[:, :, step.start : step.start + step.count] = value_states
        else:
            assert isinstance(step, TreeStep)
            rows = step.slots[:, None, :, None].expand_as(key_states)
            keys.scatter_(2, rows, key_states)
            values.scatter_(2, rows, value_states)
        return keys, values

    def get_seq_length(self, *args, **kwargs) -> int:
        return 0  # positions are always passed

    def get_query_offset(self, *args, **kwargs) -> int:
        return 0

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        return self.slab.capacity, 0

    def get_max_length(self, *args, **kwargs) -> int:
        return self.slab.capacity

    get_max_cache_shape = get_max_length

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.slab.keys)

    @property
    def is_compileable(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.slab.keys)


def cache_argument(module: nn.Module) -> str:
    """What the forward of a stock model or decoder calls its cache."""
    for function in (type(module).forward, GenerationMixin.prepare_inputs_for_generation):  # the latter: their own name
        parameters = inspect.signature(function).parameters
        for name in CACHE_ARGUMENTS:
            if name in parameters:
                return name
    raise AssertionError("this transformers gives its cache a name that is not known here")
