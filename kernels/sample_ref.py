"""`sample` in plain PyTorch: the tests' oracle and the CPU path. Shapes as there."""

from __future__ import annotations

import torch

from .noise import gumbel_row_ref

# Temperatures up to this are greedy: the quotient would overflow before it could matter.
GREEDY_TEMPERATURE = 1e-5


def sample_ref(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
) -> torch.Tensor:
    tokens, vocab_size = logits.argmax(-1), logits.shape[-1]
    valid = logits.amax(-1).isfinite()
    sampled = (temperature > GREEDY_TEMPERATURE)[:, None]
    # Only a CPU tensor can be asked for its value at no cost.
    if logits.device.type != "cpu" or bool(sampled.any()):
        x = logits.float() / torch.where(sampled, temperature[:, None], 1.0)[..., None]
        x = warp_ref(x, top_k, top_p, min_p)
        noise = gumbel_row_ref(seeds[:, None], sequences[:, None], positions, vocab_size)
        tokens = torch.where(sampled, noise.add_(x).argmax(-1), tokens)
    return torch.where(valid, tokens, -1)


def warp_ref(x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """x [B, T, V] float32 with -inf at what top-k, top-p and min-p [B] remove."""
    top_k, top_p, min_p = (setting[:, None, None] for setting in (top_k, top_p, min_p))
    on_cpu, vocab_size = x.device.type == "cpu", x.shape[-1]
    # Only a CPU tensor can be asked for its values at no cost: there the warpers rank no more than they need.
    top_k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    if not on_cpu or bool((top_k < vocab_size).any()):
        last = top_k.expand(*x.shape[:2], 1) - 1
        ranked = _descending(x, int(top_k.max()) if on_cpu else vocab_size)
        x = x.masked_fill(x < ranked.gather(-1, last), float("-inf"))
    if not on_cpu or bool((top_p < 1).any()):
        # Values below the floor weigh less than 1 - top_p all together: removed, whatever the others are.
        log_sum = x.logsumexp(-1, keepdim=True)
        floor = torch.where(top_p < 1, log_sum + torch.log((1 - top_p) / vocab_size) - 1e-3, float("inf"))
        ranked = _descending(x, int((x > floor).sum(-1).max().clamp(min=1)) if on_cpu else vocab_size)
        # Kept: every value with less than top_p of the probability above it, and the maximum always.
        probs = torch.exp(ranked - log_sum)
        above = probs.cumsum(-1) - probs
        last = (above < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
        x = x.masked_fill((x < ranked.gather(-1, last)) & (top_p < 1), float("-inf"))
    if not on_cpu or bool((min_p > 0).any()):
        x = x.masked_fill(torch.exp(x - x.amax(-1, keepdim=True)) < min_p, float("-inf"))
    return x


def _descending(x: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest values of each row, in order."""
    return x.topk(count, -1).values if count < x.shape[-1] // 2 else x.sort(-1, descending=True).values
