"""The next token of every tree node, as a deterministic function: warp the logits, add the noise, take the argmax.

    temperature 0   argmax_v logits_v
    otherwise       x = logits / temperature;  K = what top-k, then top-p, then min-p keep;  argmax_{v in K} x_v + G_v

logits [B, T, V], every setting [B] on the device, so that one captured graph serves all settings; G from noise.py.
Lower token ids win ties. A row that holds a NaN, or whose maximum is not finite, gives -1.

The warpers keep what transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper keep, in that order, except
that top-p keeps every token that ties with the last one kept (transformers breaks such ties by sort order).

    survey      the best logit of every chunk of CHUNK tokens, and its mass       a program a chunk
    threshold   the least logit that top-k and top-p keep (sample_threshold.py)   a program per row
    draw        the best kept x + G of every chunk                                a program a chunk
    pick        the best of a row's chunks                                        a program per row

Bytes: the logits, once for greedy rows (T = 60, V = 128256, bf16: 15 MB, 5 us at 3.08 TB/s), from L2 for the rest.
Chunks are fixed by V alone, so every sum has one order whatever B and T are. Greedy rows leave `threshold` and `draw`
at once; a chunk without a token above the threshold draws nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import ANY, BY_ROWS, FLOAT32, FLOATS, INT64, MOST_BLOCKS, tensor
from .launch import device_guard, use_triton
from .noise import gumbel_tile
from .overlap import after_earlier_kernels, dependent_launch
from .sample_ref import GREEDY_TEMPERATURE, sample_ref
from .sample_threshold import LOG2E, threshold

# Tokens of a chunk, and warps of a program. Candidates for tuning: 2048 .. 16384, 4 .. 16.
CHUNK = 8192
NUM_WARPS = 8


@triton.jit
def _first_best(values, tokens):
    """(maximum, the lowest of the tokens that have it)."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, tokens, 2147483647), 0)


