"""The weights of one rank of a model of Llama's shape: its heads, its part of every MLP, its part of the vocabulary.

B sequences, T rows, H hidden size, D head size, V vocabulary.

What a rank holds is cut off a stock layer and copied to its device. The embedding, norms and rotary frequencies are
whole on every rank; of tied embeddings the lm_head's part is a view. Biases of products that are added up over ranks
are the first rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eagle_fast_kernels.draft_head import run_rope_append
from eagle_fast_kernels.embedding import embedding_rows
from eagle_fast_kernels.packed_layout import Packed
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.layers.attention import Step
from eagle_fast.layers.cuts import HeadShare, deal_dimension, deal_groups, deal_heads
from eagle_fast.layers.linear import COLUMNS, ROWS, RowOrder
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.layers.slab import KVSlab, LayerShape
from eagle_fast.target.anatomy import (
    Anatomy,
    LlamaLayer,
    Norm,
    UnsupportedModel,
    decoder_layers,
    final_norm,
    llama_layer,
    llama_norm,
    rotary_of,
)
from eagle_fast.target.ends import are_tied, dtype_of, ends, matrix
from eagle_fast.target.formats.arriving import ArrivingLinear, Unloaded
from eagle_fast.target.merged import weight_of
from eagle_fast.target.rank_parts import PartLinear, part_of, rows_of, tensors_of, whole_on

PACKED = ArrivingLinear, PackedLinear, Unloaded
INSTEAD = "leave tensor_parallel out: device_map='balanced' spreads layers over GPUs"


class Cuts(NamedTuple):
    """What each rank has of heads, of an MLP's width and of the vocabulary."""

    heads: list[HeadShare]
    inner: list[range]
    vocabulary: list[range]

    def of(self, rank: int) -> Share:
        return Share(rank, self.heads[rank], self.inner[rank], self.vocabulary[rank])


class Share(NamedTuple):
    """The same of one rank."""

    rank: int
    heads: HeadShare
    inner: range
    vocabulary: range


def cuts_for(model: PreTrainedModel, ranks: int) -> Cuts:
    """UnsupportedModel, which names layer shards as the way, for models that cannot be cut, or not so often."""
    check_family(model)
    anatomy = Anatomy(model)
    rows = ends(model)[1].out_features
    inner = deal_groups if is_packed(model) else deal_dimension
    try:
        return Cuts(
            deal_heads(anatomy.num_heads, anatomy.num_kv_heads, ranks),
            inner(anatomy.intermediate_size, ranks),
            deal_dimension(rows, ranks),
        )
    except ValueError as error:
        raise UnsupportedModel(f"tensor_parallel over {ranks} ranks: {error}; {INSTEAD}") from error


def is_packed(model: PreTrainedModel) -> bool:
    """Whether some linear layers of a decoder are packed, or will be."""
    return any(isinstance(each, PACKED) for each in linears_of(model))


def linears_of(model: PreTrainedModel) -> list[Any]:
    """Those that are cut, of all layers of a model of a known family."""
    found = decoder_layers(model, Anatomy(model).num_layers)
    layers = [llama_layer(layer) for layer in (found[1] if found else ())]
    return [
        each
        for layer in layers
        if layer is not None
        for each in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    ]


def cut_bytes(model: PreTrainedModel, cuts: Cuts) -> list[int]:
    """Bytes of weights on each rank, of a model on the meta device perhaps; norms not counted."""
    anatomy, (embedding, lm_head) = Anatomy(model), ends(model)
    sizes = list(map(stored_bytes, linears_of(model)))
    attention = [sum(sizes[place::7]) for place in range(4)]  # q, k, v, o
    inner = sum(sum(sizes[place::7]) for place in range(4, 7))
    found = []
    for share in map(cuts.of, range(len(cuts.heads))):
        query, kv = len(share.heads.query), len(share.heads.kv)
        layers = (attention[0] + attention[3]) * query // anatomy.num_heads
        layers += (attention[1] + attention[2]) * kv // anatomy.num_kv_heads
        layers += inner * len(share.inner) // anatomy.intermediate_size
        tail = 0
        if not are_tied(embedding, lm_head):
            tail = stored_bytes(lm_head) * len(share.vocabulary) // lm_head.out_features
        found.append(layers + tail + stored_bytes(embedding))
    return found


