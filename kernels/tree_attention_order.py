"""The order in which a row of `tree_attention` adds up its keys, and the pieces of its kernels that keep to it.

A row at position p sees keys at positions 0 to p: the prefix, then its own path through the tree, whose nodes stand at
the positions behind it. It takes them from left to right:

    block   BLOCK_N keys from a multiple of BLOCK_N on. Its scores and the sum of its weighted values come from one
            matrix product each, for itself alone, which takes D and the keys in steps of the instruction. Weights are
            relative to the largest of them; their sum is one of fixed-point numbers, exact.
    split   `units(p)` times UNIT keys, from a multiple of that on: its blocks are added one by one. A row has at most
            SPLITS of them (one more in a window or chunk, which begins anywhere).
    row     its splits are added one by one, the sink of its head last.

All of this follows from p, the window and the chunk, which belong to the layer. How many other rows there are, where
the prefix ends and the tree begins, how large the cache is, who computes which piece: nothing of it matters, so the row
gets the bits that it gets in plain decoding. A block that a row does not see adds nothing, and multiplications and
additions are told to the compiler one by one (no launch may contract them).

BLOCK_N depends on the dtype and the head size. What a matrix instruction makes of a row and a column does not depend on
the others in its tile, nor on which of both is called a row; that holds for one kind of instruction, so in 16 bits on
Hopper every product has 64 rows or more, which is wgmma's.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(128)  # keys, a multiple of every BLOCK_N
SPLITS = tl.constexpr(16)


@triton.jit
def first_key(length, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a row at position `length` sees, and so any later one."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, length // CHUNK * CHUNK)
    return first


@triton.jit
def units(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Of a split of the row at this position, at least one."""
    span = position + 1
    if WINDOW > 0:
        span = tl.minimum(span, WINDOW)
    if CHUNK > 0:
        span = tl.minimum(span, CHUNK)
    return tl.maximum((span + SPLITS * UNIT - 1) // (SPLITS * UNIT), 1)


@triton.jit
def _count(word):
    """Bits that are set in int64."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return ((word + (word >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _lowest(count):
    """The lowest `count` of 64 bits, 0 to 64: two shifts, as one of 64 is not defined."""
    count = count.to(tl.int64)
    return (((count * 0 + 1) << (count >> 1)) << (count - (count >> 1))) - 1


@triton.jit
def _word(words_ptr, index, num_slots, inside):
    """A word of a mask, without bits of slots from num_slots on; of rows that are not inside, 0."""
    word = (
        tl.load(words_ptr + index, cache_modifier=".cg")
        if inside is None
        else tl.load(words_ptr + index, mask=inside, other=0)
    )
    return word & _lowest(tl.minimum(num_slots - 64 * index, 64))


@triton.jit
def path_length(words_ptr, num_slots, inside):
    """How many tree slots a row sees; words_ptr: of its mask, or of those of many rows, with `inside`."""
    count = _count(_word(words_ptr, 0, num_slots, inside))
    for index in range(1, tl.cdiv(num_slots, 64)):
        count += _count(_word(words_ptr, index, num_slots, inside))
    return count


@triton.jit
def write_path(path_ptr, words_ptr, num_slots):
    """The slots of one row's path in their order, from the root on."""
    j, before = tl.arange(0, 64), 0
    for index in range(0, tl.cdiv(num_slots, 64)):
        word = _word(words_ptr, index, num_slots, None)
        on_path = ((word >> j.to(tl.int64)) & 1) == 1
        tl.store(path_ptr + before + _count(word & _lowest(j)), 64 * index + j, mask=on_path)
        before += _count(word)


@triton.jit
def in_reach(visible, query_positions, key_positions, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    if WINDOW > 0:
        visible = visible & (query_positions - key_positions < WINDOW)
    if CHUNK > 0:
        visible = visible & (query_positions // CHUNK == key_positions // CHUNK)
    return visible


@triton.jit
def _tanh(x):
    """Accurate near 0, where softcapped scores live and the exponential form cancels."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _sum(weights, axis: tl.constexpr, FINE: tl.constexpr):
    """The sum of at most 64 weights up to 1, in whatever order: of multiples of 2^-17 it is exact. FINE: and of what
    these leave in multiples of 2^-36."""
    coarse = (weights + 64.0) - 64.0
    total = tl.sum(coarse, axis)
    if FINE:
        total += tl.sum((weights - coarse + 0.000244140625) - 0.000244140625, axis)
    return total


@triton.jit
def _weigh(scores, visible, scale, axis: tl.constexpr, SOFTCAP: tl.constexpr, FINE: tl.constexpr):
    """(weights, peak, their sum) of a block's scores: keys lie along the axis."""
    factor = scale * LOG2E
    if SOFTCAP > 0:
        scores = _tanh(scores * (scale / SOFTCAP))
        factor = SOFTCAP * LOG2E
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    if FINE:  # so that the largest weight is 1 to the last bit; in 16 bits rounding makes it so
        scores, factor = scores * factor, 1.0
    peak = tl.max(scores, axis) * factor
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    shift = tl.broadcast_to(tl.expand_dims(shift, axis), scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, factor, tl.float32), -shift))
    return weights, peak, _sum(weights, axis, FINE)


@triton.jit
def block_sums(q, k, v, visible, scale, SOFTCAP: tl.constexpr, FINE: tl.constexpr):
    """A block for itself: (weighted values [M, D], peak [M], weights' sum [M]) of rows q [M, D].

    visible [M, N], or None where all of it is; a row that sees nothing of it has a peak of -inf and zeros.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights, peak, total = _weigh(scores, visible, scale, 1, SOFTCAP, FINE)
    return tl.dot(weights.to(v.dtype), v, input_precision="ieee"), peak, total


@triton.jit
def block_sums_of_few(q, k, v, visible, scale, LEAST: tl.constexpr, SOFTCAP: tl.constexpr, FINE: tl.constexpr):
    """The same of few rows: they are the columns of the first product, and repeated up to LEAST rows in the second.

    (weighted values [max(M, LEAST), D], peak [M], weights' sum [M]); visible [N, M].
    """
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    weights, peak, total = _weigh(scores, visible, scale, 0, SOFTCAP, FINE)
    rows = tl.trans(weights.to(v.dtype))
    if q.shape[0] < LEAST:
        rows = tl.broadcast_to(rows[None], (LEAST // q.shape[0], q.shape[0], v.shape[0]))
        rows = tl.reshape(rows, (LEAST, v.shape[0]))
    return tl.dot(rows, v, input_precision="ieee"), peak, total


@triton.jit
def add(acc, peak, total, acc_b, peak_b, total_b):
    """Sums of keys, [M, D] and [M], and those of the keys right of them."""
    both = tl.maximum(peak, peak_b)
    shift = tl.where(both == float("-inf"), 0.0, both)
    left, right = tl.exp2(peak - shift), tl.exp2(peak_b - shift)
    acc = tl.fma(acc, tl.broadcast_to(left[:, None], acc.shape), acc_b * right[:, None])
    return acc, both, tl.fma(total, left, total_b * right)
