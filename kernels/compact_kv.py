"""Move the K and V rows of the accepted nodes to the end of the prefix: every layer of a device in one launch.

    slab[n, b, h, lengths[b] + r] <- slab[n, b, h, lengths[b] + path[b, r]]     for r < counts[b]

    N buffers (K and V of every layer)   B sequences   Hkv KV heads   L cache rows   A most rows on a path   D head size

Keys are stored after RoPE at the position of their depth, which is the row they move to, so a move is all it takes.
Bytes: 2 N Hkv counts D, read and written. Llama-3.1-8B with 5 accepted rows in bf16: 1.3 MB, 0.4 us at 3.08 TB/s, less
than a launch. Rows already in place are neither read nor written.

Left out: heads of other sizes in one slab (one launch for each).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import ANY, BY_ROWS, INT64, described, tensor, written
from .launch import device_guard, use_triton
from .overlap import after_earlier_kernels, dependent_launch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOST_ELEMENTS = 2**20  # that a program holds: a head's rows of a path


@triton.jit
def _compact_kernel(
    slab_ptr, path_ptr, counts_ptr, lengths_ptr, num_sequences, num_heads,
    stride_n, stride_b, stride_h, stride_l, stride_counts,
    A: tl.constexpr, BLOCK_A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    pid = tl.program_id(0).to(tl.int64)
    head, sequence, buffer = pid % num_heads, pid // num_heads % num_sequences, pid // num_heads // num_sequences
    step, d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    count = tl.load(counts_ptr + sequence * stride_counts)
    source = tl.load(path_ptr + sequence * A + step, mask=step < A, other=0)
    base = slab_ptr + buffer * stride_n + sequence * stride_b + head * stride_h
    base += tl.load(lengths_ptr + sequence) * stride_l
    mask = ((step < A) & (step < count) & (source != step))[:, None] & (d < D)
    rows = tl.load(base + source[:, None] * stride_l + d, mask=mask, other=0)
    tl.debug_barrier()  # a row may be the source of one step and the target of another, in another warp
    tl.store(base + step.to(tl.int64)[:, None] * stride_l + d, rows, mask=mask)


def compact_kv(slab: Tensor, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
    """Move rows lengths[b] + path[b, r] of `slab` [N, B, Hkv, L, D] to rows lengths[b] + r for r < counts[b], in place.

    path [B, A] is strictly increasing up to counts [B], which may be 0; what follows in it is not used. All three are
    int64, path and lengths contiguous. The slab may be a view with a contiguous last dimension, of any dtype of up to 8
    bytes: bits are moved.
    """
    num_buffers, num_sequences, num_heads, _, head_dim = tensor("slab", slab, "N B Hkv L D", None, layout=BY_ROWS)
    if slab.is_complex() or slab.is_quantized or slab.element_size() not in BITS:
        raise ValueError(f"slab is {described(slab)}; expected numbers of 1, 2, 4 or 8 bytes")
    near = ("slab", slab)
    max_path = tensor("path", path, "B A", INT64, (num_sequences, None), near=near)[1]
    tensor("counts", counts, "B", INT64, (num_sequences,), near=near, layout=ANY)
    tensor("lengths", lengths, "B", INT64, (num_sequences,), near=near)
    block_a, block_d = triton.next_power_of_2(max_path), triton.next_power_of_2(head_dim)
    if block_a * block_d > MOST_ELEMENTS:
        raise ValueError(f"path has A = {max_path} and slab D = {head_dim}; expected A D of at most {MOST_ELEMENTS}")
    written([near], [("path", path), ("counts", counts), ("lengths", lengths)])
    bits = slab.view(BITS[slab.element_size()])
    if not use_triton(bits):
        return compact_kv_ref(slab, path, counts, lengths)
    with device_guard(slab):
        _compact_kernel[(num_buffers * num_sequences * num_heads,)](
            bits, path, counts, lengths, num_sequences, num_heads, *bits.stride()[:4], counts.stride(0),
            A=max_path, BLOCK_A=block_a, D=head_dim, BLOCK_D=block_d, num_warps=4,
            **dependent_launch(slab.device),
        )  # fmt: skip


def compact_kv_ref(slab: Tensor, path: Tensor, counts: Tensor, lengths: Tensor) -> None:
    """`compact_kv` in plain PyTorch: one gather, one scatter."""
    num_buffers, num_sequences, num_heads, num_rows, head_dim = slab.shape
    step = torch.arange(path.shape[1], device=slab.device)
    moved, start = step < counts[:, None], lengths[:, None]
    # Steps past the count repeat step 0, so that every write to a row carries the same value; where nothing is
    # accepted, they move a row onto itself (the last one if the cache is full).
    first = torch.where(counts > 0, path[:, 0], 0)[:, None]
    source, target = torch.where(moved, path, first) + start, torch.where(moved, step, 0) + start
    shape = (num_buffers, num_sequences, num_heads, path.shape[1], head_dim)
    source, target = (i.clamp(max=num_rows - 1)[None, :, None, :, None].expand(shape) for i in (source, target))
    bits = slab.view(BITS[slab.element_size()])
    bits.scatter_(3, target, bits.gather(3, source))
