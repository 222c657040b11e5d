"""Draft-head checkpoints: `read_head` takes every public format, `write_head` writes SafeAILab's.

What a tensor's presence or shape says, it decides; a config that says otherwise is overruled with a warning. What only
the config can say (feature layers, which residual, which state is fed back, RoPE) has an argument that overrides it. A
key that is missing or unknown is an error: loaders that skip it run a partly random head, which nobody notices because
the text stays right and only the speed is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle_fast.head.config import HeadConfig, tensor_shapes
from eagle_fast.head.files import find_folder, read_config, read_tensors
from eagle_fast.head.inference import Overrides, TargetSizes, infer_config, infer_kind
from eagle_fast.head.names import canonical_tensors, flatten_settings, refuse_settings
from eagle_fast.head.shared import Matrix, rows_of, usable
from eagle_fast.head.vocabulary import fit_vocabulary
from eagle_fast.messages import listed, warn_user

_MAPS = ("d2t", "t2d", "token_map")


class HeadCheckpoint(NamedTuple):
    """A complete head: the tensors that `tensor_shapes(config)` names, and no other."""

    config: HeadConfig
    tensors: dict[str, Tensor]
    token_ids: Tensor | None = None  # [Vd] target id of each draft id; None where they are the same


def read_head(
    path_or_repo: str | Path,
    *,
    target_hidden_size: int,
    target_vocab_size: int,
    num_target_layers: int,
    use_eagle3: bool | None = None,
    feature_layers: Sequence[int] | None = None,
    norm_before_residual: bool | None = None,
    norm_output: bool | None = None,
    rope_theta: float | None = None,
    rope_interleaved: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    target_embedding: Matrix | None = None,
) -> HeadCheckpoint:
    """Read a draft head for a target, from a local folder (no network) or the Hugging Face hub.

    use_eagle3: what the caller expects, None for whatever it is. An older head is an error where True was said, an
        EAGLE-3 head a warning where False was.
    feature_layers: boundaries that the head reads, lowest first (boundary k = input of the target's layer k).
    norm_before_residual, norm_output, rope_theta, rope_interleaved: go before config.json.
    target_embedding [V, Ht], packed or not: its rows stand in for tokens that an embedding of the head's own lacks.

    A head for a shorter vocabulary than the target's, or one with more rows of padding, is fitted to it with a warning.
    Raises ValueError if the checkpoint is incomplete, of a kind that is not supported, or for another target.
    """
    hub: dict[str, Any] = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    target = TargetSizes(target_hidden_size, target_vocab_size, num_target_layers, target_embedding)
    given = Overrides(use_eagle3, feature_layers, norm_before_residual, norm_output, rope_theta, rope_interleaved)
    try:
        folder = find_folder(path_or_repo, **hub)
        settings = flatten_settings(read_config(folder))
        return _interpret(canonical_tensors(read_tensors(folder), settings), settings, target, given)
    except ValueError as error:
        raise ValueError(f"draft head {path_or_repo}: {error}") from error


def check_folder(path: str | Path) -> None:
    """ValueError for a local head whose config.json is missing or cannot be meant; its weights are not read."""
    try:
        refuse_settings(flatten_settings(read_config(Path(path))))
    except ValueError as error:
        raise ValueError(f"draft head {path}: {error}") from error


def _interpret(
    tensors: dict[str, Tensor], settings: dict[str, Any], target: TargetSizes, given: Overrides
) -> HeadCheckpoint:
    kind = infer_kind(tensors, given.use_eagle3)
    if kind == "eagle":
        _drop_dummy_norms(tensors, settings)
    if kind == "eagle3" and settings.get("tie_word_embeddings") and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    vocabulary = fit_vocabulary(tensors, settings.get("vocab_size"), target.vocab_size)
    if vocabulary.fitted:  # and said
        settings = {name: value for name, value in settings.items() if name not in ("vocab_size", "draft_vocab_size")}
    _fit_embedding(tensors, target)
    conflicts: list[str] = []
    config = infer_config(kind, tensors, settings, target, vocabulary.size, given, conflicts)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _MAPS}
    check_shapes(tensors, config)
    _check_values(tensors)
    if conflicts:
        warn_user(f"config.json and the weights disagree, the weights win: {'; '.join(conflicts)}")
    return HeadCheckpoint(config, tensors, vocabulary.token_ids)


def _drop_dummy_norms(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """vLLM's converted EAGLE-1 carries norms that vLLM loads and does not apply, unless told to."""
    for flag, name in (("skip_prenorm", "layers.0.input_layernorm.weight"), ("skip_output_norm", "norm.weight")):
        if settings["from_vllm"] and settings.get(flag, True):
            tensors.pop(name, None)


def _fit_embedding(tensors: dict[str, Tensor], target: TargetSizes) -> None:
    """Give the head's own embedding a row for every token: the target's where it lacks them, if as wide."""
    own = tensors.get("embed_tokens.weight")
    if own is None or len(own) == target.vocab_size:
        return
    rows, theirs = own[: target.vocab_size], target.embedding
    if lacking := target.vocab_size - len(rows):
        if usable(theirs, target.vocab_size, own.shape[1]):
            more = rows_of(theirs, range(len(rows), target.vocab_size), own.dtype)
        else:
            more = own.new_zeros(lacking, own.shape[1])  # a mean row would be scaled up by the norm, and draw attention
        rows = torch.cat((rows, more))
    tensors["embed_tokens.weight"] = rows


def check_shapes(tensors: dict[str, Tensor], config: HeadConfig) -> None:
    """ValueError unless the tensors are those of the config, in name and shape."""
    expected = tensor_shapes(config)
    problems = []
    if missing := set(expected) - set(tensors):
        problems.append(f"missing {listed(sorted(missing))}")
    if unknown := set(tensors) - set(expected):
        problems.append(f"unknown {listed(sorted(unknown))}")
    for name in sorted(set(expected) & set(tensors)):
        if tuple(tensors[name].shape) != expected[name]:
            problems.append(f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}")
    if problems:
        raise ValueError(f"not a complete {config.kind} head: {'; '.join(problems)}")


def _check_values(tensors: dict[str, Tensor]) -> None:
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise ValueError(f"{listed(broken)}: NaN or infinite, so nothing could be drafted; the file is damaged")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    if _is_constant(tensors.get("lm_head.weight")) or all(map(_is_constant, matrices.values())):
        raise ValueError("lm_head or all weights hold one number throughout, so nothing could be drafted: not trained?")


def _is_constant(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def write_head(folder: str | Path, checkpoint: HeadCheckpoint) -> None:
    """Write config.json and model.safetensors in SafeAILab's layout, which SpecForge, SGLang and vLLM read too."""
    config, tensors, token_ids = checkpoint
    first = "midlayer." if config.kind == "eagle3" else "layers.0."
    stored = {}
    for name, tensor in tensors.items():  # copied: safetensors wants no two tensors in one storage
        name = first + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name
        stored[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if token_ids is not None:
        ids = token_ids.cpu()
        stored["d2t"] = ids - torch.arange(len(ids))
        stored["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(_settings(config, dtype), indent=2) + "\n", encoding="utf-8")


def note_acceptance(folder: str | Path, tables: Mapping[float, Sequence[Sequence[float]]]) -> None:
    """Say in a head's config.json how its drafts did: by temperature, chances by depth and rank."""
    file = Path(folder) / "config.json"
    settings = read_config(Path(folder)) | _acceptance(tables)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _acceptance(tables: Mapping[float, Sequence[Sequence[float]]]) -> dict[str, Any]:
    return {"acceptance": {f"{temperature:g}": table for temperature, table in tables.items()}}


def _settings(config: HeadConfig, dtype: str) -> dict[str, Any]:
    eagle3 = config.kind == "eagle3"
    rope = dict(config.rope)
    theta = rope.pop("rope_theta")
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3" if eagle3 else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
    if config.rope_interleaved:
        settings["rope_interleaved"] = True
    if config.acceptance:
        settings |= _acceptance(config.acceptance)
    if any(config.sliding_windows):
        kinds = ["sliding_attention" if window else "full_attention" for window in config.sliding_windows]
        settings |= {"layer_types": kinds, "sliding_window": max(config.sliding_windows), "use_sliding_window": True}
    if not eagle3:
        return settings | {"bias": config.fc_bias, "qkv_bias": config.qkv_bias, "norm_output": config.norm_output}
    if config.target_hidden_size != config.hidden_size:
        settings["target_hidden_size"] = config.target_hidden_size
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    settings |= {flag: True for flag in flags if getattr(config, flag)}
    eagle: dict[str, Any] = {
        "use_aux_hidden_state": not config.uses_final_hidden,
        "use_input_layernorm_in_first_layer": config.input_norm,
        "use_last_layernorm": config.final_norm,
        "return_hidden_post_norm": config.norm_output,
    }
    if config.feature_layers:  # readers take the first key for boundaries unless it begins with 1, the second always is
        eagle["eagle_aux_hidden_state_layer_ids"] = list(config.feature_layers)
        eagle["feature_layers"] = list(config.feature_layers)
    return settings | {"draft_vocab_size": config.draft_vocab_size, "eagle_config": eagle}
