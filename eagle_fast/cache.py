"""Keys and values of one target or head: one slab a device, written in place, compacted in place.

B sequences, L rows allocated for each, A most nodes on a path. Row n < lengths[b] holds token n of sequence b; the tree
of the running round lies in the rows after. Accepted nodes are moved to the end of the prefix: keys carry their
absolute rotary position already, so a move is exact.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from eagle_fast_kernels.compact_kv import compact_kv
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from eagle_fast.attention import AttentionContext, PrefillStep, TreeStep
from eagle_fast.transfers import Transfers


class LayerShape(NamedTuple):
    """What a layer stores per token."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class KVSlab:
    """K and V of some layers: layers of one shape and device share a slab [2 * layers, B, Hkv, L, D]."""

    def __init__(self, layers: list[LayerShape], batch: int, capacity: int):
        self.capacity = capacity
        indices: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layers):
            indices.setdefault(shape, []).append(index)
        self.slabs: list[torch.Tensor] = []
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for shape, members in indices.items():
            size = (2 * len(members), batch, shape.num_heads, capacity, shape.head_dim)
            slab = torch.zeros(size, dtype=shape.dtype, device=shape.device)
            self.slabs.append(slab)
            for place, index in enumerate(members):
                self.keys[index], self.values[index] = slab[2 * place], slab[2 * place + 1]

    def compact(self, path: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, transfers: Transfers) -> None:
        """Move tree rows path[b, r], r < counts[b], to rows lengths[b] + r, in every layer, on whichever device."""
        moves: dict[torch.device, tuple[torch.Tensor, ...]] = {path.device: (path, counts, lengths)}
        for slab in self.slabs:
            if slab.device not in moves:
                moves[slab.device] = transfers.packed(slab.device, path, counts, lengths)
            compact_kv(slab, *moves[slab.device])

    def adopt(self, rows: torch.Tensor, other: KVSlab) -> None:
        """Copy the first sequences of `other`, a slab of the same layers, to sequences `rows` [R] of this one."""
        shared = min(self.capacity, other.capacity)
        for mine, theirs in zip(self.slabs, other.slabs, strict=True):
            mine[:, :, :, :shared].index_copy_(1, rows.to(mine.device), theirs[:, : len(rows), :, :shared])


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


CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def cache_argument(module: nn.Module) -> str:
    """What the forward of a stock model or decoder calls its cache."""
    for function in (type(module).forward, GenerationMixin.prepare_inputs_for_generation):  # the latter: their own name
        parameters = inspect.signature(function).parameters
        for name in CACHE_ARGUMENTS:
            if name in parameters:
                return name
    raise AssertionError("this transformers gives its cache a name that is not known here")
