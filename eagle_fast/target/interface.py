"""Our attention and our cache inside stock models, through transformers' `AttentionInterface` and `Cache`.

B sequences, T query rows, Hq/Hkv query and key heads, D head size, L allocated cache rows.

A model is bound once: each attention module gets a `LayerBinding`, whose context tells what the running forward is.
The layers hand over q [B, Hq, T, D] and whatever `Cache.update` returned: here the whole slab views k, v
[B, Hkv, L, D]. Nothing of the round travels as an argument of the model, since some families drop keywords that they do
not know. No mask function is registered under our names, so transformers builds no masks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eagle_fast.layers.attention import Step
from eagle_fast.layers.slab import KVSlab, LayerShape
from eagle_fast.target.anatomy import Temperature

CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on, and before
_EAGLE, _RECORDER = "eagle_fast", "eagle_fast_recorder"  # names of our attention functions
_BINDING, _CALLS = "eagle_binding", "eagle_calls"  # attributes of attention modules


# -- what layers know of the running forward ---------------------------------------------------------------------------


class Rotation(NamedTuple):
    """Rotary cos and sin as layers are given them, [1 or B, T, R], and as tables [B T, R] of the rows of a forward."""

    given: tuple[torch.Tensor, torch.Tensor]
    tables: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, given: tuple[torch.Tensor, torch.Tensor], batch: int, count: int) -> Rotation:
        cos, sin = (each.expand(batch, -1, -1).reshape(batch * count, -1) for each in given)
        return cls(given, (cos, sin))

    def is_of(self, given: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether these are the very tensors."""
        return given[0] is self.given[0] and given[1] is self.given[1]


@dataclass
class AttentionContext:
    """What the layers of one device are running: set and taken back by `Target.forward`.

    rotation: what the fused layers were given last; mostly the same for all.
    """

    step: Step | None = None
    slab: KVSlab | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class LayerBinding:
    """What one attention module needs beyond the call: the forward's context, and which keys it sees."""

    context: AttentionContext
    window: int = 0
    chunk: int = 0
    capped: bool = True  # whether a softcap on its scores counts
    temperature: Temperature | None = None

    @property
    def step(self) -> Step:
        assert self.context.step is not None, "attention outside of Target.forward"
        return self.context.step

    @property
    def slab(self) -> KVSlab:
        assert self.context.slab is not None, "attention outside of Target.forward"
        return self.context.slab


def bind(module: nn.Module, binding: LayerBinding) -> None:
    """Tell an attention module of a twin what it belongs to."""
    module.__dict__[_BINDING] = binding


def binding_of(module: nn.Module) -> LayerBinding:
    return module.__dict__[_BINDING]


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention function that a model calls."""
    return model.config._attn_implementation


def attention_function(model: Any) -> Any:
    """What a model calls for attention, where it is no function of its own file."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return ALL_ATTENTION_FUNCTIONS.get(name) if isinstance(name, str) else None


def use_our_attention(model: PreTrainedModel) -> None:
    """From now on a twin, whose attention modules are bound, attends by our kernels."""
    model.config._attn_implementation = _EAGLE


def use_eager_attention(model: PreTrainedModel) -> None:
    """Let a twin attend as its own plain code does."""
    model.config._attn_implementation = "eager"


def _eagle_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_
):
    """The function that transformers calls; returns (out [B, T, Hq, D], None)."""
    binding = binding_of(module)
    if binding.temperature is not None:
        scales = binding.temperature.scales(binding.step.positions(query.device))
        query = (query * scales[:, None, :, None]).to(query.dtype)
    out = binding.step.attend(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=binding.window,
        chunk=binding.chunk,
        softcap=softcap if softcap and binding.capped else 0.0,
        sinks=s_aux,
    )
    return out, None


class AttentionCall(NamedTuple):
    """One call of an attention layer, as it was recorded."""

    module: nn.Module
    key: torch.Tensor
    value: torch.Tensor
    stored: LayerShape  # what the layer keeps per token
    mask: torch.Tensor | None
    options: dict


class Recording(NamedTuple):
    """What the layers of a model asked of attention and of the cache in one forward."""

    calls: list[AttentionCall]
    cache: RecordingCache


