"""What a draft head is made of: one frozen record, and the tensors that follow from it.

Boundary k is the residual stream that enters the target's decoder layer k; k = number of layers is the last layer's
output, before the final norm. EAGLE-3 heads read the boundaries `feature_layers`, EAGLE-1 and -2 heads the target's
last hidden state after the final norm (`uses_final_hidden`).

Tensor names are those of the speculators layout: `layers.{i}.*`, with `fc`, `norm`, `lm_head`, `embed_tokens` on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from eagle_fast.head.activation import activation_name
from eagle_fast.head.checks import ACCEPTANCE, COUNT, EPSILON, FLAG, INDICES, TEXT, Rule
from eagle_fast.head.rope import DEFAULT_THETA, check_rope

_TYPE_RULES = {"int": COUNT, "bool": FLAG, "tuple[int, ...]": INDICES}
_FIELD_RULES = {
    "acceptance": ACCEPTANCE,
    "kind": TEXT,
    "rms_norm_eps": EPSILON,
    "rope": Rule(lambda value: isinstance(value, Mapping), "a mapping as rope_parameters gives it"),
}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes and switches of one draft head. The defaults of the switches are plain EAGLE-3 with its own lm_head."""

    kind: Literal["eagle", "eagle3"]  # "eagle": EAGLE-1 and EAGLE-2, which share their weights
    hidden_size: int
    target_hidden_size: int
    embedding_size: int  # width of the token embeddings that the head reads
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    vocab_size: int  # the target's
    draft_vocab_size: int
    num_target_layers: int
    feature_layers: tuple[int, ...] = ()
    uses_final_hidden: bool = False
    activation: str = "silu"  # of the MLP's gate, by transformers' name
    rms_norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": DEFAULT_THETA})
    rope_interleaved: bool = False
    max_position_embeddings: int = 2048
    sliding_windows: tuple[int, ...] = ()  # one per layer, 0 = full attention; empty: all full

    has_fc: bool = True
    fc_bias: bool = False
    norm_before_fc: bool = False  # one RMSNorm over all features
    fc_norm: bool = False  # one RMSNorm per feature (EAGLE-3.1)
    fc_input_norms: bool = False  # EAGLE-1 with RMSNorm on both halves of fc's input
    input_norm: bool = True  # first layer, input_layernorm: on the embedding (EAGLE-3) or on fc's output (EAGLE-1)
    hidden_norm: bool = True  # first layer of EAGLE-3, on the hidden state
    final_norm: bool = True  # before lm_head
    norm_before_residual: bool = False  # the first residual is the normed hidden state
    norm_output: bool = False  # what is fed back is the normed output (EAGLE-3.1)
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    own_embedding: bool = False  # else shared with the target
    own_lm_head: bool = True

    # by temperature, the chances of drafts by depth and rank, as its trainer measured them: where estimates begin
    acceptance: Mapping[float, Sequence[Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self):
        self._check_fields()
        if self.kind not in ("eagle", "eagle3"):
            raise ValueError(f"kind is {self.kind!r}: use 'eagle' (EAGLE-1 and -2) or 'eagle3'")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embeddings turn pairs, use an even number")
        check_rope(self.rope, head_dim=self.head_dim, max_position_embeddings=self.max_position_embeddings)
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size={self.draft_vocab_size} of vocab_size={self.vocab_size}: use no more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} do not divide into num_kv_heads={self.num_kv_heads}")
        if self.uses_final_hidden == bool(self.feature_layers):
            raise ValueError("a head reads either feature_layers or, with uses_final_hidden, the final hidden state")
        outside = [k for k in self.feature_layers if not 0 <= k <= self.num_target_layers]
        if outside:
            raise ValueError(
                f"feature layers {list(self.feature_layers)}: {outside} outside 0..{self.num_target_layers} of this "
                "target; is the head for another model? Else pass feature_layers="
            )
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"{len(self.sliding_windows)} sliding_windows for {self.num_layers} layers: give each one")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if self.norm_output and not self.final_norm:
            raise ValueError("norm_output feeds back the normed output, but the head has no final norm")
        if self.kind == "eagle":
            self._check_eagle1()
        elif not self.has_fc and self.feature_size != self.hidden_size:
            raise ValueError(
                f"without fc the features ({self.feature_size} wide) are the head's hidden state "
                f"({self.hidden_size} wide): is the head for another model?"
            )
        if not self.own_lm_head and self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"the head has no lm_head and its hidden size {self.hidden_size} does not fit the target's "
                f"({self.target_hidden_size}): it is for another model"
            )

    def _check_fields(self):
        for field_ in fields(self):
            rule = _FIELD_RULES.get(field_.name) or _TYPE_RULES.get(str(field_.type))
            if rule is not None:
                rule.check_argument(field_.name, getattr(self, field_.name))
            if rule is FLAG:
                object.__setattr__(self, field_.name, bool(getattr(self, field_.name)))  # 1 becomes True
        activation_name(self.activation)

    def _check_eagle1(self):
        if not self.uses_final_hidden or self.hidden_norm or self.norm_before_residual or not self.has_fc:
            raise ValueError(
                "an EAGLE-1 head has fc, reads the final hidden state, and has neither hidden_norm nor "
                "norm_before_residual"
            )
        if self.norm_before_fc or self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm belong to EAGLE-3 heads")
        if self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"the head's hidden size is {self.hidden_size}, the target's {self.target_hidden_size}: "
                "it is for another model"
            )

    @classmethod
    def eagle1(cls, **fields: Any) -> HeadConfig:
        """SafeAILab's EAGLE-1 and -2: no norm around the layer, the target's embedding and lm_head."""
        plain = dict(uses_final_hidden=True, input_norm=False, hidden_norm=False, final_norm=False, own_lm_head=False)
        return cls(**{"kind": "eagle", **plain, **fields})

    @property
    def num_features(self) -> int:
        return 1 if self.uses_final_hidden else len(self.feature_layers)

    @property
    def feature_size(self) -> int:
        """Width of what `DraftHead.embed_features` takes."""
        return self.num_features * self.target_hidden_size

    @property
    def sliding_window(self) -> int:
        """The window that all layers share, 0 for none. Layers that differ have it one by one (`DraftLayer.window`)."""
        windows = set(self.sliding_windows) or {0}
        if len(windows) > 1:
            raise ValueError(f"the layers' windows differ {self.sliding_windows}: read them from the layers")
        return windows.pop()


