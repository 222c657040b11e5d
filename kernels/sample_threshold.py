"""The least logit that top-k and top-p keep: a selection without a sort, one program a row.

    top-k   the largest t with  |{v: z_v >= t}| >= top_k
    top-p   the largest t with  sum_{z_v >= t} w_v >= top_p * sum w  over what top-k kept,  w_v = exp((z_v - max) / T)

Division by the temperature keeps the order, so logits z stand for z / temperature. Both searches cut a range of
order-preserving integer keys into WAYS parts a pass; keys of 16-bit logits count in their own steps, so four passes
settle any row. First a cheap lower bound leaves few candidates, which every lane packs into slots; where a lane runs
out of them (flat rows), the passes read the row, from L2. A pass costs WAYS compares and additions an element, 128,256
logits on one SM about 30 us; packed rows cost next to nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .order_key import kth_key, order_key, order_value
from .sample_ref import GREEDY_TEMPERATURE

LOG2E = tl.constexpr(1.4426950408889634)

# Logits of a step as LANES x PER_LANE, warps, parts of a range, candidates that a lane's place may keep.
TILE = 8192
PER_LANE = 8
NUM_WARPS = 32
WAYS = 8
LANE_SLOTS = 4
# Bits of a float32 that logits of a dtype leave zero.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _tile_tokens(LANES: tl.constexpr, PER_LANE: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]


@triton.jit
def _load_logits(row, step, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    """One step over a row (pointer, V): [LANES, PER_LANE], -inf past its end."""
    tokens = step * (LANES * PER_LANE) + _tile_tokens(LANES, PER_LANE)
    return tl.load(row[0] + tokens, mask=tokens < row[1], other=float("-inf")).to(tl.float32)


@triton.jit
def _kth_lane(row, top_k, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    """A lower bound of the top_k-th largest logit: the top_k-th largest of the lanes' maxima, if there are so many."""
    best = tl.full([LANES], float("-inf"), tl.float32)
    if top_k <= LANES:
        for step in range(0, tl.cdiv(row[1], LANES * PER_LANE)):
            best = tl.maximum(best, tl.max(_load_logits(row, step, LANES, PER_LANE), 1))
    return order_value(kth_key(order_key(best), top_k))


@triton.jit
def _collect(row, slots_ptr, bound, LANES: tl.constexpr, PER_LANE: tl.constexpr, LANE_SLOTS: tl.constexpr):
    """Every place of a tile packs its logits >= bound into its slots.

    Candidates are (slots, their number at each place, whether all have a slot, steps over them); where a place ran out
    of slots, they are the whole row.
    """
    places = _tile_tokens(LANES, PER_LANE)
    num_kept = tl.zeros([LANES, PER_LANE], tl.int32)
    num_steps = tl.cdiv(row[1], LANES * PER_LANE)
    for step in range(0, num_steps):
        logits = _load_logits(row, step, LANES, PER_LANE)
        keep = logits >= bound
        slot = slots_ptr + num_kept * (LANES * PER_LANE) + places
        tl.store(slot, logits, mask=keep & (num_kept < LANE_SLOTS))
        num_kept += keep.to(tl.int32)
    tl.debug_barrier()
    most = tl.max(tl.max(num_kept, 1), 0)
    fits = most <= LANE_SLOTS
    return slots_ptr, num_kept, fits, tl.where(fits, most, num_steps)


