"""The target: a stock causal LM, run over a prompt chunk or over a tree of nodes per sequence.

B sequences, T tree nodes, C tokens of a prompt chunk, F feature width, V vocabulary.

Nothing here knows a model family. A probe forward learns what each attention layer is; a model that cannot be run
exactly is refused with the reason. The features that a draft head reads are taken by hooks on the twin's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.attention import PrefillStep, Step, TreeStep
from eagle_fast.layers.linear import RowOrder, use_few_rows_linear
from eagle_fast.layers.links import Links
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.layers.slab import KVSlab
from eagle_fast.layers.transfers import Transfers, distinct
from eagle_fast.messages import warn_user
from eagle_fast.target.anatomy import (
    Anatomy,
    UnsupportedModel,
    check_linears,
    check_wrapper,
    decoder_layers,
    learned_positions,
    take_temperature,
)
from eagle_fast.target.ends import device_of, dtype_of, num_rows
from eagle_fast.target.exactness import UNMEASURED, UNMEASURED_OFFLOADED
from eagle_fast.target.experts import ExpertChoice
from eagle_fast.target.features import Features
from eagle_fast.target.fused import Handover, fuse_layers
from eagle_fast.target.interface import (
    AttentionCall,
    AttentionContext,
    LayerBinding,
    SlabCache,
    attention_of,
    bind,
    cache_argument,
    use_our_attention,
)
from eagle_fast.target.longrope import LongRope, freeze_alpha_rope, freeze_longrope
from eagle_fast.target.norms import use_row_norms
from eagle_fast.target.probe import probe
from eagle_fast.target.shards import Shard, connect, shards_of
from eagle_fast.target.sound import check_rows, check_shapes, settle
from eagle_fast.target.turns import Turns
from eagle_fast.target.twin import (
    drop_accelerate_hooks,
    execution_device,
    is_offloaded,
    is_touched,
    twin,
    uncompiled,
)
from eagle_fast.target.watch import Portrait, edits, noted, portrait

NO_SOFTCAP = (
    "the model caps its attention scores, and its sdpa implementation leaves the cap out: decoding does the same, to "
    "give the model's own text. Load it with attn_implementation='eager' for the cap"
)
OFFLOADED = (
    "some of the weights lie on the CPU or on disk: accelerate brings them in for every forward, and rounds run many "
    "times slower, without CUDA graphs and fused layers"
)
CHANGES_ITSELF = (
    "a hook changes the model on every forward, which a copy of its modules cannot follow: take the hook off, or let "
    "it change hidden states only"
)
LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class Verified(NamedTuple):
    """What the target says of every node of a tree, or of every token of a text."""

    logits: torch.Tensor  # [B, T, V]
    features: torch.Tensor  # [B, T, F]


class Target:
    """A stock causal LM prepared for tree decoding; `model` itself is left as it is.

    feature_layers: boundaries whose hidden states the draft head reads (k = input of decoder layer k, number of layers
    = output of the last one); empty for the last hidden state after the final norm (EAGLE-1/2).
    draft_device: where the features go, by default to the device of the logits.
    The model may lie on several devices, with one for each layer. `device` is that of the logits, `input_device` that
    of the embedding, `devices` are all of them, that of the logits first. Raises UnsupportedModel.
    turn: whose turn it is to launch forwards, see `Turns`.
    fuse: False leaves every decoder layer to the stock code.
    exactness: whether decoding with a head gives the bits of plain decoding, as the check found it.
    """

    links: Links | None = None  # between ranks, of which it has none

    def __init__(
        self,
        model: PreTrainedModel,
        feature_layers: tuple[int, ...] = (),
        draft_device: torch.device | None = None,
        *,
        fuse: bool = True,
    ):
        model = uncompiled(model)
        check_wrapper(model)
        check_linears(model)
        settle(model)
        check_rows(model)
        self.stock, self.offloaded = model, is_offloaded(model)
        self.exactness = UNMEASURED_OFFLOADED if self.offloaded else UNMEASURED  # until it is checked
        before, self._noted = self._stock_portrait(), set[tuple[int, str]]()
        self.anatomy = Anatomy(model)
        self.capped = attention_of(model) != "sdpa"  # SDPA has no softcap: such a model runs without it
        self.model = twin(model)
        self.decoder = self.model.get_decoder()
        self.experts = ExpertChoice(self.model)
        self.rope_switch = self._check_rope()
        self.transfers = Transfers()
        devices = self._connect()
        self.long_ropes = [module for module in self.model.modules() if isinstance(module, LongRope)]
        self.temperatures = {module: take_temperature(module) for module in self.model.modules()}
        found = decoder_layers(self.decoder, self.anatomy.num_layers)
        calls, self.device = probe(self.model, found and found[1], self.input_device)
        self.transfers.forget()
        now = self._stock_portrait()
        if (now.parts, now.configs) != (before.parts, before.configs):
            raise UnsupportedModel(CHANGES_ITSELF)
        self.devices = distinct([self.device, *devices])
        self.layer_shapes = [call.stored for call in calls]
        check_shapes(self.layer_shapes)
        self.contexts = {device: AttentionContext() for device in distinct(shape.device for shape in self.layer_shapes)}
        self.bindings: list[LayerBinding] = []  # of the layers
        self._bind(calls)
        self.handover, self.row_order = Handover(), RowOrder()
        if not self.offloaded:
            if fuse:
                self.handover = fuse_layers(self.decoder_layers, self.decoder, self.touched)
            use_row_norms(self.model, self.touched)
            use_few_rows_linear(self.model, self.row_order)
            for module in self.model.modules():
                if isinstance(module, PackedLinear):
                    module.order = self.row_order
        lm_head = model.get_output_embeddings()
        self.vocab_size, self.dtype = num_rows(lm_head), dtype_of(lm_head)
        self.draft_device = draft_device or self.device
        self.features = Features(self.decoder, self.decoder_layers, feature_layers, self.transfers, self.draft_device)
        self.max_positions = learned_positions(self.decoder)
        self.turn = Turns([*self.devices, self.draft_device])
        self._portrait = self._stock_portrait()

    # -- once, at load ---------------------------------------------------------------------------------------------

    def _check_rope(self) -> int | None:
        """The sequence length at which longrope models switch their frequencies; None for all others."""
        types = self.anatomy.rope_types
        if "dynamic" in types and not freeze_alpha_rope(self.model):
            raise UnsupportedModel(
                "its rotary embedding is dynamic NTK: keys depend on the length at which they were computed, so there "
                "is no single exact output; load it with another rope_type"
            )
        if "longrope" not in types:
            return None
        freeze_longrope(self.model, self.anatomy.longrope_switch)
        return self.anatomy.longrope_switch

    def _connect(self) -> list[torch.device]:
        """Make the twin run over the devices that it lies on, and return them."""
        self.shards: list[Shard] = []
        if self.offloaded:  # as accelerate does it
            warn_user(OFFLOADED)
            self.input_device = execution_device(self.model)
            return [self.input_device, torch.device("cpu")]
        drop_accelerate_hooks(self.model)
        self.touched: set[nn.Module] = {module for module in self.model.modules() if is_touched(module)}
        self.input_device = device_of(self.model.get_input_embeddings())
        self.shards = shards_of(self.decoder_layers)
        local = distinct([self.input_device, *(shard.device for shard in self.shards)])
        return connect(self.model, self.transfers, local)

    def _bind(self, calls: list[AttentionCall]) -> None:
        """Tell every attention module its context and what its config says that it sees."""
        for call, kind in zip(calls, self._layer_kinds(), strict=True):
            window = self.anatomy.window if kind == "sliding_attention" else None
            if "sliding_window" in call.options and call.options["sliding_window"] != window:
                raise UnsupportedModel(
                    f"a {kind} layer was called with sliding_window={call.options['sliding_window']}, "
                    f"its config says {window}"
                )
            if call.options.get("softcap") and not self.capped:
                warn_user(NO_SOFTCAP)
            chunk = self.anatomy.chunk if kind == "chunked_attention" else None
            context = self.contexts[call.stored.device]
            temperature = self.temperatures[call.module]
            self.bindings.append(LayerBinding(context, window or 0, chunk or 0, self.capped, temperature))
            bind(call.module, self.bindings[-1])
        use_our_attention(self.model)

    def _layer_kinds(self) -> list[str]:
        kinds = self.anatomy.layer_kinds
        if len(kinds) < self.anatomy.num_layers:
            raise UnsupportedModel(
                f"its config names the kinds of {len(kinds)} layers (layer_types), and the model has "
                f"{self.anatomy.num_layers}: name one for each layer"
            )
        kinds = kinds[: self.anatomy.num_layers]  # stock code takes the first ones, where layers were taken out
        unknown = sorted(set(kinds) - set(LAYER_KINDS))
        if unknown:
            raise UnsupportedModel(f"layers of type {unknown} keep a state that cannot branch into a tree")
        return kinds

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """Of the twin. Raises UnsupportedModel where none are found."""
        found = decoder_layers(self.decoder, self.anatomy.num_layers)
        if found is None:
            raise UnsupportedModel("no list of decoder layers was found")
        return found[1]

    # -- each call -------------------------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the stock model is what it was, see `watch`; whatever the tensors of offloaded ones."""
        return self._portrait.is_like(self._stock_portrait(), but=self._noted)

    def leave_out_notes(self) -> None:
        """After forwards of the stock model and the twin: what they set in attributes says nothing of the model."""
        self._noted |= noted(self._portrait, self._stock_portrait())

    def check(self) -> None:
        """After a round was read: nothing waits for anything else."""

    def edits(self) -> int | None:
        """See `watch.edits`: where it differs, keys computed earlier are another model's."""
        return edits(self.stock)

    def new_cache(self, batch: int, capacity: int) -> SlabCache:
        """Keys and values of `batch` sequences of up to `capacity` rows."""
        devices = distinct(rope.device for rope in self.long_ropes)
        long_rows = {device: torch.zeros(batch, dtype=torch.bool, device=device) for device in devices}
        return SlabCache(KVSlab(self.layer_shapes, batch, capacity), self.contexts, long_rows)

    def choose_frequencies(self, cache: SlabCache, lengths: torch.Tensor) -> None:
        """Before sequences of these lengths [B] are prefilled: long frequencies for those past longrope's switch."""
        if self.rope_switch is not None:
            long = lengths > self.rope_switch
            for rows in cache.long_rows.values():
                rows.copy_(long, non_blocking=True)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, start: int, cache: SlabCache) -> torch.Tensor:
        """Run tokens [B, C] at positions start.. into the cache; returns features [B, C, F]. No logits are computed."""
        return self._run_prompt(self.decoder, tokens, start, cache)[1]

    @torch.no_grad()
    def verify(self, tokens: torch.Tensor, step: TreeStep, cache: SlabCache) -> Verified:
        """Run tree nodes [B, T], which write their K and V after the prefix."""
        sent = {device: step.sent_to(device, tokens, self.transfers) for device in self._step_devices()}
        steps = {device: local for device, (_, local) in sent.items()}
        positions = {device: self._node_positions(local) for device, local in steps.items()}
        with self.forward(steps, cache, tree_rows=tokens.numel()):
            out, features = self._run(self.model, sent[self.input_device][0], positions, cache)
        return Verified(out.logits, features)

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> Verified:
        """Run whole texts [B, L], padded behind.

        For training: what the target says after every token, and what a head reads there. Of longrope models, the
        short frequencies.
        """
        out, features = self._run_prompt(self.model, tokens, 0, self.new_cache(*tokens.shape))
        return Verified(out.logits, features)

    @contextmanager
    def forward(
        self, steps: Mapping[torch.device, Step], cache: SlabCache, *, tree_rows: int | None = None
    ) -> Iterator[None]:
        """What the twin's modules find while a forward runs: the step of their device, the slab, longrope's choice, and
        of a tree of `tree_rows` nodes the fitting way to run experts.

        All of it is taken back at the end, and with it what the modules left for each other: tensors sent between
        devices, features taken, a norm handed over; and at the start, should an interrupt or a fork have come before
        the end.
        """
        self._take_back()
        for device, context in self.contexts.items():
            context.step, context.slab = steps[device], cache.slab
        for rope in self.long_ropes:
            rope.long_rows = cache.long_rows[rope.device]
        if tree_rows is not None:
            self.experts.for_rows(tree_rows)
            self.row_order.kept = True
        try:
            yield
        finally:
            self._take_back()

    # -- behind them -----------------------------------------------------------------------------------------------

    def _take_back(self) -> None:
        for context in self.contexts.values():
            context.step = context.slab = context.rotation = None
        for rope in self.long_ropes:
            rope.long_rows = None
        self.transfers.forget()
        self.handover.clear()
        self.row_order.kept = False
        self.experts.restore()
        self.features.clear()

    def _stock_portrait(self) -> Portrait:
        return portrait(self.stock, tensors=not self.offloaded)

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
        steps = {device: PrefillStep(start, count) for device in self.contexts}
        positions = {
            device: torch.arange(start, start + count, device=device).expand(batch, count)
            for device in self._step_devices()
        }
        with self.forward(steps, cache):
            return self._run(module, tokens.to(self.input_device), positions, cache)

    def _run(self, module: nn.Module, tokens: torch.Tensor, positions: dict[torch.device, torch.Tensor], cache):
        """(output of the module, features), within `forward`; positions [B, T] on every device that needs them."""
        first = positions[self.input_device]
        for local in positions.values():
            self.transfers.provide(first, local)
        out = module(input_ids=tokens, position_ids=first, use_cache=True, **{cache_argument(module): cache})
        return out, self.features.take()
