"""The least logit that top-k and top-p keep: a selection without a sort, one program per row.

    top-k   the largest t with  |{v: z_v >= t}| >= top_k
    top-p   the largest t with  sum_{z_v >= t} w_v >= top_p * sum w  over what top-k kept,  w_v = exp((z_v - max) / T)

Division by the temperature keeps the order, so logits z stand for z / temperature. Both searches quarter a range of
order-preserving integer keys in every pass; keys of 16-bit logits count in their own steps, so eight passes settle any
row of them. First a cheap lower bound leaves few candidates, which every lane packs into slots; where a lane runs out
of slots (flat rows), the passes read the row, from L2. A pass takes about 14 instructions a logit, 128,256 of them on
one SM about 10 us; packed rows cost next to nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import BY_ROWS, FLOAT32, HALVES, INT64, described, tensor
from .launch import device_guard, runs_triton
from .order_key import kth_key, order_key, order_value
from .overlap import after_earlier_kernels, dependent_launch
from .sample_ref import GREEDY_TEMPERATURE

LOG2E = tl.constexpr(1.4426950408889634)

# Logits of a step, warps, and candidates that a lane may keep: candidates (2048..8192, 16..32, 2..8) for tuning.
TILE = 4096
NUM_WARPS = 32
LANE_SLOTS = 4
# Bits of a float32 that logits of a dtype leave zero.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _load_logits(row, step, TILE: tl.constexpr):
    """One step over a row (pointer, V), -inf past its end."""
    tokens = step * TILE + tl.arange(0, TILE)
    return tl.load(row[0] + tokens, mask=tokens < row[1], other=float("-inf")).to(tl.float32)


@triton.jit
def _kth_lane(row, top_k, TILE: tl.constexpr):
    """A lower bound of the top_k-th largest logit: the top_k-th largest of the lanes' maxima, if there are so many."""
    best = tl.full([TILE], float("-inf"), tl.float32)
    if top_k <= TILE:
        for step in range(0, tl.cdiv(row[1], TILE)):
            best = tl.maximum(best, _load_logits(row, step, TILE))
    return order_value(kth_key(order_key(best), top_k))


@triton.jit
def _collect(row, slots_ptr, bound, TILE: tl.constexpr, LANE_SLOTS: tl.constexpr):
    """Every lane packs its logits >= bound into its slots.

    Candidates are (slots, their number in each lane, whether all have a slot, steps over them); where a lane ran out of
    slots, they are the whole row.
    """
    lanes = tl.arange(0, TILE)
    num_kept = tl.zeros([TILE], tl.int32)
    num_steps = tl.cdiv(row[1], TILE)
    for step in range(0, num_steps):
        logits = _load_logits(row, step, TILE)
        keep = logits >= bound
        tl.store(slots_ptr + num_kept * TILE + lanes, logits, mask=keep & (num_kept < LANE_SLOTS))
        num_kept += keep.to(tl.int32)
    tl.debug_barrier()
    most = tl.max(num_kept, 0)
    fits = most <= LANE_SLOTS
    return slots_ptr, num_kept, fits, tl.where(fits, most, num_steps)


@triton.jit
def _add(sums, logits, least, peak, factor, BY_MASS: tl.constexpr):
    weight = tl.exp2((logits - peak) * factor) if BY_MASS else 1.0
    return (
        sums[0] + tl.where(logits >= least[0], weight, 0.0),
        sums[1] + tl.where(logits >= least[1], weight, 0.0),
        sums[2] + tl.where(logits >= least[2], weight, 0.0),
    )


@triton.jit
def _weigh(row, candidates, least, peak, factor, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """Numbers, or masses relative to the peak's, of the candidates >= each of three values."""
    slots_ptr, num_kept, fits, num_steps = candidates
    zeros = tl.zeros([TILE], tl.float32)
    sums = (zeros, zeros, zeros)
    if fits:
        for step in range(0, num_steps):
            slots = slots_ptr + step * TILE + tl.arange(0, TILE)
            logits = tl.load(slots, mask=step < num_kept, other=float("-inf"))
            sums = _add(sums, logits, least, peak, factor, BY_MASS)
    else:
        for step in range(0, num_steps):
            sums = _add(sums, _load_logits(row, step, TILE), least, peak, factor, BY_MASS)
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0)


