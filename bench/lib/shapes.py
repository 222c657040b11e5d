"""Targets and heads with random weights at the shapes of real models, built straight on a device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig, default_feature_layers
from eagle_fast.loading import runs_in_int8
from eagle_fast.target.ends import are_tied, device_of, dtype_of, ends, matrix
from eagle_fast.target.formats.arriving import make_room
from eagle_fast.target.formats.rounding import Rounding
from eagle_fast.target.placement import Placement, plan_placement, skeleton
from eagle_fast.target.rank_files import attached, cut_model, cut_of


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128),
    "qwen3-32b": _llama(5120, 25600, 64, 64, 8, 151936, model_type="qwen3", head_dim=128),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "tiny": _llama(64, 96, 2, 4, 2, 131),  # for tests
}
DRAFT_VOCAB = 32000


def _config(name: str, layers: int | None = None) -> PreTrainedConfig:
    settings = dict(SHAPES[name])
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build_target(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, layers: int | None = None
) -> PreTrainedModel:
    """A stock model with random weights; no byte of it passes through the host. layers: how many, if not its own."""
    config = _config(name, layers)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def build_packed_target(
    name: str, device: torch.device | str, target_bits: int, lm_head_bits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:  # fmt: skip
    """The same with weights rounded to so many bits, one after the other as while a checkpoint is loaded."""
    model = _skeleton(name, dtype)
    make_room(model, Rounding(target_bits), lm_head_bits)
    for path, module in list(model.named_modules()):
        _fill(model, path, module, device)
    return model.eval()


def _skeleton(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return skeleton(_config(name), dtype)


def _fill(model: PreTrainedModel, path: str, module: torch.nn.Module, device: torch.device | str) -> None:
    """Give the module's own tensors their values on the device: norms are ones, weights random."""
    if list(module.buffers(recurse=False)):  # the rotary embedding, whose tables follow from the config
        parent, _, leaf = path.rpartition(".")
        with torch.device(device):
            setattr(model.get_submodule(parent), leaf, type(module)(model.config))
        return
    _fill_parameters(module, device)


def _fill_parameters(module: torch.nn.Module, device: torch.device | str) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        filled = torch.empty_like(parameter, device=device)
        filled = filled.fill_(1) if filled.dim() == 1 else filled.normal_(std=0.02)
        setattr(module, key, torch.nn.Parameter(filled, requires_grad=False))


def device_map(text: str) -> Any:
    """A --device-map as plan_placement takes it: a strategy, or a number of GPUs to spread over evenly."""
    if not text.isdigit():
        return text, None
    return ("balanced" if int(text) > 1 else 0), {n: torch.cuda.mem_get_info(n)[0] for n in range(int(text))}


def build_spread_target(name: str, placement: Placement, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The same over several devices: every module is filled where it belongs."""
    model = _skeleton(name, dtype)
    for place, device in placement.items():
        top = model.get_submodule(place)
        for path, module in list(top.named_modules(prefix=place)):
            _fill(model, path, module, device)
    model.tie_weights()
    return model.eval()


def build_cut_target(
    name: str, devices: Sequence[torch.device], target_bits: int | None = None, lm_head_bits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:  # fmt: skip
    """The same cut over devices, as a skeleton: none holds more than its share and a layer."""
    model = stored = _skeleton(name, dtype)
    if target_bits is not None:
        stored = _skeleton(name, dtype)
        make_room(stored, Rounding(target_bits), lm_head_bits)

    def filled(module: torch.nn.Module) -> torch.nn.Module:
        made = copy.deepcopy(module)
        for part in list(made.modules()):
            _fill_parameters(part, devices[0])
        return made

    return attached(model, cut_model(stored, devices, filled))


def plan_target(name: str, text: str, dtype: torch.dtype = torch.bfloat16) -> Placement:
    """Where a target of these shapes goes with this --device-map."""
    return plan_placement(_config(name), *device_map(text), dtype)


def build_head(target: PreTrainedModel, *, int8: bool | None = None) -> DraftHead:
    """An EAGLE-3 head of the usual size for a target: one layer of the target's widths, 32,000 draft tokens.

    int8: as `draft_int8` of EaModel.from_pretrained.
    """
    config = target.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_config = HeadConfig(
        kind="eagle3", hidden_size=config.hidden_size, target_hidden_size=config.hidden_size,
        embedding_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=head_dim,
        vocab_size=config.vocab_size, draft_vocab_size=min(DRAFT_VOCAB, config.vocab_size),
        num_target_layers=config.num_hidden_layers, feature_layers=default_feature_layers(config.num_hidden_layers),
    )  # fmt: skip
    cut, (embedding, lm_head) = cut_of(target), ends(target)
    if cut is None:
        matrices = matrix(embedding), dtype_of(embedding), device_of(lm_head)
    else:
        first = cut.ranks[0]
        matrices = first.embedding, first.dtype, first.device
    head = DraftHead.random(head_config, embedding=matrices[0], dtype=matrices[1], device=matrices[2])
    if runs_in_int8(head, int8):
        head.quantize()
    return head


def target_bytes(target: PreTrainedModel) -> int:
    """Weight bytes that one forward reads: everything but the embedding, once where it is also the lm_head."""
    cut, (embedding, lm_head) = cut_of(target), ends(target)
    if cut is not None:
        whole = cut.ranks[0].table_bytes
        return sum(rank.num_bytes - whole for rank in cut.ranks) + whole * cut.ranks[0].is_tied
    total = _num_bytes(target)
    return total if are_tied(embedding, lm_head) else total - _num_bytes(embedding)


def _num_bytes(module: torch.nn.Module) -> int:
    """Of parameters, and of packed weights, which are buffers."""
    return sum(each.nbytes for each in [*module.parameters(), *module.buffers()])


def head_bytes(head: DraftHead, passes: int) -> int:
    """Weight bytes of one absorb and `passes` beam steps, each with its lm_head; fc is read in the absorb alone."""
    fc = sum(p.numel() * p.element_size() for p in head.fc.parameters()) if head.fc else 0
    total = sum(p.numel() * p.element_size() for p in head.parameters())
    return (total - fc) * (passes + 1) + fc
