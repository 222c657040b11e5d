"""What the rows of a forward are, a chunk of a prompt or the nodes of a tree: where they are written, how they attend.

B sequences, T query rows, Hq/Hkv query and key heads, D head size, L allocated cache rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eagle_fast_kernels.tree_attention import tree_attention
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

from eagle_fast.layers.transfers import Transfers

BLOCK = 1024  # queries that share a mask


class Block(NamedTuple):
    """Queries at positions first .. high-1 of a prompt, over the keys low .. high-1."""

    first: int
    low: int
    high: int


@dataclass
class PrefillStep:
    """A chunk of the prompt: `count` tokens of every sequence at rows start .. start+count, causal.

    Rows past a sequence's own end hold garbage that no live query sees, and that decoding overwrites.
    """

    start: int
    count: int
    masks: dict = field(default_factory=dict)
    firsts: dict = field(default_factory=dict)

    def first_rows(self, batch: int, device: torch.device) -> Tensor:
        """[B] cache row of each sequence's first row: one tensor for all layers of a device."""
        key = batch, device
        if key not in self.firsts:
            self.firsts[key] = torch.full((batch,), self.start, device=device)
        return self.firsts[key]

    def positions(self, device: torch.device) -> Tensor:
        """[1, T] of the rows."""
        return torch.arange(self.start, self.start + self.count, device=device)[None]

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [B, Hkv, T, D] of these rows where they belong in keys, values [B, Hkv, L, D]."""
        keys[:, :, self.start : self.start + self.count] = k
        values[:, :, self.start : self.start + self.count] = v

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int = 0, chunk: int = 0,
        softcap: float = 0.0, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [B, Hq, T, D] of these rows, written already, over keys, values [B, Hkv, L, D] -> [B, T, Hq, D]."""
        return prefill_attention(
            q, keys, values, self, scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks
        )

    def mask(self, block: Block, window: int, chunk: int, device: torch.device) -> Tensor | None:
        """Visible keys of a block, bool [its queries, its keys]; None where plain causal attention says the same."""
        first, low, high = block
        if first == low == 0 and (window == 0 or window >= high) and (chunk == 0 or chunk >= high):
            return None
        key = (block, window, chunk, device)
        if key not in self.masks:
            q = torch.arange(first, high, device=device)[:, None]
            k = torch.arange(low, high, device=device)[None]
            visible = k <= q
            if window:
                visible &= q - k < window
            if chunk:
                visible &= q // chunk == k // chunk
            self.masks[key] = visible
        return self.masks[key]


@dataclass
class TreeStep:
    """T nodes per sequence, in tree slots `first` on, at cache rows lengths + slot: see the kernel `tree_attention`."""

    lengths: Tensor  # [B] rows of the prefix
    ancestors: Tensor  # [B, T, W] masks over the tree slots
    depths: Tensor  # [B, first + T] of the tree slots
    first: int = 0

    @cached_property
    def slots(self) -> Tensor:
        """[B, T] cache rows of the nodes."""
        return self.lengths[:, None] + torch.arange(self.ancestors.shape[1], device=self.lengths.device)

    def first_rows(self, batch: int, device: torch.device) -> Tensor:
        """[B] cache row of each sequence's first row."""
        return self.lengths

    def positions(self, device: torch.device) -> Tensor:
        """[B, T] of the nodes."""
        return self.lengths[:, None] + self.depths[:, self.first :]

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        """See `PrefillStep`."""
        rows = self.slots[:, None, :, None].expand_as(k)
        keys.scatter_(2, rows, k)
        values.scatter_(2, rows, v)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int = 0, chunk: int = 0,
        softcap: float = 0.0, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `PrefillStep`."""
        return tree_attention(
            q, keys, values, self.lengths, self.ancestors, scale=scale, first=self.first, depths=self.depths,
            window=window, chunk=chunk, softcap=softcap, sinks=sinks,
        )  # fmt: skip

    def sent_to(self, device: torch.device, tokens: Tensor, transfers: Transfers) -> tuple[Tensor, TreeStep]:
        """(tokens [B, T], the step) on another device, sent as one copy."""
        tokens, lengths, ancestors, depths = transfers.packed(device, tokens, self.lengths, self.ancestors, self.depths)
        return tokens, TreeStep(lengths, ancestors, depths, self.first)


Step = PrefillStep | TreeStep


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, step: PrefillStep, *, scale: float, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of a prompt chunk. q [B, Hq, T, D]; k, v [B, Hkv, >= start+T, D] -> [B, T, Hq, D].

    In one call where a kernel needs no mask, else in blocks of queries, each with the keys that it can reach: neither
    masks nor scores of a long chunk are ever held at once.
    """
    start, end = step.start, step.start + step.count
    explicit = bool(softcap) or sinks is not None
    local = 0 < window < end or 0 < chunk < end
    grouped = q.shape[1] != k.shape[1]
    if not explicit and not local:
        whole: dict[str, Any] = {"scale": scale, "enable_gqa": grouped}
        if start == 0 and not (q.is_cuda and grouped and q.dtype == torch.float32):
            out = F.scaled_dot_product_attention(q, k.narrow(2, 0, end), v.narrow(2, 0, end), is_causal=True, **whole)
            return out.transpose(1, 2).contiguous()
        if start and _takes_flash(q, k, v, grouped):
            aligned = causal_lower_right(step.count, end)
            out = F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], attn_mask=aligned, **whole)
            return out.transpose(1, 2).contiguous()
    outs = []
    for first in range(start, end, BLOCK):
        block = Block(first, _first_key(first, window, chunk), min(first + BLOCK, end))
        queries, keys = slice(first - start, block.high - start), slice(block.low, block.high)
        mask = step.mask(block, window, chunk, q.device)
        if explicit:
            out = _explicit_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scale, softcap, sinks)
        else:
            out = F.scaled_dot_product_attention(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=grouped,
            )  # fmt: skip
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, 1).contiguous()


def _first_key(position: int, window: int, chunk: int) -> int:
    """The first key that a query at this position, and so any later one, can see."""
    low = max(0, position - window + 1) if window else 0
    return max(low, position // chunk * chunk) if chunk else low


def _takes_flash(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether a kernel runs a causal chunk that starts behind other keys without a mask in memory."""
    return q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped))


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """What SDPA has no argument for: a soft cap on the scores, a sink logit in the denominator."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
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
