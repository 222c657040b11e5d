"""A linear layer whose tensors come from the file one by one, and which is packed as soon as the last is there.

Files hold the tensors of a layer side by side, and transformers loads them in this order, one after the other where a
quantizer says so: no moment holds more than what is packed and one layer more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from eagle_fast_kernels.packed import pack
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.embedding import PackedEmbedding
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.target.anatomy import Anatomy, decoder_layers, expert_weights
from eagle_fast.target.formats.rounding import RoundingScheme
from eagle_fast.target.formats.scheme import Format, Scheme, Unreadable


class ArrivingLinear(nn.Module):
    """Stands where a packed layer will; its parameters are those of the file, on the meta device until they come."""

    def __init__(self, linear: nn.Linear | nn.Embedding, scheme: Scheme):
        super().__init__()
        self.scheme, self.dtype = scheme, linear.weight.dtype
        self.out_features, self.in_features = linear.weight.shape
        for name, (shape, dtype) in scheme.stored(self.out_features, self.in_features).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        bias: Any = getattr(linear, "bias", None)
        bias = None if bias is None else torch.empty_like(bias, device="meta")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._parameters and not any(each.is_meta for each in self.parameters()):
            self._become(self._packed())

    @property
    def packed_bytes_a_number(self) -> float:
        """Bytes of the packed weight for each number of the file's tensors."""
        rows, columns = self.out_features, self.in_features
        stored = self.scheme.stored(rows, columns)
        return self.scheme.num_bytes(rows, columns) / sum(math.prod(shape) for shape, _ in stored.values())

    @torch.no_grad()
    def _packed(self) -> PackedLinear:
        tensors = {name: held.data for name, held in self.named_parameters()}
        bias = tensors.pop("bias", None)
        for name, (shape, _) in self.scheme.stored(self.out_features, self.in_features).items():
            if tensors[name].shape != shape and tensors[name].numel() > 1:  # old releases of transformers do not look
                raise ValueError(
                    f"a tensor {name} is {list(tensors[name].shape)}, and its config.json says {list(shape)}"
                )
        found = self.scheme.codes(tensors, self.out_features, self.in_features)
        scales = found.scales if found.scales.shape[1] == 1 else found.scales.to(self.dtype)
        packed = pack(
            found.codes, scales, kind=found.kind, zeros=found.zeros, order=found.order, group_size=found.group_size
        )
        return PackedLinear.of(packed, bias, self.dtype)

    def _become(self, module: nn.Module) -> None:
        """This object is another from now on."""
        training = self.training
        vars(self).clear()
        vars(self).update(vars(module))
        self.__class__ = type(module)  # type: ignore[assignment]
        self.training = training


