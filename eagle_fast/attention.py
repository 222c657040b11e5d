"""Our attention inside stock models, through transformers' `AttentionInterface`.

B sequences, T query rows, Hq/Hkv query and key heads, D head size, L allocated cache rows.

The layers hand over q [B, Hq, T, D] and whatever `Cache.update` returned: here the whole slab views k, v
[B, Hkv, L, D]. What else attention needs of the round is read from the `LayerBinding` on the module, since some
families drop unknown keywords of forward. No mask function is registered under our name, so transformers builds none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from eagle_fast_kernels.tree_attention import tree_attention
from transformers import AttentionInterface

from eagle_fast.transfers import packed_to

IMPLEMENTATION = "eagle_fast"


@dataclass(kw_only=True)
class Step:
    """What both kinds of forward have."""

    rows: torch.Tensor | None = None

    def row_index(self, batch: int, count: int, device: torch.device) -> torch.Tensor:
        """[B, T] number of each row of the forward, made once for all layers."""
        if self.rows is None:
            self.rows = torch.arange(batch * count, device=device).view(batch, count)
        return self.rows


@dataclass
class PrefillStep(Step):
    """A chunk of the prompt: `count` tokens of every sequence at rows start .. start+count, causal.

    Rows past a sequence's own end hold garbage that no live query sees, and that decoding overwrites.
    """

    start: int
    count: int
    masks: dict = field(default_factory=dict)

    def first_rows(self, batch: int, device: torch.device) -> torch.Tensor:
        """[B] cache row of each sequence's first row."""
        return torch.full((batch,), self.start, device=device)

    def mask(self, window: int, chunk: int, device: torch.device) -> torch.Tensor | None:
        """[count, start+count] bool of visible keys; None where plain causal attention of SDPA says the same."""
        end = self.start + self.count
        if self.start == 0 and (window == 0 or window >= end) and (chunk == 0 or chunk >= end):
            return None
        key = (window, chunk, device)
        if key not in self.masks:
            q = torch.arange(self.start, end, device=device)[:, None]
            k = torch.arange(end, device=device)[None]
            visible = k <= q
            if window:
                visible &= q - k < window
            if chunk:
                visible &= q // chunk == k // chunk
            self.masks[key] = visible
        return self.masks[key]


@dataclass
class TreeStep(Step):
    """T nodes a sequence, at cache rows lengths + slot; see `eagle_fast_kernels.tree_attention`."""

    lengths: torch.Tensor  # [B]
    slots: torch.Tensor  # [B, T] cache rows of the nodes
    ancestors: torch.Tensor  # [B, T, W]
    depths: torch.Tensor  # [B, T]

    def first_rows(self, batch: int, device: torch.device) -> torch.Tensor:
        """[B] cache row of each sequence's first row."""
        return self.lengths

    def sent_to(self, device: torch.device, tokens: torch.Tensor) -> tuple[torch.Tensor, TreeStep]:
        """(tokens [B, T], the step) on another device, sent as one copy."""
        tokens, *step = packed_to(device, tokens, self.lengths, self.slots, self.ancestors, self.depths)
        return tokens, TreeStep(*step)


@dataclass
class AttentionContext:
    """What the current forward is, shared by a target's attention layers on one device and by its cache."""

    step: PrefillStep | TreeStep | None = None


@dataclass(frozen=True)
class LayerBinding:
    """What one attention module needs beyond the call: the round's context and its own kind of locality."""

    context: AttentionContext
    window: int = 0
    chunk: int = 0
    capped: bool = True


def prefill_attention(q, k, v, step: PrefillStep, *, scale, window=0, chunk=0, softcap=0.0, sinks=None):
    """Causal attention of a prompt chunk. q [B, Hq, T, D]; k, v [B, Hkv, >= start+T, D] -> [B, T, Hq, D]."""
    end = step.start + step.count
    k, v = k[:, :, :end], v[:, :, :end]
    mask = step.mask(window, chunk, q.device)
    if softcap or sinks is not None:
        out = _explicit_attention(q, k, v, step, mask, scale, softcap, sinks)
    else:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).contiguous()


def _explicit_attention(q, k, v, step, mask, scale, softcap, sinks):
    """What SDPA has no argument for: a soft cap on the scores, a sink logit in the denominator."""
    if mask is None:
        end = step.start + step.count
        mask = torch.ones(step.count, end, dtype=torch.bool, device=q.device).tril(step.start)
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(v.dtype) @ v.repeat_interleave(groups, 1)


def eagle_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_
):
    """The function that transformers calls; returns (out [B, T, Hq, D], None)."""
    binding: LayerBinding = module.eagle_binding
    step = binding.context.step
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": binding.window,
        "chunk": binding.chunk,
        "softcap": softcap if softcap and binding.capped else 0.0,
        "sinks": s_aux,
    }
    if isinstance(step, PrefillStep):
        return prefill_attention(query, key, value, step, **options), None
    assert isinstance(step, TreeStep), "attention outside of a prefill or a round"
    depths = step.depths if binding.window or binding.chunk else None
    out = tree_attention(query, key, value, step.lengths, step.ancestors, depths=depths, **options)
    return out, None


AttentionInterface.register(IMPLEMENTATION, eagle_attention)
