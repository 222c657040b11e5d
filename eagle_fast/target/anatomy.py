"""What is read off a stock model: fields of its config and parts of its modules. No other file reads them.

Configs spell one thing in several ways, and leave out what transformers has a default for; `Anatomy` has one spelling.
The functions find parts of a model by class and attribute names, and return None or nothing where there are none.

H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LAYER_LISTS = ("layers", "h", "blocks", "block")
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
LLAMA_LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
LLAMA_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
NORM_EPSILONS = ("variance_epsilon", "eps")
STOCK_CODE = ("transformers", "transformers_modules")  # the second: what came with a checkpoint


class UnsupportedModel(ValueError):
    """The model cannot be decoded exactly with a tree; the message says why."""


class Anatomy:
    """The text config of a model. Every property is read when it is asked for: a config need not have all of them."""

    def __init__(self, model: PreTrainedModel | PreTrainedConfig):
        self.config: Any = model.config if isinstance(model, nn.Module) else model
        self.text: Any = self.config.get_text_config(decoder=True)

    def _get(self, name: str, default: Any = None) -> Any:
        """A field of the text config; one that is missing, None or 0 is the default."""
        return getattr(self.text, name, None) or default

    @property
    def fields(self) -> set[str]:
        """Names of what the model's config holds, by any spelling that it takes."""
        names = {*vars(self.config), *getattr(self.config, "attribute_map", ())}
        return {name for name in names if name[0] != "_"}

    def has_field(self, name: str) -> bool:
        """Whether transformers would set this in the config: it holds it, under whatever name, or computes it."""
        return name[0] != "_" and hasattr(self.config, name) and not callable(getattr(self.config, name))

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def stated_width(self) -> Any:
        """The same of a config as it was read, whatever it says; None if it says nothing."""
        return getattr(self.text, "hidden_size", None)

    @property
    def intermediate_size(self) -> int:
        return self._get("intermediate_size", 4 * self.hidden_size)

    @property
    def num_layers(self) -> int:
        return self.text.num_hidden_layers

    @property
    def stated_layers(self) -> Any:
        """The same of a config as it was read, whatever it says; None if it says nothing."""
        return getattr(self.text, "num_hidden_layers", None)

    @property
    def num_heads(self) -> int:
        return self.text.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self._get("num_key_value_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        return self._get("head_dim") or self.hidden_size // self.num_heads

    @property
    def rms_norm_eps(self) -> float:
        return self._get("rms_norm_eps", 1e-6)

    @property
    def max_position_embeddings(self) -> int:
        return self._get("max_position_embeddings", 2048)

    @property
    def softcap(self) -> float | None:
        """Of attention scores."""
        return self._get("attn_logit_softcapping")

    @property
    def experts_per_token(self) -> int:
        return int(self._get("num_experts_per_tok", 1))

    @property
    def shares_kv(self) -> bool:
        """Whether some layers use the keys and values of others."""
        return bool(self._get("num_kv_shared_layers"))

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint's weights are."""
        return bool(self.quantization)

    @property
    def quantization(self) -> dict[str, Any]:
        """How the checkpoint's weights are quantized, in the words of its config.json; {} if they are not."""
        configs = (getattr(each, "quantization_config", None) for each in (self.config, self.text))
        found: Any = next((each for each in configs if each), {})
        return found if isinstance(found, dict) else found.to_dict()

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    # -- which keys a layer sees -----------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        return getattr(self.text, "sliding_window", None)

    @property
    def chunk(self) -> int | None:
        return getattr(self.text, "attention_chunk_size", None)

    @property
    def layer_kinds(self) -> list[str]:
        """transformers' `layer_types`, also where the config has one kind of layer and does not say which."""
        types = getattr(self.text, "layer_types", None)
        if types is not None:
            return list(types)
        kind = "full_attention"
        if self.window is not None and getattr(self.text, "use_sliding_window", True):
            kind = "sliding_attention"
        elif self.chunk is not None:
            kind = "chunked_attention"
        return [kind] * self.num_layers

    # -- rotary embeddings -----------------------------------------------------------------------------------------

    @property
    def rope(self) -> dict[str, Any]:
        """transformers' `rope_parameters`: those of all layers, or of each type of layer."""
        parameters = getattr(self.text, "rope_parameters", None)
        return parameters if isinstance(parameters, dict) else {}

    @property
    def rope_types(self) -> set[str]:
        nested = [value for value in self.rope.values() if isinstance(value, dict)]
        return {str(each["rope_type"]) for each in [self.rope, *nested] if "rope_type" in each}

    @property
    def rope_theta(self) -> float | None:
        return self.rope.get("rope_theta")

    @property
    def longrope_switch(self) -> int:
        """The sequence length past which longrope models take their long frequencies."""
        return int(self.rope["original_max_position_embeddings"])


# -- what a model consists of ------------------------------------------------------------------------------------------


def decoder_layers(model: Any, num_layers: int) -> tuple[str, nn.ModuleList] | None:
    """(name, module) of the list of decoder layers within `model`, of a wrapper within what decodes text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules())
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == num_layers
        if is_list and module in inside and name.rpartition(".")[2] in LAYER_LISTS:
            return name, module
    return None


def placed_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What a written-out device map names: the embedding first, then every decoder layer and what lies beside them."""
    found = decoder_layers(model, Anatomy(model).num_layers)
    if found is None:
        return {"": model}
    path, modules = found[0].split("."), {}
    for depth in range(len(path) + 1):
        prefix = ".".join(path[:depth])
        for name, child in model.get_submodule(prefix).named_children():
            if depth == len(path) or name != path[depth]:
                modules[f"{prefix}.{name}".lstrip(".")] = child
    embedding = model.get_input_embeddings()
    order = {module: at for at, module in enumerate(model.modules())}
    names = sorted(modules, key=lambda name: (embedding not in modules[name].modules(), order[modules[name]]))
    return {name: modules[name] for name in names}


def learned_positions(decoder: nn.Module) -> int | None:
    """Rows of a table of positions, learned or not, which bounds the sequence; None for those that are computed."""
    for name, module in decoder.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding):
            return module.num_embeddings - getattr(module, "offset", 0)
    for name, table in decoder.named_buffers():
        if name.rpartition(".")[2] in POSITION_TABLES and table.dim() == 2:
            return len(table)
    return None


