"""The draft head's last step in one pass over its weights: logits, log-softmax and top-k, without writing the logits.

    z = hidden @ weight.T (* scale) (+ bias)                             hidden [R, H], weight [Vd, H]
    y = gain z + share G(seed, sequence, position, target token)         gain, share [B], G the target's own noise
    scores = the k largest of log_softmax(y), tokens = their target ids

Bytes: the weights, Vd H elements, once for every 64 rows (EAGLE-3's 32000 x 4096 in bf16: 262 MB, 85 us at 3.08 TB/s;
43 us in int8). A program takes one tile of the vocabulary and leaves its k best logits, its maximum and its sum of
exponentials (R tiles (8 k + 8) bytes, 0.4 MB at R = 10, which stay in L2). One program per row then reads the maxima:
the k best logits lie in the k tiles with the best maxima, and only those tiles' lists are read. Lower draft ids win
ties; a NaN counts as -inf.

Of a part of the vocabulary, as one of several ranks has it, there are y itself and the sums that the normaliser of the
whole is merged from (`exchange_best.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .check import BY_ROWS, FLOAT32, FLOATS, HALVES, INT64, INTEGERS, given_together, tensor, whole, written
from .launch import device_guard, resources, upcast, use_triton
from .linear import few_rows_matmul, prefetched
from .linear_kernels import after_fetching_rows, tile_product
from .noise import gumbel, gumbel_ref, gumbel_row_ref
from .order_key import ABSENT, order_key, order_value, pack_ref, take_best, unpack_ref
from .overlap import after_earlier_kernels, dependent_launch

WARP_KEYS = 256  # that a warp of the merge holds
MOST_K, MOST_TILES = 64, 8192  # that a merge of 32 warps takes


class Tile(NamedTuple):
    """How the product is cut: rows of hidden and of the weight, columns per step; warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def topk_tile(num_rows: int, weight: torch.Tensor) -> Tile:
    """Few rows: 256 bytes of a weight row per step, and as many stages as let all programs be there at once, or four to
    a multiprocessor."""
    vocab_size, hidden_size = weight.shape
    num_sms, shared_memory = resources(weight.device)
    size = weight.element_size()
    block_m = min(32 if size == 1 else 64, max(16, triton.next_power_of_2(num_rows)))
    if size == 4:
        return Tile(block_m, 64, 32, 4, 3)
    if block_m == 64:
        return Tile(64, 128, 64, 8, 5)
    block_k = 256 if size == 1 and block_m == 16 and hidden_size % 256 == 0 else 128
    stage = (64 * size + block_m * max(size, 2)) * block_k
    programs = min(4, triton.cdiv(triton.cdiv(vocab_size, 64), num_sms))
    num_stages = 1 + (shared_memory // programs - 1024) // stage  # a buffer less than stages
    return Tile(block_m, 64, block_k, 4, min(6, max(3, num_stages)))


@triton.jit
def _tile_topk_kernel(
    keys_ptr, columns_ptr, peaks_ptr, masses_ptr, hidden_ptr, weight_ptr, bias_ptr, scale_ptr, token_ids_ptr,
    gain_ptr, share_ptr, positions_ptr, seeds_ptr, sequences_ptr,
    num_rows, rows_per_sequence, vocab_size, hidden_size, stride_hidden, stride_weight,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PIECES: tl.constexpr, ONE_SEQUENCE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each tile: keys and columns [R, tiles, K] of the best logits in order; peaks and masses [R, tiles], the
    maximum and the sum of exponentials below it."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < num_rows, columns < vocab_size
    weight_ptrs = weight_ptr + tl.minimum(columns, vocab_size - 1).to(tl.int64)[:, None] * stride_weight
    after_fetching_rows(weight_ptrs, PIECES, PDL)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    z = tile_product(hidden_ptrs, weight_ptrs, row_mask[:, None], hidden_size, BLOCK_K, EVEN, UPCAST)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if gain_ptr is not None:
        # Rows of one sequence have the noise in common.
        b = tl.arange(0, 1) if ONE_SEQUENCE else tl.minimum(rows, num_rows - 1) // rows_per_sequence
        z *= tl.load(gain_ptr + b)[:, None]
        share = tl.load(share_ptr + b)
        if tl.max(share, 0) > 0:
            seed = tl.load(seeds_ptr + b)[:, None]
            sequence = tl.load(sequences_ptr + b)[:, None]
            position = tl.load(positions_ptr + b)[:, None]
            tokens = columns.to(tl.int64)
            if token_ids_ptr is not None:
                tokens = tl.load(token_ids_ptr + columns, mask=column_mask, other=0)
            z += share[:, None] * gumbel(seed, sequence, position, tokens[None, :])

    z = tl.where((z == z) & column_mask[None, :], z, float("-inf"))
    peak = tl.max(z, 1)
    mass = tl.sum(tl.exp(z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
    slot = rows.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(peaks_ptr + slot, peak, mask=row_mask)
    tl.store(masses_ptr + slot, mass, mask=row_mask)
    keys = tl.where(column_mask[None, :], order_key(z), ABSENT)
    for j in tl.static_range(K):
        best, column, keys = take_best(keys, columns[None, :], 1)
        place = slot[:, None] * K + j
        tl.store(keys_ptr + place, best, mask=row_mask[:, None])
        tl.store(columns_ptr + place, column, mask=row_mask[:, None])


@triton.jit
def _merge_kernel(
    scores_ptr, tokens_ptr, sums_ptr, keys_ptr, columns_ptr, peaks_ptr, masses_ptr, token_ids_ptr, num_tiles,
    K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: the K tiles with the best peaks, then the K best of their lists. SLOTS >= K. With sums, of a part."""
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    tiles, slots = tl.arange(0, BLOCK_TILES), tl.arange(0, SLOTS)
    peaks = tl.load(peaks_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    masses = tl.load(masses_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0.0)
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)), 0)

    keys = tl.where(tiles < num_tiles, order_key(peaks), ABSENT)
    chosen = tl.full([SLOTS], num_tiles, tl.int32)  # no such tile, for slots that stay empty
    for j in tl.static_range(K):
        best, tile, keys = take_best(keys, tiles, 0)
        chosen = tl.where((slots == j) & (best != ABSENT), tile, chosen)

    places = (row * num_tiles + chosen[:, None]) * K + slots[None, :]
    listed = (chosen[:, None] < num_tiles) & (slots[None, :] < K)
    keys = tl.reshape(tl.load(keys_ptr + places, mask=listed, other=ABSENT), SLOTS * SLOTS)
    columns = tl.reshape(tl.load(columns_ptr + places, mask=listed, other=0), SLOTS * SLOTS)
    top_keys, top_columns = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    for j in tl.static_range(K):
        best, column, keys = take_best(keys, columns, 0)
        top_keys = tl.where(slots == j, best, top_keys)
        top_columns = tl.where(slots == j, column, top_columns)
    scores = order_value(top_keys)
    if sums_ptr is not None:
        tl.store(sums_ptr + row * 2, peak)
        tl.store(sums_ptr + row * 2 + 1, mass)
    else:
        scores -= peak + tl.log(mass)
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
    sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [R, k] float32 log-probabilities in descending order, tokens [R, k] int64 target ids).

    bias and scale (of a quantized weight's rows) are [Vd]; token_ids [Vd] maps draft to target ids (None: the same).
    gain and share (at least 0) float32, positions, seeds and sequences int64 are [B], each for R / B rows in turn, and
    given together or not at all: without them y = z. sums [R, 2] float32 where the weight is a part of the vocabulary:
    the largest y and the sum of exp(y - that) are written to it, and scores are y.
    """
    num_rows, hidden_size = tensor("hidden", hidden, "R H", FLOATS, layout=BY_ROWS)
    near = ("hidden", hidden)
    of_weight = (hidden.dtype, *(HALVES if hidden.dtype is torch.float32 else ()), torch.int8)
    vocab_size = tensor("weight", weight, "Vd H", of_weight, (None, hidden_size), near=near, layout=BY_ROWS)[0]
    k = whole("k", k, 1, min(vocab_size, MOST_K), ", of the rows of weight")
    for name, x, dtypes in (("bias", bias, FLOATS), ("scale", scale, FLOATS), ("token_ids", token_ids, INTEGERS)):
        if x is not None:
            tensor(name, x, "Vd", dtypes, (vocab_size,), near=("weight", weight))
    noise = (gain, share, positions, seeds, sequences)
    num_sequences = num_rows
    if given_together(gain=gain, share=share, positions=positions, seeds=seeds, sequences=sequences):
        assert gain is not None
        num_sequences = tensor("gain", gain, "B", FLOAT32, near=near)[0]
        tensor("share", share, "B", FLOAT32, (num_sequences,), near=("gain", gain))
        for name, x in (("positions", positions), ("seeds", seeds), ("sequences", sequences)):
            tensor(name, x, "B", INT64, (num_sequences,), near=("gain", gain))
    if num_rows % num_sequences:
        raise ValueError(f"gain has B = {num_sequences}, hidden R = {num_rows}; expected R to be a multiple of B")
    if vocab_size > MOST_TILES * 64:
        raise ValueError(f"weight has Vd = {vocab_size} rows; expected at most {MOST_TILES * 64}")
    if sums is not None:
        tensor("sums", sums, "R 2", FLOAT32, (num_rows, 2), near=near)
        written([("sums", sums)], [near, ("weight", weight), ("bias", bias), ("scale", scale), ("gain", gain)])
    if not use_triton(hidden, weight, bias, scale):
        return lm_head_topk_ref(
            hidden, weight, k, bias=bias, scale=scale, token_ids=token_ids,
            gain=gain, share=share, positions=positions, seeds=seeds, sequences=sequences, sums=sums,
        )  # fmt: skip
    device, rows_per_sequence = hidden.device, num_rows // num_sequences
    block_m, block_n, block_k, num_warps, num_stages = topk_tile(num_rows, weight)
    num_tiles, even = triton.cdiv(vocab_size, block_n), hidden_size % block_k == 0
    keys, columns = torch.empty(2, num_rows, num_tiles, k, dtype=torch.int32, device=device)
    peaks, masses = torch.empty(2, num_rows, num_tiles, dtype=torch.float32, device=device)
    scores = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    tokens = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    slots, block_tiles = triton.next_power_of_2(k), triton.next_power_of_2(num_tiles)
    with device_guard(hidden):
        _tile_topk_kernel[(triton.cdiv(num_rows, block_m), num_tiles)](
            keys, columns, peaks, masses, hidden, weight, bias, scale, token_ids, *noise,
            num_rows, rows_per_sequence, vocab_size, hidden_size, hidden.stride(0), weight.stride(0),
            K=k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=even,
            PIECES=prefetched(weight, hidden_size) if even else 0, ONE_SEQUENCE=rows_per_sequence == num_rows,
            UPCAST=upcast(hidden.dtype),
            num_warps=num_warps, num_stages=num_stages, **dependent_launch(hidden.device),
        )  # fmt: skip
        _merge_kernel[(num_rows,)](
            scores, tokens, sums, keys, columns, peaks, masses, token_ids, num_tiles,
            K=k, SLOTS=slots, BLOCK_TILES=block_tiles, num_warps=max(1, max(block_tiles, slots**2) // WARP_KEYS),
            **dependent_launch(hidden.device),
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
    sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    z = few_rows_matmul(hidden.float(), weight.float())
    if scale is not None:
        z = z * scale.float()
    if bias is not None:
        z = z + bias.float()
    draft_ids = torch.arange(weight.shape[0], device=z.device)
    token_ids = None if token_ids is None else token_ids.long()
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
    scores, index = unpack_ref(pack_ref(z, draft_ids).topk(k, -1).values)
    z = z.masked_fill(z.isnan(), float("-inf"))
    if sums is None:
        scores = scores - z.logsumexp(-1, keepdim=True)
    else:
        sums[:, 0] = z.amax(-1)
        sums[:, 1] = (z - sums[:, :1].masked_fill(sums[:, :1].isinf(), 0.0)).exp().sum(-1)
    return scores.masked_fill(scores.isnan(), float("-inf")), index if token_ids is None else token_ids[index]
