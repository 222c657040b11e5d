"""Cross-entropy of logits to a target distribution, with the gradient in place of the logits: the loss of training.

    q = softmax(z),   loss[r] = -sum_v p[r, v] log q[r, v] = P lse(z[r]) - sum_v p[r, v] z[r, v],   P = sum_v p[r, v]
    z[r, v] <- weights[r] (P q[r, v] - p[r, v]),   the gradient of sum_r weights[r] loss[r]

R rows   V vocabulary. p may sum to less than 1 (what a draft vocabulary leaves of a distribution): such a row counts
as much as it has.

Bytes: z read, p read, z written, 6 R V in bf16; R = 12288, V = 24576: 1.8 GB, 0.6 ms at 3.08 TB/s. One program owns a
row and goes over it twice; the second time it comes from L2. PyTorch's operations for the same move about five times
as much. Left out: the products before and after, which would keep the logits off memory altogether.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import BY_ROWS, FLOAT32, FLOATS, tensor, written
from .launch import device_guard, use_triton

TILE, NUM_WARPS = 4096, 8  # candidates for tuning: 2048..8192, 4..16


class SoftCrossEntropy(NamedTuple):
    losses: Tensor  # [R] fp32, without the weights
    best: Tensor  # [R] argmax of the logits, the first of equals


@triton.jit
def _soft_cross_entropy_kernel(
    logits_ptr, targets_ptr, weights_ptr, losses_ptr, best_ptr, vocab_size, stride_logits, stride_targets,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    targets_ptr += row * stride_targets
    lanes = tl.arange(0, TILE)
    lane_peak = tl.full([TILE], float("-inf"), tl.float32)
    lane_token = lanes
    lane_sum = tl.zeros([TILE], tl.float32)
    lane_mass = tl.zeros([TILE], tl.float32)
    lane_product = tl.zeros([TILE], tl.float32)
    for first in range(0, vocab_size, TILE):
        tokens = first + lanes
        mask = tokens < vocab_size
        z = tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.load(targets_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
        peak = tl.maximum(lane_peak, z)
        safe = tl.where(peak > float("-inf"), peak, 0.0)
        lane_sum = lane_sum * tl.exp(lane_peak - safe) + tl.exp(z - safe)
        lane_token = tl.where(z > lane_peak, tokens, lane_token)
        lane_peak = peak
        lane_mass += p
        lane_product += tl.where(p > 0, p * z, 0.0)  # z may be -inf where p is 0
    best = tl.max(lane_peak, 0)
    lse = best + tl.log(tl.sum(lane_sum * tl.exp(lane_peak - best), 0))
    mass = tl.sum(lane_mass, 0)
    tl.store(losses_ptr + row, mass * lse - tl.sum(lane_product, 0))
    tl.store(best_ptr + row, tl.min(tl.where(lane_peak == best, lane_token, 2147483647), 0).to(tl.int64))

    weight = tl.load(weights_ptr + row)
    for first in range(0, vocab_size, TILE):
        tokens = first + lanes
        mask = tokens < vocab_size
        z = tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.load(targets_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
        gradient = weight * (mass * tl.exp(z - lse) - p)
        tl.store(logits_ptr + tokens, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> SoftCrossEntropy:
    """Losses of logits [R, V] against targets [R, V]; `logits` then hold the gradient of sum(weights [R] * losses)."""
    num_rows, vocab_size = tensor("logits", logits, "R V", FLOATS, layout=BY_ROWS, empty=True)
    near = ("logits", logits)
    tensor("targets", targets, "R V", FLOATS, (num_rows, vocab_size), near=near, layout=BY_ROWS, empty=True)
    tensor("weights", weights, "R", FLOAT32, (num_rows,), near=near, empty=True)
    written([near], [("targets", targets), ("weights", weights)])
    if not use_triton(logits, targets, weights):
        return soft_cross_entropy_ref(logits, targets, weights)
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, dtype=torch.long, device=logits.device)
    tile = min(TILE, max(128, triton.next_power_of_2(vocab_size)))
    with device_guard(logits):
        _soft_cross_entropy_kernel[(num_rows,)](
            logits, targets, weights, losses, best, vocab_size, logits.stride(0), targets.stride(0),
            TILE=tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return SoftCrossEntropy(losses, best)


def soft_cross_entropy_ref(logits: Tensor, targets: Tensor, weights: Tensor) -> SoftCrossEntropy:
    """`soft_cross_entropy` in plain PyTorch."""
    log_q, p = logits.float().log_softmax(-1), targets.float()
    best = logits.argmax(-1)
    mass = p.sum(-1, keepdim=True)
    logits.copy_(weights[:, None] * (mass * log_q.exp() - p))
    return SoftCrossEntropy(-torch.where(p > 0, p * log_q, 0).sum(-1), best)