def stored_bytes(linear: Any) -> int:
    """Of a weight, or about as many as it will take once it is packed."""
    if isinstance(linear, ArrivingLinear):
        return linear.scheme.num_bytes(linear.out_features, linear.in_features)
    return linear.num_bytes if isinstance(linear, PackedLinear) else weight_of(linear).nbytes


def check_family(model: PreTrainedModel) -> None:
    """UnsupportedModel for a model, on the meta device perhaps, whose layers are not all of Llama's shape."""
    anatomy, kind = Anatomy(model), type(model).__name__
    found = decoder_layers(model, anatomy.num_layers)
    norm = final_norm(model.get_decoder())
    layers = [] if found is None else [llama_layer(layer) for layer in found[1]]
    if not layers or None in layers or llama_norm(norm) is None or rotary_of(model.get_decoder()) is None:
        raise UnsupportedModel(
            f"tensor_parallel cuts the layers of Llama, Mistral, Qwen2 and Qwen3, and {kind} is none of them: {INSTEAD}"
        )
    tied = are_tied(*ends(model))
    if tied and getattr(ends(model)[1], "bias", None) is not None:
        raise UnsupportedModel(f"tensor_parallel does not know a tied lm_head with a bias yet: {INSTEAD}")
    foreign = {type(each).__name__ for each in linears_of(model) if type(each) not in (nn.Linear, *PACKED)}
    if foreign:
        raise UnsupportedModel(f"tensor_parallel does not cut layers of a library ({', '.join(foreign)}): {INSTEAD}")
    kinds, odd = set(anatomy.layer_kinds), {"longrope", "dynamic"} & anatomy.rope_types
    if odd or kinds - {"full_attention", "sliding_attention"}:
        what = f"rope_type {odd.pop()!r}" if odd else f"layers of type {sorted(kinds)}"
        raise UnsupportedModel(f"tensor_parallel does not know {what} yet: {INSTEAD}")


class RankLayer:
    """One rank's part of a decoder layer, whose `down` has no order of columns. order: of whoever runs it. ValueError
    for packed weights that do not lie so."""

    def __init__(self, stock: LlamaLayer, share: Share, device: torch.device, window: int, order: RowOrder):
        def part(linears: Sequence[Any], parts: Sequence[range], axis: int = ROWS) -> PartLinear:
            return part_of(linears, parts, axis, device, order, biased=axis == ROWS or share.rank == 0)

        query, kv = share.heads.rows(stock.head_dim)
        self.index, self.scale, self.window = stock.layer_index, stock.scale, window
        self.qkv = part([stock.q, stock.k, stock.v], [query, kv, kv])
        self.o = part([stock.o], [query], COLUMNS)
        self.gate_up = part([stock.gate, stock.up], [share.inner, share.inner])
        self.down = part([stock.down], [share.inner], COLUMNS)
        self.input_norm, self.post_norm = (norm_on(norm, device) for norm in (stock.input_norm, stock.post_norm))
        self.num_heads, self.num_kv_heads = len(share.heads.query), len(share.heads.kv)
        self.shape = LayerShape(self.num_kv_heads, stock.head_dim, dtype_of(stock.q), device)
        self.head_norms: dict[str, Any] = {}  # as `run_rope_append` takes them
        if stock.q_norm is not None and stock.k_norm is not None:
            norms = [norm_on(norm, device) for norm in (stock.q_norm, stock.k_norm)]
            self.head_norms = {"q_norm": norms[0].weight, "k_norm": norms[1].weight, "eps": norms[0].eps}

    def attend(self, normed: Tensor, rotation: tuple[Tensor, Tensor], step: Step, slab: KVSlab) -> Tensor:
        """Of rows normed [B T, H] with cos and sin [B T, D]: this rank's part of attention's product, as `sums`."""
        keys, values = slab.keys[self.index], slab.values[self.index]
        batch = len(keys)
        qkv = self.qkv.sums(normed.view(batch, -1, normed.shape[-1]))
        query = run_rope_append(
            qkv, None, *rotation, keys, values, step.first_rows(batch, normed.device), self.num_heads,
            self.num_kv_heads, **self.head_norms,
        )  # fmt: skip
        attended = step.attend(query, keys, values, scale=self.scale, window=self.window)
        return self.o.sums(attended.view(len(normed), -1), rounded=False)  # those of all ranks are rounded, once

    def mlp(self, normed: Tensor) -> Tensor:
        """Of rows [R, H]: this rank's part of the MLP's product, as `sums`."""
        return self.down.sums(self.gate_up.gated(normed), rounded=False)


