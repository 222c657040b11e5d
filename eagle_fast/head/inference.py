"""The configuration of a draft head, from its tensors first and its config.json second.

`tensors` carry canonical names (`names`), `settings` is the flattened config.json. Where the two disagree the
tensors win, and the disagreement goes into `conflicts`, to be reported once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from eagle_fast.head.activation import activation_name
from eagle_fast.head.checks import COUNT, FLAG, FROM_ONE, Rule, index_list, plain
from eagle_fast.head.config import HeadConfig, default_feature_layers
from eagle_fast.head.rope import rope_parameters
from eagle_fast.head.shared import Matrix
from eagle_fast.messages import listed, warn_user

_LAYER = "layers.0."
_NEEDED = [f"{_LAYER}self_attn.{name}_proj.weight" for name in "qkvo"] + [f"{_LAYER}mlp.gate_proj.weight"]


class TargetSizes(NamedTuple):
    """What a head must fit."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    embedding: Matrix | None = None  # [V, Ht]


@dataclass
class Overrides:
    """Arguments that go before config.json; None leaves it to decide. ValueError for what they cannot be."""

    use_eagle3: bool | None = None
    feature_layers: Sequence[int] | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None
    rope_theta: float | None = None
    rope_interleaved: bool | None = None

    def __post_init__(self):
        for name in ("use_eagle3", "norm_before_residual", "norm_output", "rope_interleaved"):
            if (flag := plain(getattr(self, name))) is not None:
                Rule(FLAG.holds, "True, False or None").check_argument(name, flag)
                setattr(self, name, bool(flag))
        if self.feature_layers is not None:
            self.feature_layers = index_list("feature_layers", self.feature_layers)
        if self.rope_theta is not None:
            self.rope_theta = plain(self.rope_theta)
            FROM_ONE.check_argument("rope_theta", self.rope_theta)


def infer_kind(tensors: dict[str, Tensor], use_eagle3: bool | None) -> Literal["eagle", "eagle3"]:
    """EAGLE-3's first layer reads the embedding beside the hidden state, EAGLE-1's reads fc's output."""
    missing = sorted(name for name in _NEEDED if name not in tensors)
    if missing:
        raise ValueError(
            f"missing {listed(missing)}: not an EAGLE head, or an incomplete one; it has {listed(sorted(tensors))}"
        )
    hidden, columns = _shape(tensors, "self_attn.o_proj")[0], _shape(tensors, "self_attn.q_proj")[1]
    kind: Literal["eagle", "eagle3"] = "eagle3" if columns > hidden else "eagle"
    if kind == "eagle" and "fc.weight" not in tensors:
        raise ValueError(
            f"missing fc.weight: the first layer reads {columns} columns, the hidden state alone, so this is a plain "
            "decoder that never sees the drafted token, not an EAGLE head"
        )
    if use_eagle3 and kind != "eagle3":
        raise ValueError("the weights are an EAGLE-1 or -2 head, but use_eagle3=True: leave use_eagle3 out")
    if use_eagle3 is False and kind == "eagle3":  # what scripts say whose flag --use_eagle3 was left out
        warn_user("use_eagle3=False, but the weights are an EAGLE-3 head: it is loaded as one")
    return kind


