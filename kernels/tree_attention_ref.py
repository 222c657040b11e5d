"""`tree_attention` in plain PyTorch: the tests' oracle and the CPU path. Shapes as there."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def tree_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, *, scale: float, depths: Tensor | None = None,
    first: int = 0, window: int = 0, chunk: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`tree_attention` in plain PyTorch: fp32 inside, fp64 for fp64 inputs."""
    num_queries, num_kv_heads = q.shape[2], k.shape[1]
    if not softcap and sinks is None and first == 0 and _is_lone_row(q, lengths, ancestors, window or chunk):
        live_rows = int(lengths) + 1
        out = scaled_dot_product_attention(q, k[:, :, :live_rows], v[:, :, :live_rows], scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
    if lengths.device.type == "cpu":  # where reading a length costs nothing, the rows past it cost nothing either
        live_rows = int(lengths.max()) + first + num_queries
        k, v = k[:, :, :live_rows], v[:, :, :live_rows]
    num_rows = k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    slots = torch.arange(num_rows, device=q.device) - lengths[:, None]  # [B, L], negative in the prefix
    visible = _visible(slots, lengths, ancestors, depths, first, num_queries, window, chunk)
    visible = visible[:, None, :, None, :]  # [B, 1, T, 1, L]

    query = rearrange(q, "b (h g) t d -> b h (t g) d", h=num_kv_heads).to(compute)
    scores = query @ k.to(compute).transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = rearrange(scores, "b h (t g) n -> b h t g n", t=num_queries).masked_fill(~visible, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = rearrange(sinks.to(compute), "(h g) -> h 1 g 1", h=num_kv_heads)
        peak = torch.maximum(peak, sink)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)  # a row that sees nothing
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    weights = weights / total.masked_fill(total == 0, 1.0)

    live = slots < first + num_queries  # rows past it may hold NaN
    values = v.to(compute).masked_fill(~live[:, None, :, None], 0.0)
    out = rearrange(weights, "b h t g n -> b h (t g) n") @ values
    return rearrange(out, "b h (t g) d -> b t (h g) d", t=num_queries).to(q.dtype).contiguous()


def _is_lone_row(q: Tensor, lengths: Tensor, ancestors: Tensor, reach: int) -> bool:
    """Whether this is plain decoding on a CPU: the root alone of one sequence, which sees itself and all before it.
    That is torch's own attention, in a fifth of the time. reach: of a window or a chunk, 0 for none."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64) or q.shape[0] != 1 or q.shape[2] != 1:
        return False
    return (not reach or int(lengths) < reach) and bool(int(ancestors[0, 0, 0]) & 1)


def _visible(
    slots: Tensor, lengths: Tensor, ancestors: Tensor, depths: Tensor | None, first: int, num_queries: int, window: int,
    chunk: int,
) -> Tensor:  # fmt: skip
    """Which cache rows each query sees: [B, T, L] bool."""
    num_slots = first + num_queries
    index = slots.clamp(0, num_slots - 1)
    words = ancestors.gather(2, (index >> 6)[:, None].expand(-1, num_queries, -1))
    bits = (words >> (index & 63)[:, None]) & 1
    visible = (slots < 0)[:, None] | ((bits == 1) & (slots < num_slots)[:, None])
    if window > 0 or chunk > 0:
        assert depths is not None
        start = lengths[:, None]
        key_positions = torch.where(slots < 0, slots + start, start + depths.gather(1, index))[:, None]
        query_positions = (start + depths[:, first:num_slots])[:, :, None]
        if window > 0:
            visible = visible & (query_positions - key_positions < window)
        if chunk > 0:
            visible = visible & (query_positions // chunk == key_positions // chunk)
    return visible
