"""What a loaded target must be before a twin of it is made; and hooks that change it once, run before there are two.

A decoding step runs many nodes as rows of one product: a row's result must be its own, whatever the others hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from eagle_fast_kernels.launch import use_triton
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.linear import is_plain
from eagle_fast.layers.slab import LayerShape
from eagle_fast.messages import short
from eagle_fast.target.anatomy import Anatomy, UnsupportedModel, generating_model
from eagle_fast.target.ends import device_of, dtype_of, is_packed
from eagle_fast.target.kind import check_kind
from eagle_fast.target.twin import evaluating, hooks_of

LARGEST_HEAD = 256  # that the attention kernels take
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
LOUD = 1000.0  # how much larger the other row is


def check_base(model: Any, name: str = "base_model") -> None:
    """ValueError, or UnsupportedModel, for what is no causal LM of transformers that is there to run.

    name: of the argument that it was given as.
    """
    kind = f"{name} is a {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}={short(model)}: give a loaded causal language model of transformers")
    inner: Any = generating_model(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
        wrapped = next((each for each in ("module", "base_model", "model") if _is_model(model, each)), None)
        if wrapped:
            raise UnsupportedModel(f"{kind} around a {type(getattr(model, wrapped)).__name__}: give its .{wrapped}")
        raise UnsupportedModel(f"{kind}: give a causal language model of transformers (AutoModelForCausalLM)")
    check_kind(inner.config, name)
    lm_head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if lm_head is None or embedding is None:
        raise UnsupportedModel(
            f"{kind}, which has no {'lm_head to choose tokens with' if lm_head is None else 'embedding of tokens'}: "
            "load it with AutoModelForCausalLM, or with the ForConditionalGeneration class of a model of its kind"
        )
    _check_strays(kind, Anatomy(inner))
    missing = next((key for key, each in inner.named_parameters() if each.is_meta), None)
    if missing and getattr(inner, "hf_device_map", None) is None:
        raise UnsupportedModel(f"{kind} without weights ({missing} is on the meta device): load it by from_pretrained")
    for part, module in (("lm_head", lm_head), ("embedding", embedding)):
        _check_readable(kind, part, module)


def _is_model(wrapper: Any, name: str) -> bool:
    return hasattr(getattr(wrapper, name, None), "get_output_embeddings")


def _check_strays(kind: str, anatomy: Anatomy) -> None:
    """A window that only the file speaks of: transformers' cache drops keys by it, and its attention does not."""
    if set(anatomy.layer_kinds) <= {"full_attention"}:
        return
    try:
        default = type(anatomy.text)()
    except Exception:  # a class of the checkpoint's own, which needs arguments
        return
    for field in ("sliding_window", "attention_chunk_size", "layer_types"):
        if getattr(anatomy.text, field, None) is not None and not hasattr(default, field):
            raise UnsupportedModel(
                f"{kind} whose config has {field}, which a {type(default).__name__} does not know: transformers' cache "
                "forgets keys by it and its attention does not, so no single text is its own. Take it out, "
                "or set it to None (in config.json, or model.config)"
            )


def _check_readable(kind: str, part: str, module: nn.Module) -> None:
    """The head reads these weights as they are."""
    if is_packed(module):
        return
    weight: Any = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and type(weight.data).dequantize is torch.Tensor.dequantize
    if plain and weight.dim() == 2 and weight.is_floating_point() and weight.element_size() >= 2:
        return
    held = "no plain weight"
    if isinstance(weight, torch.Tensor):
        held = f"a weight of {type(weight.data).__name__} in {weight.dtype}"
    raise UnsupportedModel(
        f"{kind} whose {part} ({type(module).__name__}) has {held}: the draft head reads it as a plain matrix. "
        "Leave it out where the model is quantized (modules_to_not_convert, llm_int8_skip_modules, ignore), or load "
        "with dequantize=True"
    )


def settle(model: PreTrainedModel) -> None:
    """Let hooks that change a model on its first forward do so, as compressed-tensors' that unpacks its weights.

    On a copy such a hook would change the copy, and be taken off the model: both would be broken. So a model with hooks
    runs one token first. Raises UnsupportedModel where it cannot.
    """
    if not any(hooks_of(module) for module in model.modules()):
        return
    inner: Any = generating_model(model)
    device = device_of(inner.get_input_embeddings())
    if device.type == "meta":  # offloaded: brought by accelerate
        device = torch.device("cpu")
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    devices = [each.index for each in {p.device for p in model.parameters()} if each.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
            model(input_ids=token, use_cache=False)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} does not run a token by itself ({type(error).__name__}: {error}): decoding needs "
            "a model that base_model.generate works with"
        ) from error


@torch.no_grad()
def broken_tensor(model: nn.Module) -> str | None:
    """The name of a weight or a buffer, as a rotary embedding's frequencies, that holds NaN or infinite numbers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            return name
    return None


@torch.no_grad()
def check_rows(model: nn.Module) -> None:
    """UnsupportedModel for linear layers in which a row depends on the others: scales or outliers over all of them."""
    for name, module in _kinds_of_linears(model):
        size, weight = module.in_features, module.weight
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, size, generator=generator).to(weight.device, _arithmetic(model))
        loud = rows * torch.tensor([[1.0], [LOUD]], device=rows.device, dtype=rows.dtype)
        try:
            alone, beside = (module(each[None])[0, 0].float() for each in (rows, loud))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue  # the probe runs the whole model, and says what does not work
        if not torch.allclose(alone, beside, rtol=0, atol=1e-3 * float(alone.abs().max())):
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) rounds its input by what all rows hold together (one scale for the "
                "whole tensor, as dynamic per-tensor quantization has), so no token's result is its own: quantize "
                "activations per token, or the weights alone"
            )


def _kinds_of_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module): one of each kind of linear layer that is not PyTorch's own over a plain weight."""
    seen = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "in_features") or not isinstance(weight, torch.Tensor) or weight.is_meta:
            continue
        if (isinstance(module, nn.Linear) and is_plain(module)) or any(True for _ in module.children()):
            continue
        forward = getattr(vars(module).get("forward"), "__func__", type(module).forward)
        kind = type(module), type(weight.data), weight.dtype, forward, str(getattr(module, "quantization_scheme", ""))
        if kind not in seen:
            seen.add(kind)
            yield name, module


def _arithmetic(model: Any) -> torch.dtype:
    """What activations are held in."""
    return dtype_of(generating_model(model).get_input_embeddings())


def check_shapes(shapes: Iterable[LayerShape]) -> None:
    """UnsupportedModel for keys and values that the attention kernels do not take, where kernels are used."""
    for index, shape in enumerate(shapes):
        taken = shape.head_dim <= LARGEST_HEAD and shape.dtype in KERNEL_TYPES
        if not taken and use_triton(torch.empty(0, device=shape.device)):
            raise UnsupportedModel(
                f"layer {index} has heads of size {shape.head_dim} in {shape.dtype}: the attention kernels take sizes "
                f"up to {LARGEST_HEAD} in float32, float16 and bfloat16. It decodes on the CPU (device_map='cpu')"
            )
