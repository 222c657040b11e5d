"""Folders of quantized checkpoints in all layouts that are read natively, written by hand from a small model's weights.

Every layout rounds a weight by arithmetic of its own and packs it bit by bit, as its library's documentation says. What
comes back beside the tensors is the weight that they stand for, computed here from the numbers, not from the tensors.

N, K rows and columns of a weight, G groups of columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

GROUP = 32
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight rows lies


class Written(NamedTuple):
    """Tensors of one weight by the end of their name, and the weight [N, K] that they stand for, in float32."""

    tensors: dict[str, Tensor]
    weight: Tensor


class Layout(NamedTuple):
    """How weights are written, and the quantization_config that says so."""

    write: Callable[[Tensor], Written]
    settings: dict


# -- numbers -----------------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """codes [N, K] from 0 on, zeros [N, G] among them, scales [N, G]; groups [K] of every column."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        zeros, scales = self.zeros[:, self.groups], self.scales.float()[:, self.groups]
        return (self.codes - zeros).float() * scales


def rounded(weight: Tensor, bits: int, group: int, *, even: bool, dtype=torch.float16, shuffled=False) -> Numbers:
    """weight in codes of so many bits; even: around the middle code. shuffled: groups of columns all over the row."""
    rows, columns = weight.shape
    group = columns if group == -1 else group
    groups = torch.arange(columns) // group
    if shuffled:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    order = groups.argsort(stable=True)
    parts = weight.float()[:, order].view(rows, -1, group)
    top = 2**bits - 1
    if even:
        zeros = torch.full(parts.shape[:2], 2 ** (bits - 1))
        scales = parts.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round().long().clamp(0, top)
    scales = scales.to(dtype)
    codes = (weight.float() / scales.float()[:, groups]).round().long() + zeros[:, groups]
    return Numbers(codes.clamp(0, top), zeros, scales, groups)


def words(numbers: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """int32 [..., m] of numbers [..., m * 32 / bits]: number i of a word in its field places[i], or in field i."""
    each = 32 // bits
    out = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // each, dtype=torch.int64)
    for index in range(each):
        out += numbers[..., index::each].long() << (bits * (places[index] if places else index))
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


# -- layouts -----------------------------------------------------------------------------------------------------------


def gptq(bits: int = 4, group: int = GROUP, *, even: bool = True, act_order: bool = False, version: int = 1) -> Layout:
    def write(weight: Tensor) -> Written:
        found = rounded(weight, bits, group, even=even, shuffled=act_order)
        zeros = words(found.zeros.T, bits)
        if version == 1:  # less one in every field, taken off the words
            zeros = zeros - (0x11111111 if bits == 4 else 0x01010101)
        tensors = {
            "qweight": words(found.codes, bits).T.contiguous(),
            "qzeros": zeros,
            "scales": found.scales.T.contiguous(),
            "g_idx": found.groups.to(torch.int32),
        }
        return Written(tensors, found.weight)

    form = "gptq" if version == 1 else "gptq_v2"
    return Layout(
        write,
        dict(
            quant_method="gptq", bits=bits, group_size=group, desc_act=act_order, sym=even, checkpoint_format=form,
            lm_head=False,
        ),
    )  # fmt: skip


def awq(group: int = GROUP) -> Layout:
    def write(weight: Tensor) -> Written:
        found = rounded(weight, 4, group, even=False)
        tensors = {
            "qweight": words(found.codes.T, 4, AWQ_NIBBLES),
            "qzeros": words(found.zeros.T, 4, AWQ_NIBBLES),
            "scales": found.scales.T.contiguous(),
        }
        return Written(tensors, found.weight)

    return Layout(write, dict(quant_method="awq", bits=4, group_size=group, version="gemm", zero_point=True))


def compressed(
    bits: int = 4, group: int = GROUP, *, even: bool = True, act_order: str | None = None, packed: bool = True,
    activations: dict | None = None,
) -> Layout:  # fmt: skip
    def write(weight: Tensor) -> Written:
        found = rounded(weight, bits, group, even=even, dtype=torch.bfloat16, shuffled=act_order == "group")
        tensors = {"weight_scale": found.scales}
        if packed:
            tensors |= {"weight_packed": words(found.codes, bits), "weight_shape": torch.tensor(weight.shape)}
        else:
            tensors["weight"] = (found.codes - 2 ** (bits - 1)).to(torch.int8)
        if not even and packed:
            tensors["weight_zero_point"] = words(found.zeros.T, bits).T.contiguous()
        elif not even:
            tensors["weight_zero_point"] = (found.zeros - 2 ** (bits - 1)).to(torch.int8)
        if act_order == "group":
            tensors["weight_g_idx"] = found.groups.to(torch.int32)
        return Written(tensors, found.weight)

    strategy = dict(strategy="channel") if group == -1 else dict(strategy="group", group_size=group)
    weights = dict(num_bits=bits, type="int", symmetric=even, dynamic=False, actorder=act_order, **strategy)
    return Layout(write, _of_compressed("pack-quantized" if packed else "int-quantized", weights, activations))


def compressed_fp8(strategy: str = "channel", activations: dict | None = None) -> Layout:
    def write(weight: Tensor) -> Written:
        if strategy == "block":
            codes, scales, dense = _in_blocks(weight)
        else:
            scales = (weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax()[None]) / 448
            codes = (weight / scales).to(torch.float8_e4m3fn)
            dense = codes.float() * scales
        tensors = {"weight": codes, "weight_scale": scales}
        if activations and not activations["dynamic"]:
            tensors["input_scale"] = torch.ones(1)
        return Written(tensors, dense)

    weights = dict(num_bits=8, type="float", symmetric=True, dynamic=False, strategy=strategy)
    if strategy == "block":
        weights["block_structure"] = [GROUP, GROUP]
    return Layout(write, _of_compressed("float-quantized", weights, activations))


def _of_compressed(form: str, weights: dict, activations: dict | None) -> dict:
    return dict(
        quant_method="compressed-tensors",
        format=form,
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={"group_0": dict(targets=["Linear"], weights=weights, input_activations=activations)},
    )


def fp8(block: int | None = GROUP) -> Layout:
    def write(weight: Tensor) -> Written:
        if block is not None:
            codes, scales, dense = _in_blocks(weight, block)
        else:
            scales = weight.abs().amax() / 448
            codes = (weight / scales).to(torch.float8_e4m3fn)
            dense = codes.float() * scales
        return Written({"weight": codes, "weight_scale_inv": scales}, dense)

    size = None if block is None else [block, block]
    return Layout(write, dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=size))