@contextmanager
def recorded_attention(model: PreTrainedModel) -> Iterator[Recording]:
    """In this block the attention layers of a twin note how they are called, and attend to themselves alone."""
    calls: list[AttentionCall] = []
    stock = attention_of(model)
    for module in model.modules():
        module.__dict__[_CALLS] = calls
    model.config._attn_implementation = _RECORDER
    try:
        yield Recording(calls, RecordingCache())
    finally:
        model.config._attn_implementation = stock
        for module in model.modules():
            del module.__dict__[_CALLS]


def _recorder(module, query, key, value, attention_mask, **options):
    stored = LayerShape(key.shape[1], key.shape[-1], key.dtype, key.device)
    module.__dict__[_CALLS].append(AttentionCall(module, key, value, stored, attention_mask, options))
    groups = query.shape[1] // key.shape[1]
    return value.repeat_interleave(groups, 1)[:, :, : query.shape[2]].transpose(1, 2).contiguous(), None


AttentionInterface.register(_EAGLE, _eagle_attention)
AttentionInterface.register(_RECORDER, _recorder)


# -- the cache ---------------------------------------------------------------------------------------------------------


class SlabCache(Cache):
    """A slab as transformers sees it. Only `update` does work; the other answers keep stock code from asking more.

    long_rows: which sequences' keys [B] were rotated by longrope's long frequencies, on each device that has such an
    embedding.
    """

    def __init__(
        self,
        slab: KVSlab,
        contexts: dict[torch.device, AttentionContext],
        long_rows: dict[torch.device, torch.Tensor],
    ):
        self.slab, self.contexts, self.long_rows = slab, contexts, long_rows
        self.layers: list = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def row(self, index: int) -> SlabCache:
        """One sequence of this cache, in the same memory: a cache of batch 1."""
        long_rows = {device: rows[index : index + 1] for device, rows in self.long_rows.items()}
        return SlabCache(self.slab.row(index), self.contexts, long_rows)

    def adopt(self, rows: torch.Tensor, other: SlabCache) -> None:
        """Copy the first sequences of `other`, a cache of the same target, to sequences `rows` [R] of this one."""
        self.slab.adopt(rows, other.slab)
        for device, mine in self.long_rows.items():
            mine[rows.to(device)] = other.long_rows[device][: len(rows)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write k, v [B, Hkv, T, D] of this forward; return the layer's whole slab views [B, Hkv, L, D]."""
        keys, values = self.slab.keys[layer_idx], self.slab.values[layer_idx]
        step = self.contexts[keys.device].step
        assert step is not None, "a cache outside of Target.forward"
        step.write(keys, values, key_states, value_states)
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


class RecordingCache(SlabCache):
    """An empty cache that notes what it is given, and who asks it how long it is."""

    def __init__(self) -> None:
        super().__init__(KVSlab([], 1, 1), {}, {})
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer
        self.asked_by: list[nn.Module] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.given[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *args, **kwargs) -> int:
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, nn.Module):
            self.asked_by.append(caller)
        return 0


class PrefixCache(SlabCache):
    """A cache as stock attention knows it, behind a prefix that nobody computed: the first rows of a slab of one
    sequence. `length`: rows in front of the running forward, which its caller keeps."""

    def __init__(self, slab: KVSlab, length: int):
        super().__init__(slab, {}, {})
        self.prefix = self.length = length
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what came behind the prefix, by layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Append k, v [B, Hkv, T, D]; returns all rows [B, Hkv, length + T, D]."""
        keys, values = key_states, value_states
        if layer_idx in self.given:
            keys, values = _behind(self.given[layer_idx][0], keys), _behind(self.given[layer_idx][1], values)
        self.given[layer_idx] = keys, values
        return self._after_prefix(self.slab.keys[layer_idx], keys), self._after_prefix(
            self.slab.values[layer_idx], values
        )

    def _after_prefix(self, stored: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _behind(stored[:, :, : self.prefix].expand(len(rows), -1, -1, -1), rows)

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, *args, **kwargs) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False


def _behind(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, more], 2)


def cache_argument(module: nn.Module) -> str:
    """What the forward of a stock model or decoder calls its cache."""
    for function in (type(module).forward, GenerationMixin.prepare_inputs_for_generation):  # the latter: their own name
        parameters = inspect.signature(function).parameters
        for name in CACHE_ARGUMENTS:
            if name in parameters:
                return name
    raise AssertionError("this transformers gives its cache a name that is not known here")
