"""A linear layer whose tensors come from the file one by one, and which is packed as soon as the last is there.

Files hold the tensors of a layer side by side, and transformers loads them in this order, one after the other where a
quantizer says so: no moment holds more than what is packed and one layer more.
"""

from __future__ import annotations

from typing import Any

import torch
from eagle_fast_kernels.packed import pack
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.packed import PackedLinear
from eagle_fast.target.anatomy import Anatomy, decoder_layers, expert_weights
from eagle_fast.target.formats.scheme import Format, Scheme, Unreadable


class ArrivingLinear(nn.Module):
    """Stands where a packed layer will; its parameters are those of the file, on the meta device until they come."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        self.scheme, self.dtype = scheme, linear.weight.dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, (shape, dtype) in scheme.stored(self.out_features, self.in_features).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        bias = None if linear.bias is None else torch.empty_like(linear.bias, device="meta")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._parameters and not any(each.is_meta for each in self.parameters()):
            self._become_packed()

    @torch.no_grad()
    def _become_packed(self) -> None:
        """This object is a PackedLinear from now on."""
        tensors = {name: held.data for name, held in self.named_parameters()}
        bias = tensors.pop("bias", None)
        for name, (shape, _) in self.scheme.stored(self.out_features, self.in_features).items():
            if tensors[name].shape != shape:  # old releases of transformers do not look
                raise ValueError(
                    f"a tensor {name} is {list(tensors[name].shape)}, and its config.json says {list(shape)}"
                )
        found = self.scheme.codes(tensors, self.out_features, self.in_features)
        scales = found.scales if found.scales.shape[1] == 1 else found.scales.to(self.dtype)
        packed = pack(
            found.codes, scales, kind=found.kind, zeros=found.zeros, order=found.order, group_size=found.group_size
        )
        linear, training = PackedLinear.of(packed, bias, self.dtype), self.training
        vars(self).clear()
        vars(self).update(vars(linear))
        self.__class__ = PackedLinear  # type: ignore[assignment]
        self.training = training


class Unloaded(nn.Module):
    """Stands for a packed layer where nothing is loaded: as many bytes on the meta device."""

    def __init__(self, linear: ArrivingLinear):
        super().__init__()
        rows, columns = linear.out_features, linear.in_features
        self.num_weights, size = rows * columns, linear.scheme.num_bytes(rows, columns)
        words = torch.empty(size, dtype=torch.uint8, device="meta")
        self.words, self.bias = nn.Parameter(words, requires_grad=False), linear.bias


def shrink(model: nn.Module) -> None:
    """Give what makes room the size that it will have."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ArrivingLinear):
                setattr(module, name, Unloaded(child))


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model consists of, packed or not."""
    modules = list(model.modules())
    packed = sum(each.num_weights for each in modules if isinstance(each, Unloaded))
    packed += sum(each.in_features * each.out_features for each in modules if isinstance(each, PackedLinear))
    words = {id(each.words) for each in modules if isinstance(each, Unloaded)}
    return packed + sum(each.numel() for each in model.parameters() if id(each) not in words)


def make_room(model: PreTrainedModel, found: Format) -> None:
    """Replace the linear layers, on the meta device, whose weights the file has packed.

    Raises Unreadable where more is packed than linear layers that nobody but their own forward reads.
    """
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
        scheme = found.scheme(name, linear, name.startswith(inside))
        if scheme is None:
            continue
        if linear is lm_head:
            raise Unreadable("its lm_head is quantized, which the draft head reads as a plain matrix")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ArrivingLinear(linear, scheme))
