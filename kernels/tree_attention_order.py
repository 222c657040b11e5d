"""The order in which a row of `tree_attention` adds up its keys, and the pieces of its kernels that keep to it.

A row at position p sees keys at positions 0 to p: the prefix, then its own path through the tree, whose nodes stand at
the positions behind it. From left to right these are

    splits  keys up to p - LAST, cut at multiples of `units(p)` times UNIT: at most SPLITS of them (one more in a window
            or chunk, which begins anywhere). `units` rises at p = 1,408 + 2,048 n, where no round number of tokens is:
            the tree of a round there takes the prefix twice. Each split is one chain of matrix instructions, in blocks
            of BLOCK_N keys from a multiple of that on. Weights are relative to the largest so far; where a block has a
            larger one, what is summed up before it is rescaled. The sum of a block's weights is one of fixed-point
            numbers, exact.
    last    the LAST keys behind them, one by one, each by a matrix instruction of its own. Weights are relative to the
            largest of these keys, and added up in fixed point as well.

and the row's sums are those of its last keys, to which its splits are added one by one, then the sink of its head.

All of this follows from p, the window and the chunk, which belong to the layer. How many other rows there are, where
the prefix ends and the tree begins, how large the cache is, who computes which piece, who goes on with a chain that
another began: nothing of it matters, so the row gets the bits that it gets in plain decoding. A key that a row does not
see adds nothing, sums are rescaled by exactly 1 where a block has nothing for a row, and multiplications and additions
are told to the compiler one by one (no launch may contract them). So the last keys of all rows can be taken together,
from the cache as they lie: first those of the prefix, one column at a time, then the tree, one depth at a time, of
which a row sees one node. A path of more than LAST nodes, which decoding does not make, has all of them among the last
keys: right, but only up to rounding.

BLOCK_N depends on the dtype and the head size. What a matrix instruction makes of a row and a column does not depend on
the others in its tile; that holds for one kind of instruction, so in 16 bits on Hopper every product has 64 rows or
more, which is wgmma's. Nor does it matter which of an instruction's keys it is that alone has a weight. In fp32 there
are no such instructions: a product is a chain of multiply-adds, key by key.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(128)  # keys, a multiple of every BLOCK_N
SPLITS = tl.constexpr(16)
AHEAD = tl.constexpr(640)  # keys by which splits are wider before there would be more than SPLITS of them
LAST = tl.constexpr(17)  # keys, the nodes of the longest path
NEAR = tl.constexpr(16)  # of them may lie in the prefix
MOST_COLUMNS = tl.constexpr(32)  # of D, that a program of the last keys takes where others take the splits


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
    """Of a split of the row at this position."""
    span = position + 1
    if WINDOW > 0:
        span = tl.minimum(span, WINDOW)
    if CHUNK > 0:
        span = tl.minimum(span, CHUNK)
    return (span + AHEAD + SPLITS * UNIT - 1) // (SPLITS * UNIT)


@triton.jit
def whole_blocks(length, BLOCK_N: tl.constexpr):
    """How many blocks from the first key on are of the splits of all rows of a tree behind a prefix of this length."""
    return tl.maximum(length + 1 - LAST, 0) // BLOCK_N


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
    """A word of masks, without bits of slots from num_slots on; of rows that are not inside, 0."""
    word = tl.load(words_ptr + index, mask=inside, other=0, cache_modifier=".cg")
    return word & _lowest(tl.minimum(num_slots - 64 * index, 64))


@triton.jit
def path_length(words_ptr, num_slots, inside):
    """How many tree slots each row sees; words_ptr: of their masks."""
    count = _count(_word(words_ptr, 0, num_slots, inside))
    for index in range(1, tl.cdiv(num_slots, 64)):
        count += _count(_word(words_ptr, index, num_slots, inside))
    return count


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
def _sums(weights, FINE: tl.constexpr):
    """The sum of at most 64 weights up to 1 in two parts, each exact in whatever order: that of multiples of 2^-17, and
    with FINE that of what these leave in multiples of 2^-36."""
    coarse = (weights + 64.0) - 64.0
    total = tl.sum(coarse, 1)
    if FINE:
        return total, tl.sum((weights - coarse + 0.000244140625) - 0.000244140625, 1)
    return total, tl.zeros_like(total)


@triton.jit
def scores_of(q, k, scale, SOFTCAP: tl.constexpr, FINE: tl.constexpr):
    """Scores [M, N] of rows q [M, D] and keys k [N, D], and what makes them logits to base 2."""
    scores, factor = tl.dot(q, tl.trans(k), input_precision="ieee"), scale * LOG2E
    if SOFTCAP > 0:
        scores = _tanh(scores * (scale / SOFTCAP))
        factor = SOFTCAP * LOG2E
    if FINE:  # so that the largest weight is 1 to the last bit; in 16 bits rounding makes it so
        scores, factor = scores * factor, 1.0
    return scores, factor


@triton.jit
def weigh(scores, factor, peak, FINE: tl.constexpr):
    """Weights [M, N] of scores, relative to that of a logit of `peak` [M], and their sum [M] in two parts."""
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    shift = tl.broadcast_to(shift[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, factor, tl.float32), -shift))
    coarse, fine = _sums(weights, FINE)
    return weights, coarse, fine


@triton.jit
def add_block(acc, peak, total, scores, factor, v, FINE: tl.constexpr):
    """The sums of a split (weighted values [M, D], peak [M], weights [M]) with one more block: scores [M, N], -inf
    where a row does not see a key, v [N, D]. What a peak of -inf comes with does not count."""
    risen = tl.maximum(peak, tl.max(scores, 1) * factor)
    left = tl.exp2(peak - tl.where(risen == float("-inf"), 0.0, risen))
    weights, coarse, fine = weigh(scores, factor, risen, FINE)
    acc = tl.dot(weights.to(v.dtype), v, acc * left[:, None], input_precision="ieee")
    return acc, risen, tl.fma(total, left, coarse + fine)


@triton.jit
def add_one_by_one(acc, weights, v, turns, begin, end):
    """Weighted values [M, D] with the keys whose turns [N] are begin to end, in that order, of each turn at most one
    that a row sees; weights [M, N], v [N, D]."""
    # What is built around asynchronous products in such loops is wrong now and then: Triton 3.6 lets one run on while
    # the next turn's weights are written to its registers, and where it waits ptxas 12.8 may lose where values lie. So
    # narrow ones are products of three dimensions, which are not asynchronous and round alike. Wide ones, which do not
    # fit into registers so, are waited for, since acc is used.
    if v.dtype == tl.float32:  # a product takes one after the other by itself
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    elif acc.shape[1] <= MOST_COLUMNS:
        tiles: tl.constexpr = acc.shape[0] // 16
        weights = tl.reshape(weights, (tiles, 16, weights.shape[1]))
        sums = tl.reshape(acc, (tiles, 16, acc.shape[1]))
        values = tl.broadcast_to(v[None, :, :], (tiles, v.shape[0], v.shape[1]))
        for turn in range(begin, end):
            one = tl.where((turns == turn)[None, None, :], weights, 0.0).to(v.dtype)
            sums = tl.dot(one, values, sums)
        acc = tl.reshape(sums, acc.shape)
    else:
        for turn in range(begin, end):
            acc = tl.dot(tl.where((turns == turn)[None, :], weights, 0.0).to(v.dtype), v, acc)
            acc = tl.where(turn < end, acc, 0.0)  # always acc
    return acc


@triton.jit
def add(acc, peak, total, acc_b, peak_b, total_b):
    """Sums of keys, [M, D] and [M], and those of the keys right of them."""
    both = tl.maximum(peak, peak_b)
    shift = tl.where(both == float("-inf"), 0.0, both)
    left, right = tl.exp2(peak - shift), tl.exp2(peak_b - shift)
    acc = tl.fma(acc, tl.broadcast_to(left[:, None], acc.shape), acc_b * right[:, None])
    return acc, both, tl.fma(total, left, total_b * right)