class ArrivingEmbedding(ArrivingLinear):
    """The same for an embedding. tied: (module, name) of the lm_head that reads its rows, which is set then."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, tied: tuple[nn.Module, str] | None):
        super().__init__(embedding, scheme)
        self.tied = tied

    def _become(self, module: nn.Module) -> None:
        assert isinstance(module, PackedLinear)
        if self.tied is not None:
            setattr(*self.tied, module)
        super()._become(PackedEmbedding(module))


class ArrivingWithEmbedding(nn.Module):
    """Stands where an lm_head will that is the embedding."""

    bias = None

    def __init__(self, embedding: ArrivingEmbedding):
        super().__init__()
        self._tied = (embedding,)  # no module of this one

    @property
    def weight(self) -> torch.Tensor | nn.Module:
        return self._tied[0].weight

    @property
    def out_features(self) -> int:
        return self._tied[0].out_features


class Unloaded(nn.Module):
    """Stands for a packed layer where nothing is loaded: as many bytes on the meta device."""

    def __init__(self, linear: ArrivingLinear):
        super().__init__()
        rows, columns = self.out_features, self.in_features = linear.out_features, linear.in_features
        self.num_weights, size = rows * columns, linear.scheme.num_bytes(rows, columns)
        words = torch.empty(size, dtype=torch.uint8, device="meta")
        self.words, self.bias = nn.Parameter(words, requires_grad=False), linear.bias


def shrink(model: nn.Module) -> None:
    """Give what makes room the size that it will have."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ArrivingLinear):
                setattr(module, name, Unloaded(child))
            if isinstance(child, ArrivingEmbedding) and child.tied is not None:
                lm_head = Unloaded(child)
                lm_head.words = getattr(module, name).words
                setattr(*child.tied, lm_head)


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model consists of, packed or not."""
    modules = list(model.modules())
    packed = {id(each.words): each.num_weights for each in modules if isinstance(each, Unloaded)}
    plain = sum(each.numel() for each in model.parameters() if id(each) not in packed)
    loaded = [each for each in modules if isinstance(each, PackedLinear)]
    biases = sum(each.bias.numel() for each in loaded if each.bias is not None)
    return sum(packed.values()) + plain + biases + sum(each.in_features * each.out_features for each in loaded)


def make_room(model: PreTrainedModel, found: Format | None, lm_head_bits: int | None = None) -> None:
    """Replace, on the meta device, the linear layers whose weights the format has packed, and with `lm_head_bits` the
    lm_head and the embedding.

    Raises Unreadable where that is not possible.
    """
    if found is not None:
        _make_room_for_linears(model, found)
    if lm_head_bits is not None:
        make_room_for_ends(model, lm_head_bits)


def _make_room_for_linears(model: PreTrainedModel, found: Format) -> None:
    if any(expert_weights(module) for module in model.modules()):
        raise Unreadable("its experts are stacked, for which there are no kernels with packed weights")
    listed = decoder_layers(model, Anatomy(model).num_layers)
    if listed is None:
        raise Unreadable("no list of decoder layers was found")
    if any(type(module).__name__ == "Conv1D" for module in listed[1].modules()):
        raise Unreadable("its layers are no linear ones (Conv1D)")
    lm_head, inside = model.get_output_embeddings(), f"{listed[0]}."
    linears = [(name, each) for name, each in model.named_modules() if type(each) is nn.Linear]
    for name, linear in linears:
        try:
            scheme = found.scheme(name, linear, name.startswith(inside))
        except re.error as error:
            raise Unreadable(f"one of its rules for names is no pattern ({error})") from error
        if scheme is None:
            continue
        if linear is lm_head and f"{name}.weight" in model.all_tied_weights_keys:
            raise Unreadable("its lm_head is quantized, and by its config.json one with the embedding, which is not")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ArrivingLinear(linear, scheme))


def fit_to_files(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Look at what is to come before it comes. What is one number gets the number of dimensions that it has in the
    files, none or some, as writers please. ValueError for numbers of another kind than the format has, of which
    transformers would make that kind without a word."""
    wanted = {
        f"{name}.{key}": (module, key)
        for name, module in model.named_modules()
        if isinstance(module, ArrivingLinear)
        for key, _ in module.named_parameters()
    }
    for file in [each for each in files if wanted and each.endswith(".safetensors")]:
        with safe_open(file, "pt") as opened:
            for name in sorted(wanted.keys() & set(opened.keys())):
                module, key = wanted[name]
                stored, held = opened.get_slice(name), module.get_parameter(key)
                if not _is_kind(stored.get_dtype(), held.dtype):
                    raise ValueError(
                        f"{name} is of {stored.get_dtype()} in its file, and by its config.json of "
                        f"{str(held.dtype).removeprefix('torch.')}"
                    )
                if held.numel() == math.prod(stored.get_shape()) == 1:
                    empty = torch.empty(stored.get_shape(), dtype=held.dtype, device="meta")
                    setattr(module, key, nn.Parameter(empty, requires_grad=False))


def _is_kind(stored: str, dtype: torch.dtype) -> bool:
    """Whether numbers of a safetensors dtype are those of another dtype: bytes are codes, and only themselves."""
    if dtype.itemsize == 1:
        return stored == {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}.get(dtype, stored)
    return stored.startswith(("F", "BF")) if dtype.is_floating_point else stored.startswith(("I", "U"))


def make_room_for_ends(model: PreTrainedModel, bits: int) -> None:
    """lm_head and embedding, which may be one weight."""
    embedding: Any
    lm_head: Any
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for what, end, kind in (("embedding", embedding, nn.Embedding), ("lm_head", lm_head, nn.Linear)):
        if isinstance(end, ArrivingLinear):
            raise Unreadable(f"its {what} is quantized in the file")
        if type(end) is not kind or getattr(end, "max_norm", None) is not None:
            raise Unreadable(f"its {what} ({type(end).__name__}) is none of PyTorch's own")
    places = []
    for end in (embedding, lm_head):
        parent, _, leaf = names[id(end)].rpartition(".")
        places.append((model.get_submodule(parent), leaf))
    tied = model.all_tied_weights_keys
    is_tied = f"{names[id(lm_head)]}.weight" in tied or f"{names[id(embedding)]}.weight" in tied
    if is_tied and lm_head.bias is not None:
        raise Unreadable("its lm_head has a bias, and the weight of the embedding")
    scheme = RoundingScheme(bits, 0, embedding.weight.dtype)
    rows = ArrivingEmbedding(embedding, scheme, places[1] if is_tied else None)
    setattr(*places[0], rows)
    setattr(*places[1], ArrivingWithEmbedding(rows) if is_tied else ArrivingLinear(lm_head, scheme))
    ours = {f"{names[id(end)]}.weight" for end in (embedding, lm_head)}
    model.all_tied_weights_keys = {key: value for key, value in tied.items() if not {key, value} & ours}
