"""The draft head's last step in one pass over its weights: logits, log-softmax and top-k, without writing the logits.

    z = hidden @ weight.T (* scale) (+ bias)                             hidden [R, H], weight [Vd, H]
    y = gain z + share G(seed, sequence, position, target token)         gain, share [B], G the target's own noise
    scores = the k largest of log_softmax(y), tokens = their target ids

Bytes: the weights, Vd H elements, once for every 64 rows (EAGLE-3's 32000 x 4096 in bf16: 262 MB, 85 us at 3.08 TB/s;
43 us in fp8). A program takes one tile of the vocabulary: it keeps the tile's k best as packed (value, index) keys and
its log-sum-exp (R tiles (8 k + 8) bytes, 0.4 MB at R = 10), which one program per row merges. Lower draft ids win ties;
a NaN counts as -inf. Left out: overlapping the merge with the next launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import device_guard, upcast, use_triton
from .linear import few_rows_matmul, to_dtype
from .noise import gumbel, gumbel_ref, gumbel_row_ref
from .order_key import PACKED_ABSENT, pack, pack_ref, unpack, unpack_ref
from .overlap import after_earlier_kernels, dependent_launch


class Tile(NamedTuple):
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By bytes of a weight, then rows of a program. Candidates for tuning: block_n 32, 64, 128; block_k 64, 128, 256; warps
# 4, 8; stages 3 .. 7, as far as shared memory reaches.
TILES = {
    1: {16: Tile(64, 128, 4, 6), 32: Tile(64, 128, 4, 5), 64: Tile(128, 128, 8, 4)},
    2: {16: Tile(64, 128, 4, 5), 32: Tile(64, 128, 4, 4), 64: Tile(128, 64, 8, 5)},
    4: {16: Tile(64, 32, 4, 3), 32: Tile(64, 32, 4, 3), 64: Tile(64, 32, 4, 3)},
}


@triton.jit
def _logits_tile(
    hidden_ptr, weight_ptr, rows, columns, num_rows, vocab_size, hidden_size, stride_hidden, stride_weight,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[columns].T in float32."""
    offsets = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden + offsets[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[:, None] * stride_weight + offsets[None, :]
    z = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        inside = (offsets < hidden_size - start)[None, :]
        h = tl.load(hidden_ptrs + start, mask=inside & (rows < num_rows)[:, None], other=0.0)
        w = tl.load(weight_ptrs + start, mask=inside & (columns < vocab_size)[:, None], other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
        z = tl.dot(h, tl.trans(to_dtype(w, h.dtype, UPCAST)), z, input_precision="ieee")
    return z


@triton.jit
def _tile_topk_kernel(
    packed_ptr, partial_ptr, hidden_ptr, weight_ptr, bias_ptr, scale_ptr, token_ids_ptr,
    gain_ptr, share_ptr, positions_ptr, seeds_ptr, sequences_ptr,
    num_rows, rows_per_sequence, vocab_size, hidden_size, stride_hidden, stride_weight,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """packed [R, tiles, K]: each tile's best in order; partial [R, tiles, 2]: its maximum and sum of exponentials."""
    after_earlier_kernels(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < num_rows, columns < vocab_size
    z = _logits_tile(
        hidden_ptr, weight_ptr, rows, columns, num_rows, vocab_size, hidden_size, stride_hidden, stride_weight,
        BLOCK_K, UPCAST,
    )  # fmt: skip
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if gain_ptr is not None:
        b = rows // rows_per_sequence
        z *= tl.load(gain_ptr + b, mask=row_mask, other=0.0)[:, None]
        share = tl.load(share_ptr + b, mask=row_mask, other=0.0)
        if tl.max(share, 0) > 0:
            seed = tl.load(seeds_ptr + b, mask=row_mask, other=0)[:, None]
            sequence = tl.load(sequences_ptr + b, mask=row_mask, other=0)[:, None]
            position = tl.load(positions_ptr + b, mask=row_mask, other=0)[:, None]
            tokens = columns.to(tl.int64)
            if token_ids_ptr is not None:
                tokens = tl.load(token_ids_ptr + columns, mask=column_mask, other=0)
            z += share[:, None] * gumbel(seed, sequence, position, tokens[None, :])

    z = tl.where((z == z) & column_mask[None, :], z, float("-inf"))
    peak = tl.max(z, 1)
    mass = tl.sum(tl.exp(z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
    slot = rows.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(partial_ptr + slot * 2, peak, mask=row_mask)
    tl.store(partial_ptr + slot * 2 + 1, mass, mask=row_mask)
    packed = tl.where(column_mask[None, :], pack(z, columns[None, :]), PACKED_ABSENT)
    for j in tl.static_range(K):
        best = tl.max(packed, 1)
        tl.store(packed_ptr + slot * K + j, best, mask=row_mask)
        packed = tl.where(packed == best[:, None], PACKED_ABSENT, packed)


@triton.jit
def _merge_kernel(
    scores_ptr, tokens_ptr, packed_ptr, partial_ptr, token_ids_ptr, num_tiles,
    K: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_TILES)
    partial_ptrs = partial_ptr + (row * num_tiles + tiles) * 2
    peaks = tl.load(partial_ptrs, mask=tiles < num_tiles, other=float("-inf"))
    masses = tl.load(partial_ptrs + 1, mask=tiles < num_tiles, other=0.0)
    peak = tl.max(peaks, 0)
    log_sum = peak + tl.log(tl.sum(masses * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)), 0))

    slots = tl.arange(0, BLOCK_PACKED)
    packed = tl.load(packed_ptr + row * num_tiles * K + slots, mask=slots < num_tiles * K, other=PACKED_ABSENT)
    for j in tl.static_range(K):
        best = tl.max(packed, 0)
        packed = tl.where(packed == best, PACKED_ABSENT, packed)
        value, token = unpack(best)
        score = value - log_sum
        tl.store(scores_ptr + row * K + j, tl.where(score == score, score, float("-inf")))
        if token_ids_ptr is not None:
            token = tl.load(token_ids_ptr + token)
        tl.store(tokens_ptr + row * K + j, token)


def lm_head_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [R, k] float32 log-probabilities in descending order, tokens [R, k] int64 target ids).

    bias and scale (of a quantised weight's rows) are [Vd]; token_ids [Vd] maps draft to target ids (None: the same).
    gain and share (at least 0) float32, positions, seeds and sequences int64 are [B], each for R / B rows in turn, and
    given together or not at all: without them y = z.
    """
    noise = (gain, share, positions, seeds, sequences)
    if any(x is None for x in noise) and any(x is not None for x in noise):
        raise ValueError("give gain, share, positions, seeds and sequences together, or none of them")
    if not use_triton(hidden, weight):
        return lm_head_topk_ref(
            hidden, weight, k, bias=bias, scale=scale, token_ids=token_ids,
            gain=gain, share=share, positions=positions, seeds=seeds, sequences=sequences,
        )  # fmt: skip
    (num_rows, hidden_size), vocab_size, device = hidden.shape, weight.shape[0], hidden.device
    assert weight.shape[1] == hidden_size
    assert hidden.stride(1) == weight.stride(1) == 1
    assert 1 <= k <= vocab_size
    assert all(x is None or (x.shape == (vocab_size,) and x.is_contiguous()) for x in (bias, scale, token_ids))
    rows_per_sequence = 1 if gain is None else num_rows // len(gain)
    assert all(x is None or (rows_per_sequence * len(x) == num_rows and x.is_contiguous()) for x in noise)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    block_n, block_k, num_warps, num_stages = TILES[weight.element_size()][block_m]
    num_tiles = triton.cdiv(vocab_size, block_n)
    packed = torch.empty(num_rows, num_tiles, k, dtype=torch.int64, device=device)
    partial = torch.empty(num_rows, num_tiles, 2, dtype=torch.float32, device=device)
    scores = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    tokens = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    block_packed = triton.next_power_of_2(num_tiles * k)
    with device_guard(hidden):
        _tile_topk_kernel[(triton.cdiv(num_rows, block_m), num_tiles)](
            packed, partial, hidden, weight, bias, scale, token_ids, *noise,
            num_rows, rows_per_sequence, vocab_size, hidden_size, hidden.stride(0), weight.stride(0),
            K=k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, UPCAST=upcast(hidden.dtype),
            num_warps=num_warps, num_stages=num_stages, **dependent_launch(hidden.device),
        )  # fmt: skip
        _merge_kernel[(num_rows,)](
            scores, tokens, packed, partial, token_ids, num_tiles,
            K=k, BLOCK_TILES=triton.next_power_of_2(num_tiles), BLOCK_PACKED=block_packed,
            num_warps=min(32, max(4, block_packed // 512)), **dependent_launch(hidden.device),
        )  # fmt: skip
    return scores, tokens


def lm_head_topk_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    z = few_rows_matmul(hidden.float(), weight.float())
    if scale is not None:
        z = z * scale.float()
    if bias is not None:
        z = z + bias.float()
    draft_ids = torch.arange(weight.shape[0], device=z.device)
    if gain is not None:
        assert share is not None
        assert positions is not None
        assert seeds is not None
        assert sequences is not None
        z = z.unflatten(0, (len(gain), -1)) * gain[:, None, None]
        # Only a CPU tensor can be asked for its value at no cost.
        if z.device.type != "cpu" or bool((share > 0).any()):
            if token_ids is None:
                noise = gumbel_row_ref(seeds, sequences, positions, weight.shape[0])
            else:
                noise = gumbel_ref(seeds[:, None], sequences[:, None], positions[:, None], token_ids)
            z = z + (share[:, None] * noise)[:, None]
        z = z.flatten(0, 1)
    best, index = unpack_ref(pack_ref(z, draft_ids).topk(k, -1).values)
    scores = best - z.masked_fill(z.isnan(), float("-inf")).logsumexp(-1, keepdim=True)
    return scores.masked_fill(scores.isnan(), float("-inf")), index if token_ids is None else token_ids[index]