def default_feature_layers(num_target_layers: int) -> tuple[int, int, int]:
    """Low, middle and high boundary of SafeAILab's EAGLE-3, in layer order; a tiny target repeats some."""
    n = num_target_layers
    low, middle, high = sorted(min(max(k, 0), n) for k in (2, n // 2, n - 3))
    return low, middle, high


def tensor_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a head's checkpoint, vocabulary maps aside."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {}
    if c.own_embedding:
        shapes["embed_tokens.weight"] = (c.vocab_size, c.embedding_size)
    if c.norm_before_fc:
        shapes["input_norm.weight"] = (c.feature_size,)
    if c.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (c.target_hidden_size,) for i in range(c.num_features)}
    if c.fc_input_norms:
        shapes |= {"enorm.weight": (c.embedding_size,), "hnorm.weight": (c.target_hidden_size,)}
    if c.has_fc:
        width = c.feature_size if c.kind == "eagle3" else c.embedding_size + c.target_hidden_size
        shapes |= _linear("fc", c.hidden_size, width, c.fc_bias)
    for index in range(c.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _layer_shapes(c, index).items()}
    if c.final_norm:
        shapes["norm.weight"] = (c.hidden_size,)
    if c.own_lm_head:
        shapes |= _linear("lm_head", c.draft_vocab_size, c.hidden_size, c.lm_head_bias)
    return shapes


def _layer_shapes(c: HeadConfig, index: int) -> dict[str, tuple[int, ...]]:
    reads_embedding = index == 0 and c.kind == "eagle3"
    width = c.hidden_size + (c.embedding_size if reads_embedding else 0)
    shapes = {
        **_linear("self_attn.q_proj", c.num_heads * c.head_dim, width, c.qkv_bias),
        **_linear("self_attn.k_proj", c.num_kv_heads * c.head_dim, width, c.qkv_bias),
        **_linear("self_attn.v_proj", c.num_kv_heads * c.head_dim, width, c.qkv_bias),
        **_linear("self_attn.o_proj", c.hidden_size, c.num_heads * c.head_dim, c.o_bias),
        **_linear("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
        **_linear("mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
        **_linear("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias),
        "post_attention_layernorm.weight": (c.hidden_size,),
    }
    if c.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    if index or c.input_norm:
        shapes["input_layernorm.weight"] = (c.embedding_size if reads_embedding else c.hidden_size,)
    if reads_embedding and c.hidden_norm:
        shapes["hidden_norm.weight"] = (c.hidden_size,)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})