@triton.jit
def _weigh(
    row, candidates, least, peak, factor, BY_MASS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """[WAYS] number, or mass relative to the peak's, of the candidates >= each of `least` [WAYS]."""
    slots_ptr, num_kept, fits, num_steps = candidates
    totals = tl.zeros([WAYS, LANES], tl.float32)
    for step in range(0, num_steps):
        if fits:
            slot = slots_ptr + step * (LANES * PER_LANE) + _tile_tokens(LANES, PER_LANE)
            logits = tl.load(slot, mask=step < num_kept, other=float("-inf"))
        else:
            logits = _load_logits(row, step, LANES, PER_LANE)
        weight = tl.exp2((logits - peak) * factor) if BY_MASS else tl.full([LANES, PER_LANE], 1.0, tl.float32)
        totals += tl.sum(tl.where(logits[None] >= least[:, None, None], weight[None], 0.0), 2)
    return tl.sum(totals, 1)


@triton.jit
def _native_key(x, UNUSED: tl.constexpr):
    return (order_key(x) >> UNUSED).to(tl.int64)


@triton.jit
def _native_value(key, UNUSED: tl.constexpr):
    ones = tl.where(key < 0, (1 << UNUSED) - 1, 0)
    return order_value(((key << UNUSED) | ones).to(tl.int32))


@triton.jit
def _search(
    row, candidates, bound, target, peak, factor, BY_MASS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr,
    WAYS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    """The largest t such that the candidates >= t weigh `target`; `bound` if there is none above it."""
    low, high = _native_key(bound, UNUSED), _native_key(peak, UNUSED)
    while low < high:
        step = (high - low) // WAYS + 1
        keys = low + (tl.arange(0, WAYS) + 1) * step
        least = _native_value(tl.minimum(keys, high), UNUSED)
        weights = _weigh(row, candidates, least, peak, factor, BY_MASS, LANES, PER_LANE, WAYS)
        low += step * tl.sum(((weights >= target) & (keys <= high)).to(tl.int64), 0)
        high = tl.minimum(high, low + step - 1)
    return _native_value(low, UNUSED)


@triton.jit
def _threshold_kernel(
    least_ptr, logits_ptr, best_ptr, mass_ptr, temperature_ptr, top_k_ptr, top_p_ptr, slots_ptr,
    num_nodes, vocab_size, num_chunks, stride_logits_b, stride_logits_t,
    GREEDY: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr, WAYS: tl.constexpr,
    LANE_SLOTS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // num_nodes
    temperature = tl.load(temperature_ptr + b)
    if temperature <= GREEDY:
        return
    tl.store(least_ptr + program, float("-inf"))
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
    use_k = (top_k > 0) & (top_k < vocab_size)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    chunk_ptrs, exists = program * num_chunks + chunks, chunks < num_chunks
    bests = tl.load(best_ptr + chunk_ptrs, mask=exists, other=float("-inf"))
    peak = tl.max(bests, 0)
    valid = (peak > float("-inf")) & (peak < float("inf")) & (tl.max((bests != bests).to(tl.int32), 0) == 0)
    if (use_k | (top_p < 1.0)) & valid:
        row = (logits_ptr + b * stride_logits_b + program % num_nodes * stride_logits_t, vocab_size)
        factor = LOG2E / temperature
        # What is below the bound cannot be kept: top_k lane maxima are not below it, or what is weighs less than
        # 1 - top_p all together.
        if use_k:
            bound = _kth_lane(row, top_k, LANES, PER_LANE)
        else:
            bound = peak + temperature * (tl.log((1.0 - top_p) / vocab_size) - 1e-3) - 1e-6 * tl.abs(peak)
        slots_ptr += program * (LANES * PER_LANE * LANE_SLOTS)
        candidates = _collect(row, slots_ptr, bound, LANES, PER_LANE, LANE_SLOTS)
        least = bound
        if use_k:
            least = _search(row, candidates, least, top_k, peak, factor, False, LANES, PER_LANE, WAYS, UNUSED)
        if top_p < 1.0:
            if use_k:
                every = tl.zeros([WAYS], tl.float32) + least
                mass = tl.max(_weigh(row, candidates, every, peak, factor, True, LANES, PER_LANE, WAYS), 0)
            else:
                masses = tl.load(mass_ptr + chunk_ptrs, mask=exists, other=0.0)
                mass = tl.sum(masses * tl.exp2((bests - peak) * factor), 0)
            least = _search(row, candidates, least, top_p * mass, peak, factor, True, LANES, PER_LANE, WAYS, UNUSED)
        tl.store(least_ptr + program, least)


def threshold(
    logits: torch.Tensor,
    best: torch.Tensor,
    mass: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """The least logit [B * T] float32 that top-k and top-p keep of each row of logits [B, T, V]; greedy rows get none.

    best, mass [B * T, C] of the row's chunks: the largest logit (NaN if there is one), and the sum of
    exp((logit - best) / temperature). Settings [B] as those of `sample`.
    """
    num_sequences, num_nodes, vocab_size = logits.shape
    num_rows, num_chunks = best.shape
    tile = min(TILE, max(128, triton.next_power_of_2(vocab_size)))
    least = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    slots = torch.empty(num_rows, LANE_SLOTS * tile, dtype=torch.float32, device=logits.device)
    _threshold_kernel[(num_sequences * num_nodes,)](
        least, logits, best, mass, temperature, top_k, top_p, slots,
        num_nodes, vocab_size, num_chunks, *logits.stride()[:2],
        GREEDY=GREEDY_TEMPERATURE, BLOCK_CHUNKS=triton.next_power_of_2(num_chunks), LANES=tile // PER_LANE,
        PER_LANE=PER_LANE, WAYS=WAYS, LANE_SLOTS=LANE_SLOTS, UNUSED=UNUSED_BITS[logits.dtype],
        num_warps=min(NUM_WARPS, max(1, tile // 256)),
    )  # fmt: skip
    return least
