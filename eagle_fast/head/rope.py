"""Rotary embeddings of a draft head: what its config says about them, and the table that the kernels read.

P positions, R rotated dimensions of a head (all of them unless `partial_rotary_factor` says otherwise).

Old and new configs spell them differently: `rope_theta` beside `rope_scaling {type | rope_type, ...}`, or everything in
`rope_parameters`. A head without `rope_theta` was trained with 10000, whatever its target uses.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_fast.head.checks import COUNT, FLAG, FROM_ONE, NUMBER, POSITIVE, POSITIVES, SHARE, TEXT, Rule

DEFAULT_THETA = 10000.0
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_MEMBERS = {
    "rope_theta": Rule(FROM_ONE.holds, "a positive number from 1 on, 10000 if the head was trained so"),
    "factor": FROM_ONE,
    "original_max_position_embeddings": COUNT,
    "partial_rotary_factor": SHARE,
    "short_factor": POSITIVES,
    "long_factor": POSITIVES,
    "truncate": FLAG,
    **dict.fromkeys(("mscale", "mscale_all_dim"), NUMBER),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"), POSITIVE),
}
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'
# multi-axis RoPE gives text tokens the same position on every axis, which is plain RoPE
_ALIASES = {"su": "longrope", "mrope": "default"}


def rope_parameters(settings: Mapping[str, Any], theta: float | None = None) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the type's own parameters, from a head's flattened config.

    theta: overrides the config. Raises ValueError for a type that is unknown or lacks a parameter.
    """
    scaling = _scaling(settings)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError(
            f"the head's rope_parameters (rope_scaling) differ per layer type ({', '.join(scaling)}): draft heads "
            "rotate every layer alike, write one set of parameters into its config.json"
        )
    rope = {key: value for key, value in scaling.items() if key != "type" and value is not None}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    TEXT.check_field("rope_type", kind)
    rope["rope_type"] = _ALIASES.get(kind, kind)
    given = (theta, scaling.get("rope_theta"), settings.get("rope_theta"), DEFAULT_THETA)
    rope["rope_theta"] = next(value for value in given if value is not None)
    if settings.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", settings["partial_rotary_factor"])
    if rope["rope_type"] not in _REQUIRED:
        raise ValueError(f"the head's config.json asks for rope_type {kind!r}: supported are {', '.join(_REQUIRED)}")
    if rope["rope_type"] in ("yarn", "llama3", "longrope"):
        trained = settings.get("original_max_position_embeddings") or settings.get("max_position_embeddings")
        if trained is not None:
            rope.setdefault("original_max_position_embeddings", trained)
    wanted = _REQUIRED[rope["rope_type"]]
    if rope["rope_type"] in ("yarn", "llama3", "longrope"):
        wanted = (*wanted, "original_max_position_embeddings")
    for name, rule in _MEMBERS.items():
        if name in rope:
            rule.check_field(name, rope[name])
    rope["rope_theta"] = float(rope["rope_theta"])
    missing = [key for key in wanted if key not in rope]
    if missing:
        raise ValueError(
            f"the head's config.json asks for rope_type {kind!r} without {', '.join(missing)}: add it to rope_scaling"
        )
    return rope


def _scaling(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("rope_parameters", "rope_scaling"):
        value = settings.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} is {reprlib.repr(value)}: use an object such as {_EXAMPLE}, or null")
        if value:
            return value
    return {}


def check_rope(rope: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int) -> None:
    """ValueError if no table can be computed from these parameters, which are right one by one."""
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    for name in ("short_factor", "long_factor"):
        if len(rope.get(name) or [1.0] * (rotated // 2)) != rotated // 2:
            raise ValueError(
                f"{name} has {len(rope[name])} numbers, the head's {rotated} rotated dimensions want {rotated // 2}: "
                "correct rope_scaling in its config.json"
            )
    what = f"the head's rotary parameters {str(dict(rope))[:400]} with head_dim {head_dim}"
    try:
        cos, _ = rope_table(rope, 16, head_dim=head_dim, max_position_embeddings=max_position_embeddings)
    except Exception as error:  # transformers computes them
        raise ValueError(f"{what} cannot be computed ({error}): correct rope_scaling in its config.json") from error
    if not cos.isfinite().all() or not 0 < cos.shape[1] <= head_dim:
        raise ValueError(f"{what} give no finite angles for its dimensions: correct rope_scaling in its config.json")


def rope_table(
    rope: Mapping[str, Any],
    num_positions: int,
    *,
    head_dim: int,
    max_position_embeddings: int,
    interleaved: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, R], fp32, attention scaling folded in.

    Column i holds the angle of the pair (i, i + R/2), or of the neighbours (i, i ^ 1) if `interleaved`. Types whose
    frequencies depend on the sequence length (dynamic, longrope) get in row p those of a sequence that ends there, as
    decoding token by token uses them, so that the table never changes under keys that are already written.
    """
    positions = torch.arange(num_positions)
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(rope),
    )
    frequencies, scaling = _frequencies(config, positions, head_dim)
    angles = positions[:, None].float() * frequencies
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


def _frequencies(config: LlamaConfig, positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, [R/2] or one row per position [P, R/2], and the factor on cos and sin."""
    rope: Any = config.rope_parameters
    if rope["rope_type"] == "default":
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated), 1.0
    init = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    cpu = torch.device("cpu")
    if rope["rope_type"] == "dynamic":
        lengths: Any = (positions + 1)[:, None]
        return init(config, cpu, seq_len=lengths)
    short, scaling = init(config, cpu)
    if rope["rope_type"] != "longrope":
        return short, scaling
    switch = int(rope["original_max_position_embeddings"])
    long, _ = init(config, cpu, seq_len=switch + 1)
    return torch.where(positions[:, None] < switch, short, long), scaling
