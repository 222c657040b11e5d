"""The draft head: one module for EAGLE-1, -2 and -3.

B sequences, T rows, H hidden size, Ht the target's, E embedding width, A features, D head size, Hq/Hkv query/key heads.

    EAGLE-3                                            EAGLE-1 and -2
    g = fc(features [A*Ht])                            g = the target's last hidden state
    x = [input_norm(embed(token)), hidden_norm(g)]     r = fc([embed(token), g])
    y = g + attention(x)                               y = r + attention(r)
    y = y + mlp(post_norm(y))                          y = y + mlp(post_norm(y))
    logits = lm_head(norm(y)), next g = y              logits = the target's lm_head(y), next g = y

More layers are ordinary ones; what formats add (norms before fc, a normed residual, normed feedback, q/k-norm) is in
`HeadConfig`. A row pairs the features of a token with the embedding of the next (Li et al., EAGLE 2024, EAGLE-3 2025).

Attention is the caller's: drafting attends to its slab and tree, training to whatever it trains on. Where parameters
require grad everything here is differentiable, because the ops then take their PyTorch twins.

A head may be one rank's part of a head that is cut (`cut.py`); then its products are added up over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from eagle_fast_kernels.draft_head import head_input
from eagle_fast_kernels.packed import Packed
from eagle_fast_kernels.rms_norm import given_norm_ref
from torch import Tensor, nn

from eagle_fast.head.checkpoint import HeadCheckpoint, check_shapes, write_head
from eagle_fast.head.config import HeadConfig, tensor_shapes
from eagle_fast.head.layer import DraftLayer, frozen, merged_linear, optional, split_linear, weight_and_bias
from eagle_fast.head.rope import rope_table
from eagle_fast.head.shared import Matrix, as_lm_head, embedding_over, targets_if_same, targets_rows
from eagle_fast.head.tree_words import TreeWords
from eagle_fast.layers.embedding import PackedEmbedding
from eagle_fast.layers.linear import FewRowsLinear, QuantizedLinear, quantize
from eagle_fast.layers.lockstep import Sum, Work, alone

Attend = Callable[[int, DraftLayer, Tensor, Tensor], Tensor]


class DraftHead(TreeWords, nn.Module):
    """A draft head beside its target.

    embedding [V, Ht], lm_head_weight [V, Ht], lm_head_bias [V], or longer: the target's, used (and shared, where device
    and dtype allow) for what the checkpoint does not have; the first two may be packed, the embedding in int8 with a
    scale a row. dtype and device: the embedding's by default. Parameters start frozen.
    """

    embedding: Tensor | PackedEmbedding  # [V, E]
    lm_head_weight: Tensor  # [Vd, H]
    lm_head_bias: Tensor | None  # [Vd]
    lm_head_scale: Tensor | None  # [Vd] of a quantized lm_head
    token_ids: Tensor | None  # [Vd] target id of each draft id, None where they are the same
    is_part = False  # of a head that is cut over ranks

    def __init__(
        self,
        checkpoint: HeadCheckpoint,
        *,
        embedding: Matrix | None = None,
        lm_head_weight: Matrix | None = None,
        lm_head_bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        config = self.config = checkpoint.config
        check_shapes(checkpoint.tensors, config)
        like = checkpoint.tensors["layers.0.self_attn.q_proj.weight"]
        if isinstance(embedding, Packed):
            device = device or embedding.words.device
        elif embedding is not None:
            like = embedding
        dtype, device = dtype or like.dtype, torch.device(device or like.device)
        tensors = {name: tensor.to(device, dtype) for name, tensor in checkpoint.tensors.items()}

        num_norms = config.num_features if config.fc_norm else 0
        self.feature_norm = optional(tensors, "input_norm.weight")  # over all features at once
        self.feature_norms = nn.ParameterList(frozen(tensors[f"fc_norm.{i}.weight"]) for i in range(num_norms))
        self.fc = merged_linear(weight_and_bias(tensors, "fc")) if config.has_fc else None
        self.fc_embed_norm = optional(tensors, "enorm.weight")
        self.fc_hidden_norm = optional(tensors, "hnorm.weight")
        self.layers = nn.ModuleList(DraftLayer(config, index, tensors) for index in range(config.num_layers))
        self.norm = optional(tensors, "norm.weight")
        ids = checkpoint.token_ids
        if (config.vocab_size if ids is None else len(ids)) != config.draft_vocab_size:
            found = "none" if ids is None else len(ids)
            raise ValueError(f"the draft vocabulary has {config.draft_vocab_size} tokens, token_ids: {found}")
        self.register_buffer("token_ids", None if ids is None else ids.to(device))
        own = tensors.get("embed_tokens.weight")
        if own is None:
            rows = targets_rows("embedding", embedding, config.vocab_size, config.embedding_size)
        else:
            rows = targets_if_same(own, embedding, dtype, device)
        if isinstance(rows, Packed):
            self.embedding = embedding_over(rows, dtype, device)
        else:
            self.register_buffer("embedding", rows.to(device, dtype), persistent=False)
        self.register_buffer("lm_head_scale", None)
        if config.own_lm_head:
            own = tensors["lm_head.weight"]
            if config.kind == "eagle" and not isinstance(lm_head_weight, Packed):
                own = cast(Tensor, targets_if_same(own, lm_head_weight, dtype, device))
            self.lm_head_weight = frozen(own)
            self.lm_head_bias = optional(tensors, "lm_head.bias")
        else:
            self._share_lm_head(lm_head_weight, lm_head_bias, dtype, device)

    def _share_lm_head(self, matrix: Matrix | None, bias: Tensor | None, dtype, device) -> None:
        size, scale = self.config.vocab_size, None
        weight = targets_rows("lm_head", matrix, size, self.config.hidden_size)
        if isinstance(weight, Packed):
            weight, scale = as_lm_head(weight, dtype)
        weight = weight if scale is not None else weight.to(dtype)
        bias = None if bias is None else bias.detach()[:size].to(dtype)
        for name, tensor in (("lm_head_weight", weight), ("lm_head_bias", bias), ("lm_head_scale", scale)):
            if tensor is not None:
                tensor = tensor.to(device)
                tensor = tensor if self.token_ids is None else tensor[self.token_ids]
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def random(
        cls,
        config: HeadConfig,
        *,
        embedding: Matrix | None = None,
        lm_head_weight: Matrix | None = None,
        lm_head_bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        seed: int = 0,
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> DraftHead:
        """A fresh head: normal weights, norms one, biases zero; what is not given of the target is random as well.

        token_ids [Vd]: target id of each draft id, by default random ones in ascending order.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

        tensors = {}
        for name, shape in tensor_shapes(config).items():
            is_norm = "norm" in name.split(".")[-2] or name.startswith("fc_norm.")
            fixed = torch.ones if is_norm else torch.zeros
            is_matrix = len(shape) == 2
            tensors[name] = normal(*shape) if is_matrix else fixed(shape, dtype=dtype, device=device)
        if config.draft_vocab_size < config.vocab_size and token_ids is None:
            order = torch.randperm(config.vocab_size, generator=generator, device=device)
            token_ids = order[: config.draft_vocab_size].sort().values
        if embedding is None and not config.own_embedding:
            embedding = normal(config.vocab_size, config.embedding_size)
        if lm_head_weight is None and not config.own_lm_head:
            lm_head_weight = normal(config.vocab_size, config.hidden_size)
        return cls(
            HeadCheckpoint(config, tensors, token_ids),
            embedding=embedding,
            lm_head_weight=lm_head_weight,
            lm_head_bias=lm_head_bias,
            dtype=dtype,
            device=device,
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def feature_size(self) -> int:
        """Width of what `embed_features` takes."""
        return self.config.feature_size

    def rope_table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, D] for positions 0..P-1, fp32 (narrower where only a part of each head is rotated)."""
        return rope_table(
            self.config.rope,
            num_positions,
            head_dim=self.config.head_dim,
            max_position_embeddings=self.config.max_position_embeddings,
            interleaved=self.config.rope_interleaved,
            device=self.device,
        )

    def embed_features(self, features: Tensor) -> Tensor:
        """The target's features [..., A*Ht] as the hidden state [..., H] that `forward` takes."""
        features = features.to(self.dtype)
        eps = self.config.rms_norm_eps
        if self.config.kind == "eagle":
            return features
        if self.config.fc_norm:
            parts = zip(features.chunk(len(self.feature_norms), -1), self.feature_norms, strict=True)
            features = torch.cat([given_norm_ref(part, weight, eps) for part, weight in parts], -1)
        features = given_norm_ref(features, self.feature_norm, eps)
        return features if self.fc is None else self.fc(features)

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        parts: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One pass over rows of tokens [B, T] with hidden states [B, T, H] of the tokens before them.

        rows [B, T]: which of hidden [..., H] they are, if not all in order.

        attend(layer index, layer, qkv [B, T, (Hq + 2 Hkv) D], positions [B, T]) -> [B, T, Hq D] norms q and k, rotates
        them, stores keys and values and attends. parts: it also takes qkv as `few_rows_sums` gives it, [S, B, T, ...].

        Returns (next hidden [B, T, H], fed back when drafting goes on; states [B, T, H], what lm_head reads).
        """
        return alone(self.passing(tokens, hidden, positions, attend, rows=rows, parts=parts))

    def passing(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        parts: bool = False,
    ) -> Work[tuple[Tensor, Tensor]]:
        """`forward`, which stops wherever a product is added to the residual stream."""
        x, residual = self._first_input(tokens, hidden, rows)
        out = x
        for index, layer in enumerate(self.draft_layers):
            if index:
                x, residual = yield from self._add_norm(out, residual, layer.input_norm)
            attended = attend(index, layer, layer.qkv.sums(x) if parts else layer.qkv(x), positions)
            x, residual = yield from self._add_norm(layer.o.sums(attended), residual, layer.post_norm)
            out = layer.mlp(x)
        states, output = yield from self._add_norm(out, residual, self.norm)
        return (states if self.config.norm_output else output), states

    def _first_input(self, tokens: Tensor, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the first layer's attention reads, and the residual stream that it adds to."""
        first, eps, width = self.draft_layers[0], self.config.rms_norm_eps, hidden.shape[-1]
        eagle3 = self.config.kind == "eagle3"
        norms = (first.input_norm, first.hidden_norm) if eagle3 else (self.fc_embed_norm, self.fc_hidden_norm)
        rows = None if rows is None else rows.reshape(-1)
        flat = tokens.reshape(-1).contiguous(), hidden.reshape(-1, width)
        table = self.embedding.packed if isinstance(self.embedding, PackedEmbedding) else self.embedding
        x, hidden = (each.view(*tokens.shape, -1) for each in head_input(*flat, table, *norms, eps, rows=rows))
        if eagle3:
            return x, x[..., -width:] if self.config.norm_before_residual else hidden
        assert self.fc is not None
        x = self.fc(x)
        return given_norm_ref(x, first.input_norm, eps), x

    @property
    def draft_layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", self.layers)

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor | None) -> Work[tuple[Tensor, Tensor]]:
        """(RMSNorm(x + residual), x + residual), all [B, T, H]; x may come in parts, [S, B, T, H]. No weight: the sum,
        twice."""
        normed, total = yield Sum(*_flat(x, residual), weight, self.config.rms_norm_eps)
        return normed.view(residual.shape), total.view(residual.shape)

    def quantize(self) -> None:
        """Turn the weights of all products into int8 with a scale for each output, for good: no training, no export.

        What is drafted changes a little, the text does not. Norms, biases and the embedding stay as they are; an
        lm_head shared with the target gets a copy of its own.
        """
        for module in list(self.modules()):
            for name, child in module._modules.items():
                if isinstance(child, FewRowsLinear):
                    module._modules[name] = QuantizedLinear(child)
        if self.lm_head_scale is not None:  # the target's, which is so already
            return
        weight, scale = quantize(self.lm_head_weight)
        del self.lm_head_weight  # a parameter or a buffer
        self.lm_head_weight, self.lm_head_scale = frozen(weight), scale

    quantise = quantize  # its name in 0.1

    def checkpoint(self) -> HeadCheckpoint:
        """The head as `read_head` gives it; tensors are views where weights are merged. Needs 16- or 32-bit weights."""
        named: dict[str, Tensor | None] = {
            "input_norm.weight": self.feature_norm,
            "enorm.weight": self.fc_embed_norm,
            "hnorm.weight": self.fc_hidden_norm,
            "norm.weight": self.norm,
        }
        named |= {f"fc_norm.{i}.weight": weight for i, weight in enumerate(self.feature_norms)}
        if self.fc is not None:
            named |= split_linear(self.fc, {"fc": self.config.hidden_size})
        for index, layer in enumerate(self.draft_layers):
            named |= layer.tensors(index)
        if self.config.own_lm_head:
            named |= {"lm_head.weight": self.lm_head_weight, "lm_head.bias": self.lm_head_bias}
        if self.config.own_embedding:
            own = self.embedding
            named["embed_tokens.weight"] = own.rows.dense() if isinstance(own, PackedEmbedding) else own
        tensors = {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
        return HeadCheckpoint(self.config, tensors, self.token_ids)

    def export(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in SafeAILab's layout."""
        write_head(folder, self.checkpoint())


def _flat(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., B, T, H] and residual [B, T, H] as rows."""
    return x.flatten(-3, -2), residual.reshape(-1, residual.shape[-1])
