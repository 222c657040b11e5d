"""A head cut over ranks: each has a part of its heads, of its MLPs' width and of its vocabulary, and the rest whole.

Vd draft vocabulary, V the target's, H hidden size.

A part is a `DraftHead` whose products of attention and MLP are added up over ranks (`layers/lockstep.py`). What it does
not narrow (fc, the embedding) is copied, or shared where it lies on the rank's device; norms are always copied, to
addresses that kernels of exchanges are loaded for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eagle_fast.config import MAX_TOP_K
from eagle_fast.head.layer import DraftLayer, frozen
from eagle_fast.head.module import DraftHead
from eagle_fast.head.shared import Matrix, embedding_over, targets_rows
from eagle_fast.layers.cuts import HeadShare, deal_dimension, deal_heads, taken
from eagle_fast.layers.embedding import PackedEmbedding
from eagle_fast.layers.linear import COLUMNS, ROWS, FewRowsLinear, QuantizedLinear

Portrait = tuple[tuple, ...]
BYTES_OF_AN_EXCHANGE = 14_000_000  # that a GPU reads meanwhile: 4 us at 3.5 TB/s
OF_VOCABULARY = ("lm_head_weight", "lm_head_bias", "lm_head_scale")


def cut_head(
    head: DraftHead, devices: Sequence[torch.device], embeddings: Sequence[Matrix]
) -> list[DraftHead] | None:  # fmt: skip
    """The part of each rank; None where there are too few heads, columns or tokens for so many.

    embeddings: the target's on each rank, the first of which the head may have as its own.
    """
    config, ranks = head.config, len(devices)
    try:
        heads = deal_heads(config.num_heads, config.num_kv_heads, ranks)
        inner = deal_dimension(config.intermediate_size, ranks)
        words = deal_dimension(config.draft_vocab_size, ranks)
    except ValueError:
        return None
    if min(map(len, words)) < MAX_TOP_K:  # each rank proposes as many as the whole would
        return None
    tables = _embeddings(head, devices, embeddings)
    return [
        _part(head, rank, device, table, words[rank], heads[rank], inner[rank])
        for rank, (device, table) in enumerate(zip(devices, tables, strict=True))
    ]


def pays(num_bytes: int, num_layers: int, ranks: int) -> bool:
    """Whether a pass over the part of a head takes less time than one over all of its num_bytes: there are two
    exchanges a layer and one more for the weights that are not read."""
    return num_bytes * (1 - 1 / ranks) > (2 * num_layers + 1) * BYTES_OF_AN_EXCHANGE


def pass_bytes(head: DraftHead) -> int:
    """Weights that a pass reads, of which parts would read parts."""
    layers = [each for layer in head.draft_layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return head.lm_head_weight.nbytes + sum(tensor.nbytes for linear in layers for _, tensor in _own(linear))


def portrait(head: DraftHead) -> Portrait:
    """What its parts were cut from: another one where the head was given other weights, or they were edited."""
    tensors = [*head.parameters(), *head.buffers()]
    return tuple((id(x), x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)


def _embeddings(
    head: DraftHead, devices: Sequence[torch.device], embeddings: Sequence[Matrix]
) -> list[Tensor | PackedEmbedding]:  # fmt: skip
    """[V, E] on each rank: the target's there where the head shares it."""
    own = head.embedding
    if not _is_same(own, embeddings[0]):
        return [own.to(device) if isinstance(own, Tensor) else copy.deepcopy(own).to(device) for device in devices]
    rows = [targets_rows("embedding", each, head.config.vocab_size, head.config.embedding_size) for each in embeddings]
    return [
        each if isinstance(each, Tensor) else embedding_over(each, head.dtype, device)
        for each, device in zip(rows, devices, strict=True)
    ]


def _is_same(own: Tensor | PackedEmbedding, targets: Matrix) -> bool:
    mine = own if isinstance(own, Tensor) else own.packed.words
    theirs = targets if isinstance(targets, Tensor) else targets.words
    return (mine.dtype, mine.device, mine.data_ptr()) == (theirs.dtype, theirs.device, theirs.data_ptr())


def _part(
    head: DraftHead, rank: int, device: torch.device, embedding: Tensor | PackedEmbedding, words: range,
    heads: HeadShare, inner: range,
) -> DraftHead:  # fmt: skip
    tensors = {id(tensor): tensor for tensor in (*head.parameters(), *head.buffers())}
    part = copy.deepcopy(head, tensors)  # of the same tensors, to be replaced one by one
    for name, tensor in _own(part):
        if name != "embedding":
            some = (taken(tensor, [words]) if name in OF_VOCABULARY else tensor).detach()
            moved = some.to(device, copy=name.endswith("norm"))
            setattr(part, name, frozen(moved) if isinstance(tensor, nn.Parameter) else moved)
    ids = head.token_ids
    if ids is not None or rank:  # those of the first rank may begin at 0
        ids = torch.arange(words.start, words.stop, device=device) if ids is None else taken(ids, [words]).to(device)
    part.token_ids = ids
    part.embedding = embedding
    part.feature_norms = nn.ParameterList(frozen(each.to(device)) for each in head.feature_norms)
    if head.fc is not None:
        part.fc = _linear(head.fc, [range(head.config.hidden_size)], device)
    for layer in part.draft_layers:
        _narrow(layer, rank, device, heads, inner, head.config.intermediate_size)
    part.is_part = True
    return part


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Its tensors by name, those of modules in it left out."""
    named = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*named, *module.named_buffers(recurse=False, remove_duplicate=False)]


def _narrow(
    layer: DraftLayer, rank: int, device: torch.device, heads: HeadShare, inner: range, width: int
) -> None:  # fmt: skip
    """Leave a layer with the rank's part of it. width: of the whole MLP."""
    for name, tensor in _own(layer):
        setattr(layer, name, frozen(tensor.detach().to(device, copy=True)))
    query, kv = heads.rows(layer.head_dim)
    keys = layer.num_heads * layer.head_dim
    values = keys + layer.num_kv_heads * layer.head_dim
    first = rank == 0  # it adds the biases of what is added up
    layer.qkv = _linear(layer.qkv, [query, _from(keys, kv), _from(values, kv)], device)
    layer.o = _linear(layer.o, [query], device, COLUMNS, biased=first)
    layer.gate_up = _linear(layer.gate_up, [inner, _from(width, inner)], device)
    layer.down = _linear(layer.down, [inner], device, COLUMNS, biased=first)
    layer.num_heads, layer.num_kv_heads = len(heads.query), len(heads.kv)


def _from(first: int, part: range) -> range:
    return range(first + part.start, first + part.stop)


def _linear(linear: Any, parts: Sequence[range], device: torch.device, axis: int = ROWS, *, biased: bool = True) -> Any:
    """Rows or columns of a layer in 16, 32 or 8 bits, which keeps the scales of its rows."""

    def some(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else (taken(tensor.detach(), parts) if axis == ROWS else tensor).to(device)

    weight = taken(linear.weight.detach(), parts, axis).contiguous().to(device)
    bias = some(linear.bias) if biased else None
    if isinstance(linear, QuantizedLinear):
        scale = some(linear.scale)
        assert scale is not None
        return QuantizedLinear.of(weight, scale, bias)
    return FewRowsLinear.of(weight, bias)
