"""Attention of tree nodes over prefix and tree: the kernels of the verify pass and of every draft level.

    out[b, i, h] = sum_n p[n] v[b, h // G, n],   p = softmax over the visible n of  scale * q[b, h, i] . k[b, h // G, n]

A cache row n < lengths[b] is prefix and visible to all; row lengths[b] + j holds tree slot j, visible to query i if bit
j of `ancestors[b, i]` is set. What a query sees of the tree is its path: those slots stand, in their order, at the
positions behind the prefix. Sliding windows and chunks compare logical positions: n in the prefix, lengths[b] +
depths[b, j] in the tree. A softcap bends the scores before the mask; a sink is one more logit of the denominator,
without a value.

    B sequences   T queries   Hq, Hkv heads   G = Hq / Hkv   L cache rows   D head size   W mask words   N tree slots

A row's bits depend on its own keys, their positions and its query alone: `tree_attention_order.py` says in which order
they are added up. So a node gets what plain decoding gives the same token, whose path is prefix then; that holds for
paths of up to LAST = 17 nodes, deeper ones are right up to rounding. Where tiles of rows alone fill the GPU, a program
takes all keys of its rows, and there is one launch. Else a program takes a split of the keys, or the last keys, and a
second kernel adds up (`tree_attention_kernels.py`). There many rows over a long cache take
`tree_attention_hopper` for most of the prefix, on the GPUs that it is for: the same pieces, by specialized warps.

Bytes: K and V of the live rows, 2 Hkv (length + first + T) D per sequence, plus q and out, 2 T Hq D. Llama-3.1-8B with
2,048 rows in bf16: 8.4 MB per layer, 2.7 us at 3.08 TB/s (88 us for 32 layers). The T * G rows that share a KV head are
packed into matrix tiles; each tile reads K and V once, all but the first from L2. The grid covers the whole cache, so
that a captured graph fits every length: programs beyond the prefix leave at once. Partial results are 4 T Hq D bytes
for a split, within L2 for one sequence.

Left out: fp8 caches, different head sizes of K and V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .check import FLOATS, number, whole
from .launch import device_guard, resources, upcast, use_triton
from .overlap import dependent_launch
from .tree_attention_inputs import check_inputs, check_options
from .tree_attention_kernels import attend_kernel, combine_kernel
from .tree_attention_order import AHEAD, MOST_COLUMNS, SPLITS, UNIT
from .tree_attention_ref import tree_attention_ref

# Gluon is experimental: other releases of Triton use `attend_kernel` only.
HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7."))
if HAS_GLUON:
    from . import tree_attention_hopper as hopper


class Tile(NamedTuple):
    """How a launch cuts its work: query rows, cache rows and tree slots per step, columns of D of the last keys,
    warps, pipeline stages; whether a program takes all of its rows' keys. Of these block_n alone decides bits, so it
    follows from dtype and head size."""

    block_m: int
    block_n: int
    block_t: int
    columns: int
    num_warps: int
    num_stages: int
    fold: bool


# (bytes an element, padded head size) -> (most query rows, cache rows). fp32 dots run on the CUDA cores with operands
# in registers.
TILES = {
    (2, 16): (128, 64), (2, 32): (128, 64), (2, 64): (128, 64), (2, 128): (128, 64), (2, 256): (64, 64),
    (4, 16): (32, 64), (4, 32): (32, 64), (4, 64): (32, 32), (4, 128): (32, 16), (4, 256): (16, 16),
}  # fmt: skip
LEAST_ROWS = {2: 64, 4: 16}  # of a product, by the bytes of an element: see `tree_attention_order.py`
SHORT_CACHE = SPLITS.value * UNIT.value - AHEAD.value  # rows up to which all splits are of one unit
COMBINED_ROWS = 8  # of a program of the second kernel
LONG_CACHE = 4096  # rows from which on the first kernel does not start early
HOPPER_CACHE = 12288  # rows from which on `tree_attention_hopper` attends


def _tile(q: Tensor, k: Tensor, first: int) -> Tile:
    num_sms, shared_memory = resources(q.device)
    num_sequences, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_rows = k.shape[1], k.shape[2]
    block_d, size = _padded(head_dim), q.element_size()
    if (size, block_d) not in TILES:
        raise ValueError(f"q has head size D = {head_dim}; expected at most 256")
    most_rows, block_n = TILES[size, block_d]
    packed_rows, groups = num_queries * num_heads // num_kv_heads, num_sequences * num_kv_heads
    # more programs rather than fewer reads, unless the GPU is full of either
    wanted = most_rows if _fill(num_sms, packed_rows, most_rows, groups) else 64
    block_m = min(most_rows, wanted, max(LEAST_ROWS[size], triton.next_power_of_2(packed_rows)))
    block_t = min(block_n, max(16, triton.next_power_of_2(first + num_queries)))
    num_warps = 8 if block_m == 128 or block_d == 256 or size == 4 else 4
    fold = _fill(num_sms, packed_rows, block_m, groups)
    columns = min(block_d, MOST_COLUMNS.value)
    num_stages = (shared_memory - 4096 - block_m * block_d * size) // (2 * block_n * block_d * size)
    most_stages = 3 if fold or num_rows > SHORT_CACHE else 1
    return Tile(block_m, block_n, block_t, columns, num_warps, min(most_stages, max(1, num_stages)), fold)


def _fill(num_sms: int, packed_rows: int, block_m: int, groups: int) -> bool:
    """Whether tiles of so many rows have work for most multiprocessors."""
    return 4 * triton.cdiv(packed_rows, block_m) * groups >= 3 * num_sms


def _num_slots(num_rows: int) -> int:
    """Partial results of a row where each split leaves its own: for few splits as many, in powers of two, as a cache
    has; else one more than SPLITS, as a window may begin within one."""
    needed = triton.cdiv(num_rows, UNIT.value)
    return SPLITS.value + 1 if needed > SPLITS.value // 2 else triton.next_power_of_2(needed)


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _by_hopper(q: Tensor, k: Tensor, v: Tensor, other: float) -> bool:
    """Whether `tree_attention_hopper` takes the prefix; `other` is not 0 where a window, a chunk or a softcap is asked
    for."""
    (_, num_heads, num_queries, head_dim), (_, num_kv_heads, num_rows, _) = q.shape, k.shape
    if not HAS_GLUON or not hopper.is_hopper(q.device):
        return False
    fits = q.dtype in hopper.TYPES and head_dim in hopper.HEAD_DIMS and hopper.can_fetch(k) and hopper.can_fetch(v)
    return fits and not other and num_rows >= HOPPER_CACHE and num_queries * num_heads // num_kv_heads > 64


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ancestors: Tensor, *, scale: float, depths: Tensor | None = None,
    first: int = 0, window: int = 0, chunk: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of T tree nodes over the prefix and the tree slots that they see.

    q [B, Hq, T, D] of any strides, row i is tree slot first + i; k, v [B, Hkv, L, D], views of a slab (all three with a
    contiguous last dimension); lengths [B] prefix rows; ancestors [B, T, W] int64 bits of the visible slots; scale > 0;
    depths [B, N] of the slots, needed by `window` (keys less than so many positions back) and `chunk` (keys of one
    chunk), else they only save time: slots of one depth are added up at once; window, chunk, softcap: 0 = off; sinks
    [Hq]. Rows from lengths[b] + first + T on do not count, whatever they hold. Returns [B, T, Hq, D], contiguous; a
    query that sees nothing gets zeros.
    """
    first, window, chunk = whole("first", first), whole("window", window), whole("chunk", chunk)
    scale, softcap = number("scale", scale), number("softcap", softcap, or_zero=True)
    check_inputs(q, k, v, lengths, ancestors, first, FLOATS)
    check_options(q, first, depths, bool(window or chunk), sinks)
    if not use_triton(q, k, v, sinks):
        return tree_attention_ref(
            q, k, v, lengths, ancestors, scale=scale, depths=depths, first=first, window=window, chunk=chunk,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
    num_sequences, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_rows = k.shape[1:3]
    tile = _tile(q, k, first)
    by_hopper = not tile.fold and _by_hopper(q, k, v, window or chunk or softcap)
    packed_rows, groups = num_queries * num_heads // num_kv_heads, num_sequences * num_kv_heads
    slots, columns = (0, _padded(head_dim)) if tile.fold else (_num_slots(num_rows), tile.columns)
    out = q.new_empty(num_sequences, num_queries, num_heads, head_dim)
    partials: Any = (None, None, None) if tile.fold else _sums(q, groups, slots + 1, packed_rows)
    # Programs that start early find some multiprocessors taken and crowd on the rest: a long cache does not forgive it.
    overlap = dependent_launch(q.device)
    late: dict[str, Any] = {name: value and (name == "PDL" or num_rows < LONG_CACHE) for name, value in overlap.items()}
    by_depth = 0 if depths is None else depths.stride(0)
    shared: dict[str, Any] = dict(
        G=num_heads // num_kv_heads, D=head_dim, BLOCK_D=_padded(head_dim), WINDOW=window, CHUNK=chunk,
        BLOCK_N=tile.block_n, enable_fp_fusion=False,
    )  # fmt: skip
    tiles = triton.cdiv(packed_rows, tile.block_m)
    programs = 1 if tile.fold else _padded(head_dim) // columns + slots
    with device_guard(q):
        if by_hopper:
            hopper.attend(q, k, v, lengths, ancestors, *partials, scale=scale, first=first, **late)
        attend_kernel[(tiles, groups, programs)](
            q, k, v, lengths, ancestors, depths, sinks, out, *partials, num_queries, num_kv_heads, first, slots, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *ancestors.stride()[:2], by_depth,
            **shared, SOFTCAP=softcap, FOLD=tile.fold, BLOCK_M=tile.block_m, BLOCK_T=tile.block_t, COLUMNS=columns,
            ONE=first + num_queries <= tile.block_t, FINE=q.dtype == torch.float32, UPCAST=upcast(q.dtype),
            NUM_STAGES=tile.num_stages, RESUME=by_hopper, num_warps=tile.num_warps, **(overlap if by_hopper else late),
        )  # fmt: skip
        if not tile.fold:
            rows = min(COMBINED_ROWS, triton.next_power_of_2(packed_rows))
            combine_kernel[(triton.cdiv(packed_rows, rows), groups)](
                lengths, ancestors, sinks, out, *partials, num_queries, num_kv_heads, first, *ancestors.stride()[:2],
                **shared, SLOTS=slots, BLOCK_M=rows, num_warps=4, **overlap,
            )  # fmt: skip
    return out


def _sums(q: Tensor, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for sums of keys in fp32: weighted values [..., D], peaks and totals [...]."""
    acc = q.new_empty(*shape, q.shape[-1], dtype=torch.float32)
    return acc, *q.new_empty(2, *shape, dtype=torch.float32)