@triton.jit
def _native_key(x, UNUSED: tl.constexpr):
    return (order_key(x) >> UNUSED).to(tl.int64)


@triton.jit
def _native_value(key, UNUSED: tl.constexpr):
    ones = tl.where(key < 0, (1 << UNUSED) - 1, 0)
    return order_value(((key << UNUSED) | ones).to(tl.int32))


@triton.jit
def _search(
    row, candidates, bound, target, peak, factor, BY_MASS: tl.constexpr, TILE: tl.constexpr, UNUSED: tl.constexpr
):
    """The largest t such that the candidates >= t weigh `target`; `bound` if there is none above it."""
    low, high = _native_key(bound, UNUSED), _native_key(peak, UNUSED)
    while low < high:
        step = (high - low) // 4 + 1
        # Keys past the peak stand for it: what is enough there is enough at the peak.
        keys = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        least = _native_value(keys[0], UNUSED), _native_value(keys[1], UNUSED), _native_value(keys[2], UNUSED)
        first, second, third = _weigh(row, candidates, least, peak, factor, BY_MASS, TILE)
        if third >= target:
            low = keys[2]
        elif second >= target:
            low, high = keys[1], tl.maximum(keys[2] - 1, keys[1])
        elif first >= target:
            low, high = keys[0], tl.maximum(keys[1] - 1, keys[0])
        else:
            high = keys[0] - 1
    return _native_value(low, UNUSED)


@triton.jit
def _threshold_kernel(
    least_ptr, logits_ptr, best_ptr, mass_ptr, temperature_ptr, top_k_ptr, top_p_ptr, slots_ptr,
    num_nodes, vocab_size, num_chunks, stride_logits_b, stride_logits_t,
    GREEDY: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, TILE: tl.constexpr, LANE_SLOTS: tl.constexpr,
    UNUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
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
            bound = _kth_lane(row, top_k, TILE)
        else:
            bound = peak + temperature * (tl.log((1.0 - top_p) / vocab_size) - 1e-3) - 1e-6 * tl.abs(peak)
        slots_ptr += program * (TILE * LANE_SLOTS)
        candidates = _collect(row, slots_ptr, bound, TILE, LANE_SLOTS)
        least = bound
        if use_k:
            least = _search(row, candidates, least, top_k, peak, factor, False, TILE, UNUSED)
        if top_p < 1.0:
            if use_k:
                mass, _, _ = _weigh(row, candidates, (least, least, least), peak, factor, True, TILE)
            else:
                masses = tl.load(mass_ptr + chunk_ptrs, mask=exists, other=0.0)
                mass = tl.sum(masses * tl.exp2((bests - peak) * factor), 0)
            least = _search(row, candidates, least, top_p * mass, peak, factor, True, TILE, UNUSED)
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
    num_sequences, num_nodes, vocab_size = tensor("logits", logits, "B T V", (*HALVES, *FLOAT32), layout=BY_ROWS)
    near = ("logits", logits)
    num_rows, num_chunks = tensor("best", best, "B*T C", FLOAT32, (num_sequences * num_nodes, None), near=near)
    tensor("mass", mass, "B*T C", FLOAT32, best.shape, near=("best", best))
    tensor("temperature", temperature, "B", FLOAT32, (num_sequences,), near=near)
    tensor("top_k", top_k, "B", INT64, (num_sequences,), near=near)
    tensor("top_p", top_p, "B", FLOAT32, (num_sequences,), near=near)
    if not runs_triton(logits.device):
        raise ValueError(f"logits is {described(logits)}; expected a device that runs Triton kernels")
    tile = min(TILE, max(128, triton.next_power_of_2(vocab_size)))
    least = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    slots = torch.empty(num_rows, LANE_SLOTS * tile, dtype=torch.float32, device=logits.device)
    with device_guard(logits):
        _threshold_kernel[(num_sequences * num_nodes,)](
            least, logits, best, mass, temperature, top_k, top_p, slots,
            num_nodes, vocab_size, num_chunks, *logits.stride()[:2],
            GREEDY=GREEDY_TEMPERATURE, BLOCK_CHUNKS=triton.next_power_of_2(num_chunks), TILE=tile,
            LANE_SLOTS=LANE_SLOTS, UNUSED=UNUSED_BITS[logits.dtype], num_warps=min(NUM_WARPS, tile // 128),
            **dependent_launch(logits.device),
        )  # fmt: skip
    return least