def _in_blocks(weight: Tensor, size: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, a scale for each block of size x size, the last ones smaller, the weight that they stand for)."""
    codes, dense = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(*(-(-each // size) for each in weight.shape))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            scales[row, column] = weight[place].abs().amax() / 448
            codes[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
            dense[place] = codes[place].float() * scales[row, column]
    return codes, scales, dense


_INT8, _FP8 = (dict(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True) for kind in ("int", "float"))
LAYOUTS: dict[str, Layout] = {
    "gptq": gptq(),
    "gptq_v2": gptq(version=2, even=False),
    "gptq_asymmetric": gptq(even=False),
    "gptq_act_order": gptq(act_order=True, even=False),
    "gptq_8": gptq(8),
    "gptq_8_asymmetric": gptq(8, even=False, act_order=True),
    "gptq_row": gptq(group=-1),
    "awq": awq(),
    "awq_row": awq(-1),
    "w4a16": compressed(),
    "w4a16_row": compressed(group=-1),
    "w4a16_zeros": compressed(even=False),
    "w4a16_act_order": compressed(act_order="group"),
    "w4a16_act_order_zeros": compressed(act_order="group", even=False),
    "w4a16_ordered_before": compressed(act_order="weight"),
    "w4a16_bytes_zeros": compressed(packed=False, even=False),
    "w8a16": compressed(8),
    "w8a16_row_zeros": compressed(8, -1, even=False),
    "w8a16_bytes": compressed(8, -1, packed=False),
    "w8a16_bytes_zeros": compressed(8, -1, packed=False, even=False),
    "w8a8": compressed(8, -1, packed=False, activations=_INT8),
    "w8a8_static": compressed(8, -1, packed=False, activations=_INT8 | dict(strategy="tensor", dynamic=False)),
    "fp8_dynamic": compressed_fp8(activations=_FP8),
    "fp8_static": compressed_fp8("tensor", _FP8 | dict(strategy="tensor", dynamic=False)),
    "fp8_w8a16_blocks": compressed_fp8("block"),
    "fp8_blocks": fp8(),
    "fp8_tensor": fp8(None),
}


def write_quantized(
    model: PreTrainedModel,
    folder: Path,
    layout: Layout,
    dtype: str = "float32",
    ends: tuple[str, ...] = ("_proj.weight",),
    **settings,
) -> dict[str, Tensor]:
    """A checkpoint of the model, with the projections of its layers in a layout; returns their weights, by name.

    ends: of the names of what is in the layout. settings: more of the quantization_config.
    """
    model.save_pretrained(folder)
    tensors, dense = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith(ends):
            stem = name.removesuffix("weight")
            found = layout.write(tensor.float())
            tensors |= {f"{stem}{end}": part.contiguous() for end, part in found.tensors.items()}
            dense[name] = found.weight
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found |= {"quantization_config": layout.settings | settings, "dtype": dtype}
    file.write_text(json.dumps(found), encoding="utf-8")
    return dense