@triton.jit
def _survey_kernel(
    best_ptr, token_ptr, mass_ptr, logits_ptr, temperature_ptr, num_nodes, vocab_size, stride_logits_b, stride_logits_t,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Best logit (NaN if there is one), its token, and the sum of exp((logit - best) / temperature) of one chunk."""
    after_earlier_kernels(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = row // num_nodes
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    ptrs = logits_ptr + b * stride_logits_b + row % num_nodes * stride_logits_t + tokens
    logits = tl.load(ptrs, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    best, token = _first_best(logits, tokens)
    if tl.max((logits != logits).to(tl.int32), 0) > 0:
        best = float("nan")
    out = row * tl.num_programs(0) + chunk
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, token)
    temperature = tl.load(temperature_ptr + b)
    if temperature > GREEDY:
        mass = tl.sum(tl.exp2((logits - best) * (LOG2E / temperature)), 0)
        tl.store(mass_ptr + out, tl.where(best == float("-inf"), 0.0, mass))


@triton.jit
def _draw_kernel(
    best_ptr, token_ptr, chunk_best_ptr, least_ptr, logits_ptr, positions_ptr, temperature_ptr, min_p_ptr, seeds_ptr,
    sequences_ptr, num_nodes, vocab_size, stride_logits_b, stride_logits_t, stride_positions_b, stride_positions_t,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best x + G of what is kept of one chunk, -inf where nothing is, and its token."""
    after_earlier_kernels(PDL)
    chunk, row, num_chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    b, node = row // num_nodes, row % num_nodes
    temperature = tl.load(temperature_ptr + b)
    if temperature <= GREEDY:
        return
    least = tl.load(least_ptr + row)
    out = row * num_chunks + chunk
    if tl.load(chunk_best_ptr + out) < least:
        tl.store(best_ptr + out, float("-inf"))
        tl.store(token_ptr + out, 0)
        return
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    ptrs = logits_ptr + b * stride_logits_b + node * stride_logits_t + tokens
    logits = tl.load(ptrs, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(logits, temperature)
    keep = logits >= least
    min_p = tl.load(min_p_ptr + b)
    if min_p > 0.0:
        chunks = tl.arange(0, BLOCK_CHUNKS)
        bests = tl.load(chunk_best_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
        keep = keep & (tl.exp(x - tl.div_rn(tl.max(bests, 0), temperature)) >= min_p)
    position = tl.load(positions_ptr + b * stride_positions_b + node * stride_positions_t)
    noise = gumbel_tile(tl.load(seeds_ptr + b), tl.load(sequences_ptr + b), position, chunk * CHUNK, CHUNK)
    best, token = _first_best(tl.where(keep, x + noise, float("-inf")), tokens)
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, token)


@triton.jit
def _pick_kernel(
    out_ptr, chunk_best_ptr, chunk_token_ptr, drawn_best_ptr, drawn_token_ptr, temperature_ptr, num_nodes, num_chunks,
    GREEDY: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunks = row * num_chunks + tl.arange(0, BLOCK_CHUNKS)
    exists = tl.arange(0, BLOCK_CHUNKS) < num_chunks
    bests = tl.load(chunk_best_ptr + chunks, mask=exists, other=float("-inf"))
    peak, token = _first_best(bests, tl.load(chunk_token_ptr + chunks, mask=exists, other=0))
    has_nan = tl.max((bests != bests).to(tl.int32), 0) > 0
    if tl.load(temperature_ptr + row // num_nodes) > GREEDY:
        bests = tl.load(drawn_best_ptr + chunks, mask=exists, other=float("-inf"))
        _, token = _first_best(bests, tl.load(drawn_token_ptr + chunks, mask=exists, other=0))
    valid = (peak > float("-inf")) & (peak < float("inf")) & (has_nan == 0)
    tl.store(out_ptr + row, tl.where(valid, token, -1).to(tl.int64))


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
    num_sequences, num_nodes, vocab_size = tensor("logits", logits, "B T V", FLOATS, layout=BY_ROWS)
    near = ("logits", logits)
    tensor("positions", positions, "B T", INT64, (num_sequences, num_nodes), near=near, layout=ANY)
    for name, x in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        tensor(name, x, "B", FLOAT32, (num_sequences,), near=near)
    for name, x in (("top_k", top_k), ("seeds", seeds), ("sequences", sequences)):
        tensor(name, x, "B", INT64, (num_sequences,), near=near)
    if num_sequences * num_nodes > MOST_BLOCKS:
        raise ValueError(f"logits has B T = {num_sequences * num_nodes} rows; expected at most {MOST_BLOCKS}")
    if not use_triton(logits):
        return sample_ref(logits, positions, temperature, top_k, top_p, min_p, seeds, sequences)
    chunk = min(CHUNK, max(128, triton.next_power_of_2(vocab_size)))
    num_rows, num_chunks = num_sequences * num_nodes, triton.cdiv(vocab_size, chunk)
    best, mass, drawn = torch.empty(3, num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    token, drawn_token = torch.empty(2, num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_sequences, num_nodes, dtype=torch.int64, device=logits.device)
    grid, sizes = (num_chunks, num_rows), (num_nodes, vocab_size, *logits.stride()[:2])
    block_chunks, overlap = triton.next_power_of_2(num_chunks), dependent_launch(logits.device)
    with device_guard(logits):
        _survey_kernel[grid](
            best, token, mass, logits, temperature, *sizes,
            GREEDY=GREEDY_TEMPERATURE, CHUNK=chunk, num_warps=NUM_WARPS, **overlap,
        )  # fmt: skip
        least = threshold(logits, best, mass, temperature, top_k, top_p)
        _draw_kernel[grid](
            drawn, drawn_token, best, least, logits, positions, temperature, min_p, seeds, sequences, *sizes,
            *positions.stride(), GREEDY=GREEDY_TEMPERATURE, CHUNK=chunk, BLOCK_CHUNKS=block_chunks, num_warps=NUM_WARPS,
            **overlap,
        )  # fmt: skip
        _pick_kernel[(num_rows,)](
            tokens, best, token, drawn, drawn_token, temperature, num_nodes, num_chunks,
            GREEDY=GREEDY_TEMPERATURE, BLOCK_CHUNKS=block_chunks, num_warps=1, **overlap,
        )  # fmt: skip
    return tokens
