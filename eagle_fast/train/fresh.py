"""A head to begin with: its shape from the target's, its first weights such that it speaks the target's language.

`fc` passes the highest of the three features on, scaled to RMS 1, the final norm and `lm_head` are the target's: around
a decoder layer that adds nothing, the head would say what the target's own norm and lm_head say of that feature. What
the layer has to learn is the step to the next token.

F feature width, H hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig, default_feature_layers
from eagle_fast.head.rope import DEFAULT_THETA
from eagle_fast.head.shared import shape_of
from eagle_fast.target import Target
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.ends import dense_matrix, device_of, dtype_of, ends, matrix, num_rows


class Measured(NamedTuple):
    """Sizes of the target's activations on some of its own texts."""

    scale: Tensor  # [F] one over each feature channel's size
    level: float  # median over tokens of the highest feature's RMS
    gain: Tensor  # [H] of the final norm


@torch.no_grad()
def measure(model: PreTrainedModel, feature_layers: tuple[int, ...], tokens: Tensor) -> Measured:
    """Measure on texts [B, L] without padding. First tokens are left out: models park huge values there."""
    last = len(feature_layers)
    target = Target(model, (*feature_layers, Anatomy(model).num_layers))
    normed: list[Tensor] = []
    head = target.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    _, features = target.read(tokens)
    handle.remove()
    parts = features[:, 1:].float().flatten(0, 1).chunk(last + 1, -1)
    after = normed[-1][:, 1:].float().flatten(0, 1)
    before = parts[last] * parts[last].square().mean(-1, keepdim=True).rsqrt()
    gain = (before * after).sum(0) / before.square().sum(0)
    size = 1.25 * torch.cat(parts[:last], -1).abs().mean(0)  # the RMS of normal values, and not led by few huge ones
    level = parts[last - 1].square().mean(-1).sqrt().median()
    return Measured(1 / size.clamp(min=1e-6), float(level), gain)


def head_config(
    model: PreTrainedModel,
    vocab_size: int,
    intermediate_size: int = 0,
    num_kv_heads: int = 0,
    share_lm_head: bool = False,
) -> HeadConfig:
    """One layer as wide as the target's, with its attention; 0 takes the target's intermediate size and key heads."""
    anatomy = Anatomy(model)
    if num_kv_heads and anatomy.num_heads % num_kv_heads:
        raise ValueError(f"kv_heads={num_kv_heads}: use a number that divides the target's {anatomy.num_heads} heads")
    hidden = anatomy.hidden_size
    embedding, lm_head = ends(model)
    return HeadConfig(
        kind="eagle3",
        hidden_size=hidden,
        target_hidden_size=hidden,
        embedding_size=shape_of(matrix(embedding))[1],
        intermediate_size=intermediate_size or anatomy.intermediate_size,
        num_heads=anatomy.num_heads,
        num_kv_heads=num_kv_heads or anatomy.num_kv_heads,
        head_dim=anatomy.head_dim,
        vocab_size=num_rows(lm_head),
        draft_vocab_size=vocab_size,
        num_target_layers=anatomy.num_layers,
        feature_layers=default_feature_layers(anatomy.num_layers),
        rms_norm_eps=anatomy.rms_norm_eps,
        rope={"rope_type": "default", "rope_theta": float(anatomy.rope_theta or DEFAULT_THETA)},
        own_lm_head=not share_lm_head,
        max_position_embeddings=anatomy.max_position_embeddings,
    )


def empty_head(model: PreTrainedModel, config: HeadConfig, token_ids: Tensor | None, seed: int = 0) -> DraftHead:
    """Random weights around the target's embedding, in its dtype and on its device, all of them trainable."""
    embedding, lm_head = ends(model)
    head = DraftHead.random(
        config,
        embedding=matrix(embedding),
        lm_head_weight=None if config.own_lm_head else dense_matrix(lm_head),
        token_ids=token_ids,
        seed=seed,
        dtype=dtype_of(embedding),
        device=device_of(embedding),
    )
    return head.requires_grad_(True)


@torch.no_grad()
def start_from_target(head: DraftHead, model: PreTrainedModel, measured: Measured) -> None:
    """Give `fc`, the final norm and `lm_head` their first values, for features scaled by `measured.scale`."""
    assert isinstance(head.fc, nn.Linear)
    assert head.norm is not None
    hidden = head.config.hidden_size
    highest = slice(head.config.feature_size - hidden, None)
    passed_on = torch.diag(1 / (measured.scale[highest] * measured.level))
    head.fc.weight.zero_()
    head.fc.weight[:, highest] = passed_on.to(head.fc.weight.dtype)
    head.norm.copy_(measured.gain)
    if head.config.own_lm_head:
        weight = dense_matrix(model.get_output_embeddings())
        head.lm_head_weight.copy_(weight if head.token_ids is None else weight[head.token_ids])


def scaled_fc(head: DraftHead, factors: Tensor) -> None:
    """Multiply the columns of `fc` by factors [F]: the scale, to take unscaled features, or its inverse, to go back."""
    assert isinstance(head.fc, nn.Linear)
    with torch.no_grad():
        head.fc.weight.mul_(factors.to(head.fc.weight.dtype))