def generating_model(model: Any) -> Any:
    """The PreTrainedModel whose `generate` runs: inside of a wrapper, as PEFT's, or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return model
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def check_wrapper(model: Any) -> None:
    """UnsupportedModel for a wrapper that decoding cannot look through."""
    active = getattr(model, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise UnsupportedModel(
            f"its adapter ({type(active).__name__}) puts virtual tokens in front of every text, which only PEFT's own "
            "generate does: use an adapter of the weights, as LoRA, or base_model.generate"
        )
    if getattr(active, "alora_invocation_tokens", None):
        raise UnsupportedModel(
            "its adapter is an activated LoRA (alora_invocation_tokens), which begins where PEFT's own generate finds "
            "these tokens in a prompt: use a LoRA that holds for every token, or base_model.generate"
        )


def check_linears(model: nn.Module) -> None:
    """UnsupportedModel for linear layers whose rows depend on each other: bitsandbytes' int8 with a threshold."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0) and type(module).__name__ == "Linear8bitLt":
            raise UnsupportedModel(
                f"{name} is bitsandbytes int8 with a threshold: it picks outlier columns over all rows together, so no "
                "token's result is its own; load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
            )


def token_settings(model: PreTrainedModel, name: str) -> list[Any]:
    """What generation config and config say of special tokens, as "eos_token_id": each None, an id, or several ids."""
    sources = getattr(model, "generation_config", None), Anatomy(model).text
    return [getattr(source, name, None) for source in sources]


# -- parts of layers ---------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: nn.Parameter  # [H]
    eps: float


def llama_norm(module: Any) -> Norm | None:
    """An RMSNorm that computes what Llama's does."""
    if type(module).__name__ not in LLAMA_NORMS:
        return None
    return Norm(module.weight, module.variance_epsilon)


def final_norm(decoder: Any) -> nn.Module | None:
    """The norm behind the layers of a decoder of Llama's shape."""
    return getattr(decoder, "norm", None)


def rotary_of(decoder: Any) -> nn.Module | None:
    """The rotary embedding of a decoder of Llama's shape, which its config alone makes."""
    return getattr(decoder, "rotary_emb", None)


class RowNormParts(NamedTuple):
    """What a norm of rows has, whatever it computes."""

    weight: nn.Parameter | None  # [H], or [G, H] for rows in groups of G
    eps: float


def row_norm_parts(module: Any) -> RowNormParts | None:
    """Of a module that transformers or a checkpoint's own code calls a norm, if it has a plain weight or none, an
    epsilon, and nothing else to compute with. PyTorch's own norms are not among them."""
    kind = type(module)
    if "Norm" not in kind.__name__ or kind.__module__.partition(".")[0] not in STOCK_CODE:
        return None
    held = {name: value for name, value in [*module._parameters.items(), *module._buffers.items()] if value is not None}
    weight = held.pop("weight", None)
    eps = next((vars(module)[name] for name in NORM_EPSILONS if name in vars(module)), None)
    if held or module._modules or not isinstance(eps, float):
        return None
    if weight is not None and (type(weight.data) is not torch.Tensor or weight.dim() > 2 or weight.is_meta):
        return None
    return RowNormParts(weight, eps)