@dataclass
class Rank:
    """What one rank holds of a model."""

    share: Share
    device: torch.device
    embedding: Tensor | Packed  # [V, H]
    layers: list[RankLayer]
    norm: Norm
    lm_head: PartLinear
    rotary: nn.Module

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> [B T, H]."""
        if isinstance(self.embedding, Packed):
            return embedding_rows(tokens.reshape(-1), self.embedding, self.dtype)
        return F.embedding(tokens.reshape(-1), self.embedding)

    def rotation(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B T, D] of positions [B, T], in the dtype of rows."""
        cos, sin = self.rotary(rows, positions)
        return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes."""
        return self.layers[0].shape.dtype

    @property
    def is_tied(self) -> bool:
        """Whether its part of lm_head is a view of the embedding."""
        rows = self.embedding.words if isinstance(self.embedding, Packed) else self.embedding
        return rows.untyped_storage().data_ptr() == weight_of(self.lm_head).untyped_storage().data_ptr()

    @property
    def weights(self) -> list[Tensor]:
        """All that takes memory, but norms; a tied weight once."""
        linears = [each for layer in self.layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        linears += [] if self.is_tied else [self.lm_head]
        return [*self._table, *(each for linear in linears for each in tensors_of(linear))]

    @property
    def _table(self) -> list[Tensor]:
        table = self.embedding
        return [table.words, table.scales] if isinstance(table, Packed) else [table]

    @property
    def table_bytes(self) -> int:
        """Of the embedding."""
        return sum(each.nbytes for each in self._table)

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        return sum(each.nbytes for each in self.weights)


def norm_on(norm: Norm, device: torch.device) -> Norm:
    return Norm(nn.Parameter(norm.weight.detach().to(device, copy=True), requires_grad=False), norm.eps)


def rotary_on(model: PreTrainedModel, device: torch.device) -> nn.Module:
    """The rotary embedding of a model, whose own may be on the meta device, computed anew from its config."""
    stock: Any = rotary_of(model.get_decoder())
    return type(stock)(Anatomy(model).text).to(device)


def layer_windows(model: PreTrainedModel) -> list[int]:
    """The sliding window of each layer, 0 for none."""
    anatomy = Anatomy(model)
    kinds = anatomy.layer_kinds[: anatomy.num_layers]
    return [(anatomy.window or 0) if kind == "sliding_attention" else 0 for kind in kinds]


def cut_ends(
    embedding: Any, lm_head: Any, share: Share, device: torch.device, order: RowOrder
) -> tuple[Tensor | Packed, PartLinear]:
    """(embedding [V, H], this rank's part of lm_head) of stock ones; a tied lm_head may be the embedding itself."""
    table = whole_on(matrix(embedding), device)
    if are_tied(embedding, lm_head):
        return table, rows_of(table, share.vocabulary, dtype_of(embedding), order)
    return table, part_of([lm_head], [share.vocabulary], ROWS, device, order)
