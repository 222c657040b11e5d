"""The draft head's last step in one pass over its weights: logits, log-softmax and top-k.

    z = hidden @ weight.T (* scale) (+ bias)                             hidden [R, H], weight [Vd, H]
    y = gain z + share G(seed, sequence, position, target token)         gain, share [R], G the target's own noise
    scores = the k largest of log_softmax(y), tokens = their target ids

Bytes: the weights, Vd H elements, once for every 64 rows (EAGLE-3's 32000 x 4096 in bf16: 262 MB, 85 us at 3.08 TB/s;
43 us in int8). A program takes one tile of the vocabulary and leaves its logits (4 R Vd bytes, 1.3 MB at R = 10, which
stay in L2), their maximum and their sum of exponentials. One program per row then reads the maxima: the k best logits
lie in the k tiles with the best maxima, and only those tiles' logits are read again. Selecting k in every tile instead
costs each of them k rounds over all warps. Lower draft ids win ties; a NaN counts as -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import device_guard, resources, upcast, use_triton
from .linear import few_rows_matmul, prefetch_rows, prefetches, tile_product
from .noise import gumbel, gumbel_ref, gumbel_row_ref
from .order_key import ABSENT, order_key, order_value, pack_ref, take_best, unpack_ref
from .overlap import after_earlier_kernels, dependent_launch

WARP_KEYS = 1024  # that a warp of the merge holds


class Tile(NamedTuple):
    """How the product is cut: rows of hidden and of the weight, columns a step; warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def logits_tile(num_rows: int, vocab_size: int, weight: torch.Tensor) -> Tile:
    """Few rows: as many stages as let all programs be there at once, or four to a multiprocessor."""
    num_sms, shared_memory = resources(weight.device)
    size = weight.element_size()
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if size == 4:
        return Tile(block_m, 64, 32, 4, 3)
    if block_m == 64:
        return Tile(64, 128, 64, 8, 5) if size == 2 else Tile(64, 128, 128, 8, 4)
    stage = (64 * size + block_m * max(size, 2)) * 128
    programs = min(4, triton.cdiv(triton.cdiv(vocab_size, 64), num_sms))
    num_stages = 1 + (shared_memory // programs - 1024) // stage  # a buffer less than stages
    return Tile(block_m, 64, 128, 4, min(6, max(3, num_stages)))


@triton.jit
def _logits_kernel(
    logits_ptr, peaks_ptr, masses_ptr, hidden_ptr, weight_ptr, bias_ptr, scale_ptr, token_ids_ptr,
    gain_ptr, share_ptr, positions_ptr, seeds_ptr, sequences_ptr,
    num_rows, vocab_size, hidden_size, stride_hidden, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PREFETCH: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [R, Vd] without NaN; peaks and masses [R, tiles]: each tile's maximum and sum of exponentials below it."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < num_rows, columns < vocab_size
    weight_ptrs = weight_ptr + tl.minimum(columns, vocab_size - 1).to(tl.int64)[:, None] * stride_weight
    if PDL:
        gdc_launch_dependents()
        if PREFETCH:
            prefetch_rows(weight_ptrs)
        gdc_wait()
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    z = tile_product(hidden_ptrs, weight_ptrs, row_mask[:, None], hidden_size, BLOCK_K, EVEN, UPCAST)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if gain_ptr is not None:
        z *= tl.load(gain_ptr + rows, mask=row_mask, other=0.0)[:, None]
        share = tl.load(share_ptr + rows, mask=row_mask, other=0.0)
        if tl.max(share, 0) > 0:
            seed = tl.load(seeds_ptr + rows, mask=row_mask, other=0)[:, None]
            sequence = tl.load(sequences_ptr + rows, mask=row_mask, other=0)[:, None]
            position = tl.load(positions_ptr + rows, mask=row_mask, other=0)[:, None]
            tokens = columns.to(tl.int64)
            if token_ids_ptr is not None:
                tokens = tl.load(token_ids_ptr + columns, mask=column_mask, other=0)
            z += share[:, None] * gumbel(seed, sequence, position, tokens[None, :])

    z = tl.where((z == z) & column_mask[None, :], z, float("-inf"))
    logits_ptrs = logits_ptr + rows.to(tl.int64)[:, None] * vocab_size + columns[None, :]
    tl.store(logits_ptrs, z, mask=row_mask[:, None] & column_mask[None, :])
    peak = tl.max(z, 1)
    mass = tl.sum(tl.exp(z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
    slot = rows.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(peaks_ptr + slot, peak, mask=row_mask)
    tl.store(masses_ptr + slot, mass, mask=row_mask)


@triton.jit
def _merge_kernel(
    scores_ptr, tokens_ptr, logits_ptr, peaks_ptr, masses_ptr, token_ids_ptr, num_tiles, vocab_size,
    K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: the K tiles with the best peaks, then the K best logits in them. SLOTS >= K."""
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    tiles, slots = tl.arange(0, BLOCK_TILES), tl.arange(0, SLOTS)
    peaks = tl.load(peaks_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    masses = tl.load(masses_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0.0)
    peak = tl.max(peaks, 0)
    log_sum = peak + tl.log(tl.sum(masses * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)), 0))

    keys = tl.where(tiles < num_tiles, order_key(peaks), ABSENT)
    chosen = tl.full([SLOTS], num_tiles, tl.int32)  # no such tile, for slots that stay empty
    for j in tl.static_range(K):
        best, tile, keys = take_best(keys, tiles)
        chosen = tl.where((slots == j) & (best != ABSENT), tile, chosen)

    columns = chosen[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    z = tl.load(logits_ptr + row * vocab_size + columns, mask=columns < vocab_size, other=0.0)
    keys = tl.where(columns < vocab_size, order_key(z), ABSENT)
    top_keys, top_columns = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    for j in tl.static_range(K):
        best, column, keys = take_best(keys, columns)
        top_keys = tl.where(slots == j, best, top_keys)
        top_columns = tl.where(slots == j, column, top_columns)
    scores = order_value(top_keys) - log_sum
    tl.store(scores_ptr + row * K + slots, tl.where(scores == scores, scores, float("-inf")), mask=slots < K)
    tokens = top_columns.to(tl.int64)
    if token_ids_ptr is not None:
        tokens = tl.load(token_ids_ptr + top_columns, mask=slots < K, other=0)
    tl.store(tokens_ptr + row * K + slots, tokens, mask=slots < K)


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
    gain and share (at least 0) float32, positions, seeds and sequences int64 are [R], given together or not at all:
    without them y = z.
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
    assert all(x is None or (x.shape == (num_rows,) and x.is_contiguous()) for x in noise)
    block_m, block_n, block_k, num_warps, num_stages = logits_tile(num_rows, vocab_size, weight)
    num_tiles, even = triton.cdiv(vocab_size, block_n), hidden_size % block_k == 0
    logits = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device)
    peaks = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    masses = torch.empty_like(peaks)
    scores = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    tokens = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    slots, block_tiles = triton.next_power_of_2(k), triton.next_power_of_2(num_tiles)
    with device_guard(hidden):
        _logits_kernel[(triton.cdiv(num_rows, block_m), num_tiles)](
            logits, peaks, masses, hidden, weight, bias, scale, token_ids, *noise,
            num_rows, vocab_size, hidden_size, hidden.stride(0), weight.stride(0),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=even,
            PREFETCH=even and prefetches(weight, hidden_size), UPCAST=upcast(hidden.dtype),
            num_warps=num_warps, num_stages=num_stages, **dependent_launch(hidden.device),
        )  # fmt: skip
        _merge_kernel[(num_rows,)](
            scores, tokens, logits, peaks, masses, token_ids, num_tiles, vocab_size,
            K=k, SLOTS=slots, BLOCK_N=block_n, BLOCK_TILES=block_tiles,
            num_warps=max(1, max(block_tiles, slots * block_n) // WARP_KEYS), **dependent_launch(hidden.device),
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
        z = z * gain[:, None]
        # Only a CPU tensor can be asked for its value at no cost.
        if z.device.type != "cpu" or bool((share > 0).any()):
            if token_ids is None:
                noise = gumbel_row_ref(seeds, sequences, positions, weight.shape[0])
            else:
                noise = gumbel_ref(seeds[:, None], sequences[:, None], positions[:, None], token_ids)
            z = z + share[:, None] * noise
    best, index = unpack_ref(pack_ref(z, draft_ids).topk(k, -1).values)
    scores = best - z.masked_fill(z.isnan(), float("-inf")).logsumexp(-1, keepdim=True)
    return scores.masked_fill(scores.isnan(), float("-inf")), index if token_ids is None else token_ids[index]
