"""Floats as integers of the same order, so that a selection is exact, deterministic and takes ties by index.

    key(x)      int32 with key(a) < key(b) iff a < b;  NaN is taken for -inf, -0.0 for 0.0
    pack(x, i)  int64, key(x) in the high word and the complement of the index in the low one: no two are equal, and of
                equal values the lower index is the greater

An IEEE float already sorts like a sign-magnitude integer: flipping the 31 magnitude bits of the negative ones makes it
two's complement. Every real key is greater than ABSENT, which stands for padding and for what is taken already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import ANY, FLOAT32, INT64, broadcast, tensor

ABSENT = tl.constexpr(-(2**31))
PACKED_ABSENT = tl.constexpr(-(2**63))
KEY_MINUS_INF = tl.constexpr(-(2**31) + 0x7FFFFF)


@triton.jit
def order_key(x):
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def order_value(key):
    """The float32 of a key: the map is its own inverse."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, index):
    return (order_key(x).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def take_best(keys, index, axis: tl.constexpr):
    """Along an axis, which is kept: (the largest of int32 keys, the lowest index that has it, keys with ABSENT there).

    Two reductions of 32 bits: a warp does each in one instruction, where one of packed keys takes ten and more.
    """
    best = tl.max(keys, axis, keep_dims=True)
    first = tl.min(tl.where(keys == best, index, 2147483647), axis, keep_dims=True)
    return best, first, tl.where(index == first, ABSENT, keys)


@triton.jit
def kth_key(keys, count):
    """The largest t with at least `count` of the int32 keys >= t, by bisection; -inf's key where there is none."""
    low = tl.full([], KEY_MINUS_INF, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32)) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


def order_key_ref(x: torch.Tensor) -> torch.Tensor:
    """float32 of any shape -> int32."""
    tensor("x", x, "...", FLOAT32, layout=ANY)
    x = torch.where(x.isnan(), float("-inf"), x)
    bits = torch.where(x == 0.0, 0.0, x).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def pack_ref(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """float32 and int64 that broadcast together -> int64."""
    tensor("x", x, "...", FLOAT32, layout=ANY)
    tensor("index", index, "...", INT64, near=("x", x), layout=ANY)
    broadcast(FLOAT32 + INT64, x=x, index=index)
    return (order_key_ref(x).long() << 32) | (0xFFFFFFFF - index)


def unpack_ref(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, index) of packed keys, int64."""
    tensor("packed", packed, "...", INT64, layout=ANY)
    key = (packed >> 32).int()
    value = torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32)
    return value, 0xFFFFFFFF - (packed & 0xFFFFFFFF)