def infer_config(
    kind: Literal["eagle", "eagle3"],
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    target: TargetSizes,
    draft_vocab_size: int,
    given: Overrides,
    conflicts: list[str],
) -> HeadConfig:
    """Everything but the weights. ValueError where the head cannot be for this target."""
    eagle3 = kind == "eagle3"
    hidden = _shape(tensors, "self_attn.o_proj")[0]
    reads_final = not eagle3 or (settings.get("use_aux_hidden_state") is False and given.feature_layers is None)
    normed_input = eagle3 and settings.get("use_input_layernorm_in_first_layer") is not False
    num_heads, num_kv_heads, head_dim = _heads(tensors, settings, conflicts)
    num_layers = _num_layers(tensors)
    if not eagle3 and given.feature_layers is not None:
        raise ValueError(
            "feature_layers belong to EAGLE-3 heads; this one reads the final hidden state: leave them out"
        )

    def has(name: str) -> bool:
        return name in tensors

    config = HeadConfig(
        kind=kind,
        hidden_size=hidden,
        target_hidden_size=target.hidden_size,
        embedding_size=_embedding_size(kind, tensors, target),
        intermediate_size=_shape(tensors, "mlp.gate_proj")[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        num_target_layers=target.num_layers,
        feature_layers=() if reads_final else _feature_layers(tensors, settings, target, given.feature_layers),
        uses_final_hidden=reads_final,
        activation=activation_name(_stated(settings, "hidden_act", "hidden_activation", default="silu")),
        rms_norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope=rope_parameters(settings, given.rope_theta),
        rope_interleaved=_first(given.rope_interleaved, settings.get("rope_interleaved"), _is_llama4(settings)),
        max_position_embeddings=settings.get("max_position_embeddings", 2048),
        sliding_windows=_sliding_windows(settings, num_layers, conflicts),
        has_fc=has("fc.weight") or not (reads_final or given.feature_layers),
        fc_bias=has("fc.bias"),
        norm_before_fc=has("input_norm.weight") or (eagle3 and bool(settings.get("norm_before_fc"))),
        fc_norm=has("fc_norm.0.weight") or (eagle3 and bool(settings.get("fc_norm"))),
        fc_input_norms=not eagle3 and (has("enorm.weight") or has("hnorm.weight")),
        input_norm=normed_input or has(f"{_LAYER}input_layernorm.weight"),
        hidden_norm=(normed_input and not reads_final) or (eagle3 and has(f"{_LAYER}hidden_norm.weight")),
        final_norm=has("norm.weight") or (eagle3 and settings.get("use_last_layernorm") is not False),
        norm_before_residual=_first(given.norm_before_residual, eagle3 and settings.get("norm_before_residual"), False),
        norm_output=_norm_output(tensors, settings, given.norm_output),
        qk_norm=has(f"{_LAYER}self_attn.q_norm.weight"),
        qkv_bias=has(f"{_LAYER}self_attn.q_proj.bias"),
        o_bias=has(f"{_LAYER}self_attn.o_proj.bias"),
        mlp_bias=has(f"{_LAYER}mlp.gate_proj.bias"),
        lm_head_bias=has("lm_head.bias"),
        own_embedding=has("embed_tokens.weight"),
        own_lm_head=has("lm_head.weight"),
        acceptance={float(temperature): table for temperature, table in settings.get("acceptance", {}).items()},
    )
    _compare(settings, config, conflicts)
    return config


def _embedding_size(kind: str, tensors: dict[str, Tensor], target: TargetSizes) -> int:
    if kind == "eagle3":
        width = _shape(tensors, "self_attn.q_proj")[1] - _shape(tensors, "self_attn.o_proj")[0]
    else:
        width = tensors["fc.weight"].shape[1] - target.hidden_size
    if width < 1 or ("embed_tokens.weight" not in tensors and width != target.hidden_size):
        raise ValueError(
            f"the head reads embeddings {width} wide and has none of its own for the target's {target.vocab_size} "
            f"tokens; the target's hidden size is {target.hidden_size}: the head is for another model"
        )
    return width


def _num_layers(tensors: dict[str, Tensor]) -> int:
    indices = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d{1,9})\.", name))}
    if max(indices) >= len(indices):
        lost = min(set(range(len(indices))) - indices)
        raise ValueError(f"missing layers.{lost}, while there is layers.{max(indices)}: the checkpoint is incomplete")
    return len(indices)


def _feature_layers(
    tensors: dict[str, Tensor], settings: dict[str, Any], target: TargetSizes, given: Sequence[int] | None
) -> tuple[int, ...]:
    """The boundaries that fc reads.

    What the config's list means differs by trainer. A first id of 1 can only be an "output of layer" list, one less
    than the boundaries; speculators always lists boundaries.
    """
    count, rest, reads = 1, 0, "without fc.weight the head reads one feature of width"
    if "fc.weight" not in tensors and given is None:
        raise ValueError("missing fc.weight, which only a head with use_aux_hidden_state: false in config.json lacks")
    if "fc.weight" in tensors:
        columns = tensors["fc.weight"].shape[1]
        count, rest = divmod(columns, target.hidden_size)
        reads = f"fc.weight has {columns} columns, {columns / target.hidden_size:g} times the target's hidden size"
    ids = settings.get("eagle_aux_hidden_state_layer_ids")
    if given is not None:
        layers = tuple(given)
    elif settings.get("feature_layers"):  # boundaries, as this package writes them
        layers = tuple(settings["feature_layers"])
    elif ids:
        shift = int(ids[0] == 1 and not settings.get("speculators_model_type"))
        layers = tuple(k + shift for k in ids)
    else:
        layers = default_feature_layers(target.num_layers)
    if rest or len(layers) != count:
        raise ValueError(
            f"{reads} {target.hidden_size}, but the feature layers are {list(layers)}: the head is for another model, "
            "or pass feature_layers="
        )
    return layers