class LlamaLayer(NamedTuple):
    """The parts of a decoder layer of Llama's shape; q_norm and k_norm are over a head, where there are any."""

    attention: nn.Module
    layer_index: int
    head_dim: int
    scale: float  # of attention scores
    input_norm: Norm
    post_norm: Norm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    q_norm: Norm | None
    k_norm: Norm | None


def llama_layer(layer: Any) -> LlamaLayer | None:
    """The parts of a layer, if it is of a known family, its norms are, and its MLP's activation is SiLU."""
    if type(layer).__name__ not in LLAMA_LAYERS or "SiLU" not in type(layer.mlp.act_fn).__name__:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if {type(each).__module__ for each in (attention, mlp)} != {type(layer).__module__}:
        return None  # another part was put in
    input_norm, post_norm = llama_norm(layer.input_layernorm), llama_norm(layer.post_attention_layernorm)
    of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = map(llama_norm, of_heads)
    if input_norm is None or post_norm is None or [q_norm, k_norm].count(None) != of_heads.count(None):
        return None
    return LlamaLayer(
        attention, attention.layer_idx, attention.head_dim, attention.scaling, input_norm, post_norm,
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj, q_norm, k_norm,
    )  # fmt: skip


class Temperature(NamedTuple):
    """How layers without rotary embeddings scale queries by their position (Llama 4)."""

    floor_scale: float
    attn_scale: float

    def scales(self, positions: torch.Tensor) -> torch.Tensor:
        """Factors in fp32, of positions of any shape."""
        return torch.log1p(torch.floor((positions.float() + 1.0) / self.floor_scale)) * self.attn_scale + 1.0


def take_temperature(module: Any) -> Temperature | None:
    """The temperature of a twin's attention module, which from then on leaves it to its caller.

    Stock code counts positions from the length of its cache, which for a tree is not where its nodes stand.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return None
    if not (hasattr(module, "floor_scale") and hasattr(module, "attn_scale")):
        return None
    module.attn_temperature_tuning = False
    return Temperature(module.floor_scale, module.attn_scale)


def expert_weights(module: nn.Module) -> list[torch.Tensor]:
    """The stacked weights [experts, out, in] of a module of experts, empty for other modules."""
    named = (module._parameters.get(name) for name in ("gate_up_proj", "up_proj", "down_proj"))
    found: list[torch.Tensor] = [weight for weight in named if weight is not None and weight.dim() == 3]
    return found if len(found) >= 2 else []


def is_rotary(name: str, module: nn.Module) -> bool:
    """Whether a module, of this name within the model, is a rotary embedding: it computes cos and sin of positions."""
    return "rotary" in name.rpartition(".")[2] and not list(module.parameters())


def recomputes_frequencies(module: Any) -> bool:
    """Whether a rotary embedding sets its frequencies anew while it runs, by the length of the text."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("longrope", "dynamic"))


class LongRopeTables(NamedTuple):
    """The two sets of frequencies of a longrope module, and the factor on cos and sin."""

    short: torch.Tensor  # [D / 2]
    long: torch.Tensor  # [D / 2]
    scaling: float


def longrope_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every longrope embedding."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and getattr(child, "rope_type", None) == "longrope":
                yield parent, name, child


def longrope_tables(stock: Any, switch: int) -> LongRopeTables:
    """Of a stock longrope module, which sets its frequencies by the last position that it was called with."""
    device = stock.inv_freq.device
    probe = torch.zeros(1, device=device)
    stock(probe, torch.tensor([[switch]], device=device))
    long = stock.inv_freq.clone()
    stock(probe, torch.zeros(1, 1, dtype=torch.long, device=device))
    return LongRopeTables(stock.inv_freq.clone(), long, stock.attention_scaling)


def alpha_rope_modules(model: nn.Module) -> Iterator[Any]:
    """The rotary embeddings of Hunyuan: their config says "dynamic", but with an `alpha` their frequencies are fixed.
    Before 5.23, transformers computes them anew all the same, past `max_position_embeddings`."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        rotary = type(module).__name__.startswith("HunYuan") and hasattr(module, "rope_type")
        if rotary and config.rope_parameters.get("alpha"):
            yield module
