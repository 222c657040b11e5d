"""A model over ranks from its checkpoint: weights are cut while they are read, layer by layer.

No device holds more than its share, and the host never more than one layer, or one end, beside it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eagle_fast_kernels.packed_layout import Packed, merge
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.layers.linear import RowOrder
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.messages import listed
from eagle_fast.target.anatomy import (
    Anatomy,
    UnsupportedModel,
    decoder_layers,
    final_norm,
    llama_layer,
    llama_norm,
    placed_modules,
)
from eagle_fast.target.ends import are_tied, ends
from eagle_fast.target.formats.arriving import ArrivingEmbedding
from eagle_fast.target.merged import weight_of
from eagle_fast.target.packing import Packing, check_all_read
from eagle_fast.target.rank_parts import in_order_of_down
from eagle_fast.target.ranks import INSTEAD, Rank, RankLayer, cut_ends, cuts_for, layer_windows, norm_on, rotary_on

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_CUT = "eagle_ranks"  # attribute of a skeleton


class CutModel(NamedTuple):
    """What the weights of a skeleton are: its ranks, rank 0 first. order: of all their products."""

    ranks: list[Rank]
    order: RowOrder

    def whole_lm_head(self) -> Tensor | Packed:
        """[V, H] on rank 0, a copy where it is not the embedding."""
        first, parts = self.ranks[0], [rank.lm_head for rank in self.ranks]
        if first.is_tied:
            return first.embedding
        packed = [copy.deepcopy(part).to(first.device).packed for part in parts if isinstance(part, PackedLinear)]
        return merge(packed) if packed else torch.cat([weight_of(part).detach().to(first.device) for part in parts])


def cut_of(model: Any) -> CutModel | None:
    """The ranks of a skeleton; None for other models."""
    return vars(model).get(_CUT) if isinstance(model, nn.Module) else None


class Checkpoint:
    """Tensors of a folder's safetensors files, read one at a time. ValueError where there are none."""

    def __init__(self, folder: Path, files: ExitStack, what: str):
        self.folder, self.files, self.what = folder, files, what
        self.open: dict[str, Any] = {}
        self.read: set[str] = set()  # tensors
        if (folder / INDEX).is_file():
            self.places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / WHOLE).is_file():
            self.places = dict.fromkeys(self._file(WHOLE).keys(), WHOLE)
        else:
            raise ValueError(
                f"{what} has no {WHOLE} and no {INDEX}: tensor_parallel reads safetensors files, save it as such"
            )

    def _file(self, name: str) -> Any:
        if name not in self.open:
            self.open[name] = self.files.enter_context(safe_open(self.folder / name, framework="pt"))
        return self.open[name]

    def fill(self, module: nn.Module, prefix: str) -> Any:
        """A copy of a module of the skeleton with its weights, on the CPU. ValueError for tensors that don't fit."""
        made, empty = copy.deepcopy(module), module.state_dict()
        missing = [prefix + name for name in empty if prefix + name not in self.places]
        if missing:
            raise ValueError(f"{self.what} lacks {listed(missing)}: is it complete, and its config.json its own?")
        for name, expected in empty.items():
            tensor = self._file(self.places[prefix + name]).get_tensor(prefix + name)
            if tensor.shape != expected.shape and not tensor.numel() == expected.numel() == 1:
                raise ValueError(
                    f"{self.what} has {prefix + name} as {list(tensor.shape)}, its config.json says "
                    f"{list(expected.shape)}"
                )
            self.read.add(prefix + name)
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(tensor.to(expected.dtype), requires_grad=False)
            setattr(made.get_submodule(owner), leaf, weight)  # the last of a packed layer's packs it
        return made

    def unread(self, prefix: str) -> list[str]:
        """Tensors of the files, in the modules whose names begin so, that nobody asked for."""
        return [name for name in self.places if name.startswith(prefix) and name not in self.read]


def load_ranks(
    model: PreTrainedModel, stored: PreTrainedModel, folder: Path, devices: Sequence[torch.device], what: str,
    packing: Packing | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Give a skeleton the weights of its checkpoint, cut over devices; it comes back.

    stored: the same skeleton, or one with room for what will be packed, as packing says. what: the model, for messages.
    """
    names = {module: name for name, module in stored.named_modules()}
    with ExitStack() as files:
        checkpoint = Checkpoint(folder, files, what)
        cut = cut_model(stored, devices, lambda module: checkpoint.fill(module, f"{names[module]}."))
    check_all_read(checkpoint.unread(""), packing, what)
    return attached(model, cut)


def cut_model(
    model: PreTrainedModel, devices: Sequence[torch.device], read: Callable[[nn.Module], Any] = lambda module: module
) -> CutModel:
    """The ranks of a model, whose weights are copied. read: of a module of a skeleton, one with weights, anywhere."""
    cuts, windows, order = cuts_for(model, len(devices)), layer_windows(model), RowOrder()
    found = decoder_layers(model, Anatomy(model).num_layers)
    norm: Any = final_norm(model.get_decoder())
    assert found is not None, "its family was checked"
    shares = [cuts.of(rank) for rank in range(len(devices))]
    layers: list[list[RankLayer]] = [[] for _ in devices]
    for layer, window in zip(found[1], windows, strict=True):
        stock = llama_layer(read(layer))
        assert stock is not None, "its family was checked"
        stock = in_order_of_down(stock)
        for share, device, mine in zip(shares, devices, layers, strict=True):
            try:
                mine.append(RankLayer(stock, share, device, window, order))
            except ValueError as error:
                raise UnsupportedModel(
                    f"tensor_parallel over {len(devices)} ranks, layer {stock.layer_index}: {error}; {INSTEAD}"
                ) from error
        del stock
    embedding, lm_head = ends(model)
    is_tied = are_tied(embedding, lm_head)
    if isinstance(embedding, ArrivingEmbedding):
        embedding.tied = None  # ranks have an lm_head of their own
    table, final = read(embedding), llama_norm(read(norm))
    head = table if is_tied else read(lm_head)
    assert final is not None, "its family was checked"
    ranks = []
    for share, device, mine in zip(shares, devices, layers, strict=True):
        whole, part = cut_ends(table, head, share, device, order)
        ranks.append(Rank(share, device, whole, mine, norm_on(final, device), part, rotary_on(model, device)))
    return CutModel(ranks, order)


def attached(model: PreTrainedModel, cut: CutModel) -> PreTrainedModel:
    """The skeleton, with its ranks."""
    setattr(model, _CUT, cut)
    where = device_map_of_ranks(model, [rank.device for rank in cut.ranks])
    setattr(model, "hf_device_map", where)  # noqa: B010  # says that meta tensors are not missing
    return model.eval()


def device_map_of_ranks(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, list[torch.device]]:
    """Where a part of each module lies, the embedding first: on every rank."""
    return {name: list(devices) for name in placed_modules(model)}