def _heads(tensors: dict[str, Tensor], settings: dict[str, Any], conflicts: list[str]) -> tuple[int, int, int]:
    """Query heads, key heads and head size; configs are often wrong about the last."""
    q_rows, k_rows = _shape(tensors, "self_attn.q_proj")[0], _shape(tensors, "self_attn.k_proj")[0]
    # speculators stores only what differs from the defaults of transformers' class
    heads = settings.get("num_attention_heads") or (32 if settings.get("speculators_model_type") else None)
    kv_heads, stated = settings.get("num_key_value_heads"), settings.get("head_dim")
    q_norm = tensors.get(f"{_LAYER}self_attn.q_norm.weight")
    if q_norm is not None:
        if len(q_norm) == q_rows and heads not in (None, 1):
            raise ValueError(f"q_norm normalizes all {heads} heads at once: only a norm per head is supported")
        sizes = [len(q_norm)]
    else:
        sizes = [q_rows // heads] if heads and q_rows % heads == 0 else []
        sizes += [stated] if stated else []
    fits = [size for size in sizes if size % 2 == q_rows % size == k_rows % size == 0]
    fits.sort(key=lambda size: kv_heads is not None and kv_heads * size != k_rows)  # stable: agreeing sizes first
    if not fits:
        raise ValueError(
            f"q_proj has {q_rows} rows, k_proj {k_rows}; num_attention_heads={heads} and head_dim={stated} do not "
            "divide them into heads of even width: correct config.json"
        )
    size = fits[0]
    actual = {"head_dim": size, "num_attention_heads": q_rows // size, "num_key_value_heads": k_rows // size}
    conflicts += [
        f"{key} {settings[key]} -> {value}" for key, value in actual.items() if settings.get(key, value) != value
    ]
    return q_rows // size, k_rows // size, size


def _sliding_windows(settings: dict[str, Any], num_layers: int, conflicts: list[str]) -> tuple[int, ...]:
    """Only `layer_types` makes a layer slide: a bare sliding_window is a left-over of the target's config."""
    types = settings.get("layer_types") or []
    if "sliding_attention" not in types:
        return ()
    if len(types) != num_layers:
        conflicts.append(f"{len(types)} layer_types -> {num_layers} layers, all with full attention")
        return ()
    if settings.get("sliding_window") is None:
        raise ValueError("layer_types has sliding_attention, but config.json has no sliding_window: add it")
    COUNT.check_field("sliding_window", settings["sliding_window"])
    return tuple(settings["sliding_window"] if kind == "sliding_attention" else 0 for kind in types)


def _norm_output(tensors: dict[str, Tensor], settings: dict[str, Any], given: bool | None) -> bool:
    if given is not None:
        return given
    if settings.get("return_hidden_post_norm") is not None:  # ModelOpt's name for it
        return bool(settings["return_hidden_post_norm"])
    stated = bool(settings.get("norm_output"))
    if stated and "fc_norm.0.weight" not in tensors and not settings.get("speculators_model_type"):
        warn_user(
            "config.json has norm_output, so the head's normed output is fed back (EAGLE-3.1). SpecForge before "
            "September 2026 wrote it for heads that feed back the plain output: if few drafts are accepted, pass "
            "norm_output=False"
        )
    return stated


def _compare(settings: dict[str, Any], config: HeadConfig, conflicts: list[str]) -> None:
    stated = dict(settings)
    if _is_llama4(settings) and "intermediate_size_mlp" in settings:
        stated["intermediate_size"] = settings["intermediate_size_mlp"]
    names = {"hidden_size", "intermediate_size", "target_hidden_size", "vocab_size"}
    if config.kind == "eagle3":
        names.add("draft_vocab_size")
    actual = {name: getattr(config, name) for name in sorted(names)} | {"num_hidden_layers": config.num_layers}
    conflicts += [
        f"{name} {stated[name]} -> {value}" for name, value in actual.items() if stated.get(name, value) != value
    ]


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of one of the first layer's projections."""
    shape = tuple(tensors[f"{_LAYER}{name}.weight"].shape)
    if len(shape) != 2:
        raise ValueError(f"{_LAYER}{name}.weight has shape {list(shape)}, not a matrix: are the weights packed?")
    return shape


def _stated(settings: dict[str, Any], *names: str, default: Any) -> Any:
    """What the config says under the first of these names that it has."""
    return next((settings[name] for name in names if settings.get(name) is not None), default)


def _is_llama4(settings: dict[str, Any]) -> bool:
    return settings.get("model_type") == "llama4_text"


def _first(*values: bool | None) -> bool:
    return next(bool(value) for value in values if value is not None)
