"""The next token of every tree node, as a deterministic function: warp the logits, add the noise, take the argmax.

    temperature 0   argmax_v logits_v
    otherwise       x = logits / temperature;  K = what top-k, then top-p, then min-p keep;  argmax_{v in K} x_v + G_v

logits [B, T, V], every setting [B] on the device, so that one captured graph serves all settings; G from noise.py.
Lower token ids win ties. A row that holds a NaN, or whose maximum is not finite, gives -1.

The warpers keep what transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper keep, in that order, except
that top-p keeps every token that ties with the last one kept (transformers breaks such ties by sort order).

Bytes: the logits, once for greedy rows (T = 60, V = 128256, bf16: 15 MB, 5 us at 3.08 TB/s); a second time, from L2,
for the noise. One program owns a row, so its sums have one order whatever B and T are. No sort: a warper's threshold is
the largest t for which the values >= t number top_k, or weigh top_p, found by bisection on order-preserving integer
keys over the few values that a cheap lower bound leaves. Left out: spreading a row over several SMs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import device_guard, use_triton
from .noise import gumbel, gumbel_row_ref, gumbel_tile
from .order_key import KEY_MINUS_INF, kth_key, order_key, order_value

# Temperatures up to this are greedy: the quotient would overflow before it could matter.
GREEDY_TEMPERATURE = 1e-5

# Logits of a step, warps, and candidates that a lane may keep before the row is scanned whole: candidates (2048..8192,
# 8..32, 2..8) for tuning.
TILE = 4096
NUM_WARPS = 16
LANE_SLOTS = 4


@triton.jit
def _load_x(row, tokens):
    """Logits over temperature of a row (pointer, V, temperature), -inf past its end; division as PyTorch rounds it."""
    row_ptr, vocab_size, temperature = row
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logits, temperature)


@triton.jit
def _update(lane_best, lane_token, values, tokens):
    """The running maximum of each lane and its token, the first of equals."""
    better = values > lane_best
    return tl.where(better, values, lane_best), tl.where(better, tokens, lane_token)


@triton.jit
def _first_best(lane_best, lane_token):
    """(maximum, the lowest of the tokens that have it)."""
    best = tl.max(lane_best, 0)
    return best, tl.min(tl.where(lane_best == best, lane_token, 2147483647), 0)


@triton.jit
def _draw(row, seed, sequence, position, TILE: tl.constexpr):
    """argmax of x + G over the whole row."""
    lanes = tl.arange(0, TILE)
    lane_best = tl.full([TILE], float("-inf"), tl.float32)
    lane_token = lanes
    for first in range(0, row[1], TILE):
        y = _load_x(row, first + lanes) + gumbel_tile(seed, sequence, position, first, TILE)
        lane_best, lane_token = _update(lane_best, lane_token, y, first + lanes)
    _, token = _first_best(lane_best, lane_token)
    return token


@triton.jit
def _collect(row, slots_ptr, bound, peak, TILE: tl.constexpr, LANE_SLOTS: tl.constexpr):
    """Every lane packs its values with keys >= bound into its slots: (the candidates, the mass of the whole row).

    Candidates are (slots, their number in each lane, whether all have a slot, steps over them); where a lane ran out
    of slots, they are the whole row.
    """
    vocab_size = row[1]
    lanes = tl.arange(0, TILE)
    num_kept = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    for first in range(0, vocab_size, TILE):
        tokens = first + lanes
        x = _load_x(row, tokens)
        key = order_key(x)
        keep = (key >= bound) & (tokens < vocab_size)
        packed = (key.to(tl.int64) << 32) | tokens
        tl.store(slots_ptr + num_kept * TILE + lanes, packed, mask=keep & (num_kept < LANE_SLOTS))
        num_kept += keep.to(tl.int32)
        mass += tl.exp(x - peak)
    tl.debug_barrier()
    most = tl.max(num_kept, 0)
    fits = most <= LANE_SLOTS
    return (slots_ptr, num_kept, fits, tl.where(fits, most, tl.cdiv(vocab_size, TILE))), tl.sum(mass, 0)


@triton.jit
def _candidates(row, candidates, step, TILE: tl.constexpr):
    """(keys, tokens, which of them exist) of one step over the candidates."""
    slots_ptr, num_kept, fits, _ = candidates
    lanes = tl.arange(0, TILE)
    if fits:
        exists = step < num_kept
        packed = tl.load(slots_ptr + step * TILE + lanes, mask=exists, other=0)
        key = (packed >> 32).to(tl.int32)
        tokens = (packed & 0x7FFFFFFF).to(tl.int32)
    else:
        tokens = step * TILE + lanes
        exists = tokens < row[1]
        key = order_key(_load_x(row, tokens))
    return key, tokens, exists


@triton.jit
def _weight(row, candidates, least, peak, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """Number, or mass relative to the peak's, of the candidates with keys >= least."""
    total = tl.zeros([TILE], tl.float32)
    for step in range(0, candidates[3]):
        key, _, exists = _candidates(row, candidates, step, TILE)
        weight = tl.exp(order_value(key) - peak) if BY_MASS else 1.0
        total += tl.where(exists & (key >= least), weight, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _least_key(row, candidates, low, target, peak, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest t such that the candidates with keys >= t weigh `target`; `low` if there is none above it."""
    low = low.to(tl.int64)
    high = order_key(peak).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = _weight(row, candidates, middle.to(tl.int32), peak, BY_MASS, TILE) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _draw_warped(
    row, slots_ptr, lane_best, peak, top_k, top_p, min_p, seed, sequence, position,
    TILE: tl.constexpr, LANE_SLOTS: tl.constexpr,
):  # fmt: skip
    """argmax of x + G over what the warpers keep; lane_best and peak are values of x."""
    use_k = (top_k > 0) & (top_k < row[1])
    # What is below the bound cannot be kept: top_k lane maxima are not below it, or what is weighs less than 1 - top_p
    # all together, or has less than min_p of the peak's probability.
    bound = tl.full([], KEY_MINUS_INF, tl.int32)
    if use_k:
        if top_k <= TILE:
            bound = kth_key(order_key(lane_best), top_k)
    else:
        share = tl.where(top_p < 1.0, (1.0 - top_p) / row[1], min_p)
        bound = order_key(peak + tl.log(share) - 1e-3)
    candidates, mass = _collect(row, slots_ptr, bound, peak, TILE, LANE_SLOTS)
    least = bound
    if use_k:
        least = _least_key(row, candidates, least, top_k, peak, False, TILE)
    if top_p < 1.0:
        if use_k:
            mass = _weight(row, candidates, least, peak, True, TILE)
        least = _least_key(row, candidates, least, top_p * mass, peak, True, TILE)

    lane_best = tl.full([TILE], float("-inf"), tl.float32)
    lane_token = tl.zeros([TILE], tl.int32)
    for step in range(0, candidates[3]):
        key, tokens, exists = _candidates(row, candidates, step, TILE)
        x = order_value(key)
        keep = exists & (key >= least) & (tl.exp(x - peak) >= min_p)
        y = tl.where(keep, x + gumbel(seed, sequence, position, tokens), float("-inf"))
        lane_best, lane_token = _update(lane_best, lane_token, y, tokens)
    _, token = _first_best(lane_best, lane_token)
    return token


@triton.jit
def _sample_kernel(
    out_ptr, logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, sequences_ptr,
    slots_ptr, num_nodes, vocab_size, stride_logits_b, stride_logits_t, stride_positions_b, stride_positions_t,
    GREEDY_TEMPERATURE: tl.constexpr, TILE: tl.constexpr, LANE_SLOTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // num_nodes
    node = program % num_nodes
    row_ptr = logits_ptr + b * stride_logits_b + node * stride_logits_t
    lanes = tl.arange(0, TILE)
    lane_best = tl.full([TILE], float("-inf"), tl.float32)
    lane_token = lanes
    lane_nan = tl.zeros([TILE], tl.int32)
    for first in range(0, vocab_size, TILE):
        tokens = first + lanes
        logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        lane_best, lane_token = _update(lane_best, lane_token, logits, tokens)
        lane_nan |= (logits != logits).to(tl.int32)
    peak, token = _first_best(lane_best, lane_token)
    valid = (tl.max(lane_nan, 0) == 0) & (peak > float("-inf")) & (peak < float("inf"))

    temperature = tl.load(temperature_ptr + b)
    if valid & (temperature > GREEDY_TEMPERATURE):
        row = (row_ptr, vocab_size, temperature)
        position = tl.load(positions_ptr + b * stride_positions_b + node * stride_positions_t)
        seed = tl.load(seeds_ptr + b)
        sequence = tl.load(sequences_ptr + b)
        top_k = tl.load(top_k_ptr + b)
        top_p = tl.load(top_p_ptr + b)
        min_p = tl.load(min_p_ptr + b)
        if ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0):
            lane_best = tl.div_rn(lane_best, temperature)
            peak = tl.div_rn(peak, temperature)
            slots_ptr += program * (TILE * LANE_SLOTS)
            token = _draw_warped(
                row, slots_ptr, lane_best, peak, top_k, top_p, min_p, seed, sequence, position, TILE, LANE_SLOTS
            )
        else:
            token = _draw(row, seed, sequence, position, TILE)
    tl.store(out_ptr + program, tl.where(valid, token, -1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
) -> torch.Tensor:
    """Tokens [B, T] int64 of logits [B, T, V] at absolute positions [B, T].

    temperature (0: greedy), top_p (1: off) and min_p (0: off) are float32 [B]; top_k (0: off), seeds and sequences are
    int64 [B]. The logits' last dimension is contiguous.
    """
    settings = (temperature, top_k, top_p, min_p, seeds, sequences)
    if not use_triton(logits):
        return sample_ref(logits, positions, *settings)
    num_sequences, num_nodes, vocab_size = logits.shape
    assert positions.shape == (num_sequences, num_nodes)
    assert logits.stride(2) == 1
    assert all(setting.shape == (num_sequences,) and setting.is_contiguous() for setting in settings)
    num_rows, tile = num_sequences * num_nodes, min(TILE, max(128, triton.next_power_of_2(vocab_size)))
    tokens = torch.empty(num_sequences, num_nodes, dtype=torch.int64, device=logits.device)
    slots = torch.empty(num_rows, LANE_SLOTS * tile, dtype=torch.int64, device=logits.device)
    with device_guard(logits):
        _sample_kernel[(num_rows,)](
            tokens, logits, positions, *settings, slots,
            num_nodes, vocab_size, *logits.stride()[:2], *positions.stride(),
            GREEDY_TEMPERATURE=GREEDY_TEMPERATURE, TILE=tile, LANE_SLOTS=LANE_SLOTS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return tokens


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
