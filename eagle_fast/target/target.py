"""The target: a stock causal LM, run over a prompt chunk or over a tree of nodes per sequence.

B sequences, T tree nodes, C tokens of a prompt chunk, F feature width, V vocabulary.

Nothing here knows a model family. A probe forward learns what each attention layer is; a model that cannot be run
exactly is refused with the reason. The features that a draft head reads are taken by hooks on the twin's layers.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.attention import PrefillStep, TreeStep
from eagle_fast.layers.linear import use_few_rows_linear
from eagle_fast.layers.slab import KVSlab
from eagle_fast.layers.transfers import Transfers, distinct
from eagle_fast.target.experts import ExpertChoice
from eagle_fast.target.fused import fuse_layers
from eagle_fast.target.interface import IMPLEMENTATION, AttentionContext, LayerBinding, SlabCache, cache_argument
from eagle_fast.target.longrope import LongRope, freeze_longrope, rope_types
from eagle_fast.target.placement import layer_list
from eagle_fast.target.probe import AttentionCall, UnsupportedModel, probe
from eagle_fast.target.shards import Shard, connect, shards_of
from eagle_fast.target.twin import drop_accelerate_hooks, is_offloaded, twin

NO_SOFTCAP = (
    "the model caps its attention scores, and its sdpa implementation leaves the cap out: decoding does the same, to "
    "give the model's own text. Load it with attn_implementation='eager' for the cap"
)
OFFLOADED = (
    "some of the weights lie on the CPU or on disk: accelerate brings them in for every forward, and rounds run many "
    "times slower, without CUDA graphs and fused layers"
)
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class Target:
    """A stock causal LM prepared for tree decoding; `model` itself is left as it is.

    feature_layers: boundaries whose hidden states the draft head reads (k = input of decoder layer k, number of layers
    = output of the last one); empty for the last hidden state after the final norm (EAGLE-1/2).
    draft_device: where the features go, by default to the device of the logits.
    The model may lie on several devices, with one for each layer. `device` is that of the logits, `input_device` that
    of the embedding, `devices` are all of them, that of the logits first. Raises UnsupportedModel.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feature_layers: tuple[int, ...] = (),
        draft_device: torch.device | None = None,
    ):
        self.config = model.config.get_text_config(decoder=True)
        self.capped = model.config._attn_implementation != "sdpa"  # SDPA has no softcap: such a model runs without it
        self.model = twin(model)
        self.decoder = self.model.get_decoder()
        self.experts = ExpertChoice(self.model, self.config)
        self.rope_switch = self._check_rope()
        self.transfers = Transfers()
        self.offloaded = is_offloaded(model)
        devices = self._connect()
        calls, self.device = probe(self.model, self.config, self.input_device)
        self.transfers.forget()
        self.devices = distinct([self.device, *devices])
        self.layer_shapes = [call.shape for call in calls]
        self.contexts = {device: AttentionContext() for device in distinct(shape.device for shape in self.layer_shapes)}
        self._bind(calls)
        if not self.offloaded:
            fuse_layers(self._decoder_layers(), self.decoder)
            use_few_rows_linear(self.model)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.dtype = model.get_output_embeddings().weight.dtype
        self.draft_device = draft_device or self.device
        self._taken: dict[int, torch.Tensor] = {}
        self._order = feature_layers
        self._take_features()
        self.max_positions = self._max_positions()

    # -- once, at load ---------------------------------------------------------------------------------------------

    def _check_rope(self) -> int | None:
        """The sequence length at which longrope models switch their frequencies; None for all others."""
        types = rope_types(self.config)
        if "dynamic" in types:
            raise UnsupportedModel(
                "its rotary embedding is dynamic NTK: keys depend on the length at which they were computed, so there "
                "is no single exact output; load it with another rope_type"
            )
        return freeze_longrope(self.model, self.config) if "longrope" in types else None

    def _connect(self) -> list[torch.device]:
        """Make the twin run over the devices that it lies on, and return them."""
        self.shards: list[Shard] = []
        if self.offloaded:  # as accelerate does it
            warnings.warn(OFFLOADED, stacklevel=4)
            root: Any = self.model
            self.input_device = torch.device(root._hf_hook.execution_device)
            return [self.input_device, torch.device("cpu")]
        drop_accelerate_hooks(self.model)
        self.input_device = cast(torch.device, self.model.get_input_embeddings().weight.device)
        self.shards = shards_of(self._decoder_layers())
        local = distinct([self.input_device, *(shard.device for shard in self.shards)])
        return connect(self.model, self.transfers, local)

    def _bind(self, calls: list[AttentionCall]) -> None:
        window, chunk = getattr(self.config, "sliding_window", None), getattr(self.config, "attention_chunk_size", None)
        for call, kind in zip(calls, self._layer_types(), strict=True):
            expected = window if kind == "sliding_attention" else None
            if "sliding_window" in call.options and call.options["sliding_window"] != expected:
                raise UnsupportedModel(
                    f"a {kind} layer was called with sliding_window={call.options['sliding_window']}, "
                    f"its config says {expected}"
                )
            if call.options.get("softcap") and not self.capped:
                warnings.warn(NO_SOFTCAP, stacklevel=4)
            call.module.__dict__["eagle_binding"] = LayerBinding(
                self.contexts[call.shape.device],
                window=expected or 0,
                chunk=(chunk or 0) if kind == "chunked_attention" else 0,
                capped=self.capped,
            )
        self.model.config._attn_implementation = IMPLEMENTATION

    def _layer_types(self) -> list[str]:
        config = self.config
        types = getattr(config, "layer_types", None)
        if types is None:
            kind = "full_attention"
            if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
                kind = "sliding_attention"
            elif getattr(config, "attention_chunk_size", None) is not None:
                kind = "chunked_attention"
            types = [kind] * config.num_hidden_layers
        unknown = sorted(set(types) - set(LAYER_TYPES))
        if unknown:
            raise UnsupportedModel(f"layers of type {unknown} keep a state that cannot branch into a tree")
        return list(types)

    def _decoder_layers(self) -> nn.ModuleList:
        found = layer_list(self.decoder, self.config.num_hidden_layers)
        if found is None:
            raise UnsupportedModel("no list of decoder layers was found")
        return found[1]

    def _take_features(self) -> None:
        """Keep, on each forward, the hidden states that the draft head reads."""
        layers = self._decoder_layers()

        def keep(boundary, hidden):
            self._taken[boundary] = self.transfers.to(hidden, self.draft_device)

        def keep_input(boundary):
            def hook(module, args, kwargs):
                keep(boundary, args[0] if args else kwargs["hidden_states"])

            return hook

        def keep_output(module, args, output):
            keep(len(layers), output[0] if isinstance(output, tuple) else output)

        def keep_final(module, args, output):
            keep(-1, output[0])

        for boundary in set(self._order):
            if not 0 <= boundary <= len(layers):
                raise ValueError(f"feature layer {boundary}: the target has boundaries 0 to {len(layers)}")
            if boundary == len(layers):
                layers[-1].register_forward_hook(keep_output)
            else:
                layers[boundary].register_forward_pre_hook(keep_input(boundary), with_kwargs=True, prepend=True)
        if not self._order:
            self.decoder.register_forward_hook(keep_final)

    def _max_positions(self) -> int | None:
        """Rows of a learned position table, which bounds the sequence; None for relative or rotary positions."""
        for name, module in self.decoder.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in ("wpe", "embed_positions", "position_embeddings") and isinstance(module, nn.Embedding):
                return module.num_embeddings - getattr(module, "offset", 0)
        return None

    # -- each call -------------------------------------------------------------------------------------------------

    def new_cache(self, batch: int, capacity: int) -> SlabCache:
        return SlabCache(KVSlab(self.layer_shapes, batch, capacity), self.contexts)

    def set_long_rope(self, long: torch.Tensor | None) -> None:
        """[B] bool: which sequences are past the longrope switch. Only for targets with a `rope_switch`."""
        if self.rope_switch is not None:
            for module in self.model.modules():
                if isinstance(module, LongRope):
                    module.long_rows = None if long is None else long.to(module.long_inv_freq.device, non_blocking=True)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, start: int, cache: SlabCache) -> torch.Tensor:
        """Run tokens [B, C] at positions start.. into the cache; returns features [B, C, F]. No logits are computed."""
        self.experts.for_rows(None)
        return self._run_prompt(self.decoder, tokens, start, cache)[1]

    @torch.no_grad()
    def verify(self, tokens: torch.Tensor, step: TreeStep, cache: SlabCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run tree nodes [B, T], which write their K and V after the prefix; returns (logits [B, T, V], features)."""
        self.experts.for_rows(tokens.numel())
        sent = {device: step.sent_to(device, tokens, self.transfers) for device in self._step_devices()}
        for device, context in self.contexts.items():
            context.step = sent[device][1]
        positions = {device: self._node_positions(local) for device, (_, local) in sent.items()}
        out, features = self._run(self.model, sent[self.input_device][0], positions, cache)
        return out.logits, features

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole texts [B, L], padded behind; returns (logits [B, L, V], features [B, L, F]).

        For training: what the target says after every token, and what a head reads there. Of longrope models, the
        short frequencies.
        """
        self.experts.for_rows(None)
        self.set_long_rope(None)
        out, features = self._run_prompt(self.model, tokens, 0, self.new_cache(*tokens.shape))
        return out.logits, features

    # -- behind them -----------------------------------------------------------------------------------------------

    def _step_devices(self) -> list[torch.device]:
        """Where positions are needed: under the embedding, and under every attention layer."""
        return distinct([self.input_device, *self.contexts])

    def _node_positions(self, step: TreeStep) -> torch.Tensor:
        positions = step.lengths[:, None] + step.depths
        if self.max_positions is not None:
            positions = positions.clamp(max=self.max_positions - 1)  # nodes past the end are never emitted
        return positions

    def _run_prompt(self, module: nn.Module, tokens: torch.Tensor, start: int, cache: SlabCache):
        """Run tokens [B, C] at positions start.. through the decoder or the whole model."""
        batch, count = tokens.shape
        for context in self.contexts.values():
            context.step = PrefillStep(start, count)
        positions = {
            device: torch.arange(start, start + count, device=device).expand(batch, count)
            for device in self._step_devices()
        }
        return self._run(module, tokens.to(self.input_device), positions, cache)

    def _run(self, module: nn.Module, tokens: torch.Tensor, positions: dict[torch.device, torch.Tensor], cache):
        """(output of the module, features); positions [B, T] on every device that needs them."""
        first = positions[self.input_device]
        for local in positions.values():
            self.transfers.provide(first, local)
        for context in self.contexts.values():
            context.slab = cache.slab
        try:
            out = module(input_ids=tokens, position_ids=first, use_cache=True, **{cache_argument(module): cache})
            return out, self._features()
        finally:
            for context in self.contexts.values():
                context.slab = None
            self.transfers.forget()
            self._taken = {}

    def _features(self) -> torch.Tensor:
        taken = self._taken
        return torch.cat([taken[k] for k in self._order], -1) if self._order else taken[-1]
