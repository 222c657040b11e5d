"""Weights of 4 and 8 bits as the kernel of `packed.py` reads them, and back.

    N, K      rows and columns of the weight: outputs and inputs of the layer
    G         groups of columns, each with a scale (and a zero point) of its own in every row

A packed weight stands for a dense one, (code - zero) * scale, rounded once. Its codes are striped over words of 32
bits, so that a shift and a mask make a tile of the weight out of a tile of words, with no exchange between threads:
a row is cut into steps of 32 words, which hold 32 columns times the codes of a word. Code j of a step's column j 32 + i
lies in the pair of words i - i % 2 and the next, its half (of 16 bits) that of i % 2: the matrix instructions of a GPU
want neighbours of a row side by side in one register, and so they are. Signed bytes (int8) have no offset; those of fp8
are as in the file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .check import ANY, FLOATS, tensor, whole

WORDS = 32  # of a row in a step
BITS = {"int4": 4, "int8": 8, "fp8": 8}
MIDDLE = {"int4": 8, "int8": 128, "fp8": 0}  # the code of 0, where no zero points are given
UINT8 = (torch.uint8,)
BLOCK_ROWS = 4096  # made dense at a time


class Packed(NamedTuple):
    """A weight [N, K]. scales as the file has them; order[k]: the column of x that column k multiplies (None: k)."""

    words: Tensor  # int32 [N, steps * 32]
    scales: Tensor  # [G, N]
    zeros: Tensor | None  # uint8 [G, N]; None: 8 of 4 bits, 128 of 8
    order: Tensor | None  # int32 [K]
    kind: str  # "int4", "int8" or "fp8" (e4m3)
    in_features: int  # K
    group_size: int  # columns of a group; K where there is one

    @property
    def out_features(self) -> int:
        return len(self.words)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self[:4] if isinstance(each, Tensor))


def step_columns(kind: str) -> int:
    """Columns of a step: K is filled up to a multiple of them."""
    return WORDS * 32 // BITS[kind]


def pack(
    codes: Tensor, scales: Tensor, *, kind: str, zeros: Tensor | None = None, order: Tensor | None = None,
    group_size: int | None = None,
) -> Packed:  # fmt: skip
    """The weight (codes - zeros) * scales, for the kernel.

    codes: uint8 [N, K], 0 .. 15 (int4) or 0 .. 255 (int8, the number plus 128), or float8_e4m3fn (fp8). scales: floats
    [N, G]. zeros: uint8 [N, G], codes of 0. order: integers [K]. group_size: given where K / G is not it.
    """
    if kind not in BITS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(BITS)}")
    dtypes = (torch.float8_e4m3fn,) if kind == "fp8" else UINT8
    num_rows, columns = tensor("codes", codes, "N K", dtypes, layout=ANY)
    near = ("codes", codes)
    groups = tensor("scales", scales, "N G", FLOATS, (num_rows, None), near=near, layout=ANY)[1]
    if group_size is None:
        if columns % groups:
            raise ValueError(f"scales have {groups} groups and codes {columns} columns: give group_size")
        group_size = columns // groups
    group_size = whole("group_size", group_size, 1, columns)
    if -(-columns // group_size) != groups:
        raise ValueError(f"scales have {groups} groups; {columns} columns in groups of {group_size} have other many")
    if zeros is not None:
        if kind == "fp8":
            raise ValueError("zeros are given, and fp8 has none: leave them out")
        tensor("zeros", zeros, "N G", UINT8, (num_rows, groups), near=near, layout=ANY)
        zeros = _own(zeros.T)
    if order is not None:
        tensor("order", order, "K", (torch.int32, torch.int64), (columns,), near=near, layout=ANY)
        order = _own(order.to(torch.int32))
    return Packed(stripe(codes, kind), _own(scales.T), zeros, order, kind, columns, group_size)


def _own(view: Tensor) -> Tensor:
    """A tensor that keeps no other alive, as views do whatever their data is set to."""
    return view.clone(memory_format=torch.contiguous_format)


def stripe(codes: Tensor, kind: str, words: int = WORDS) -> Tensor:
    """Words, int32 [N, steps * words], of codes [N, K] as `pack` takes them."""
    bits = BITS[kind]
    num_rows, columns = codes.shape
    per_word, step = 32 // bits, words * 32 // bits
    half, steps = per_word // 2, -(-columns // step)
    out = codes.new_zeros(num_rows, steps * words, dtype=torch.int32)
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        block = codes[rows].view(torch.uint8) ^ (128 if kind == "int8" else 0)
        block = torch.nn.functional.pad(block, (0, steps * step - columns))
        # [N, step, which word of a pair, code of its half, pair, half]
        parts = block.view(len(block), steps, 2, half, words // 2, 2)
        pairs = out[rows].view(len(block), steps, words // 2, 2)
        for word in range(2):
            for code in range(half):
                for side in range(2):
                    pairs[..., word] |= parts[:, :, word, code, :, side].to(torch.int32) << (bits * code + 16 * side)
    return out


def unstripe(words: Tensor, kind: str, columns: int, words_of_step: int = WORDS) -> Tensor:
    """Codes [N, K] as `pack` takes them, of words."""
    bits = BITS[kind]
    per_word = 32 // bits
    half = per_word // 2
    pairs = words.view(len(words), -1, words_of_step // 2, 2)
    out = words.new_empty(len(words), pairs.shape[1], 2, half, words_of_step // 2, 2, dtype=torch.uint8)
    for word in range(2):
        for code in range(half):
            for side in range(2):
                out[:, :, word, code, :, side] = pairs[..., word] >> (bits * code + 16 * side) & (1 << bits) - 1
    codes = out.view(len(words), -1)[:, :columns]
    if kind == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn)
    return codes ^ 128 if kind == "int8" else codes.contiguous()


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in the order of the file's columns: (code - zero) * scale, the scale in dtype, rounded once."""
    out = packed.words.new_empty(packed.out_features, packed.in_features, dtype=dtype)
    for first in range(0, len(out), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        dense = dense_rows(packed, rows, dtype)
        if packed.order is None:
            out[rows] = dense
        else:
            out[rows, packed.order.long()] = dense
    return out


def dense_rows(packed: Packed, rows: slice, dtype: torch.dtype, *, scaled: bool = True) -> Tensor:
    """Rows of the weight in the kernel's order of columns; without its scales where not `scaled`."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = unstripe(packed.words[rows], packed.kind, packed.in_features).to(wide)
    if packed.zeros is not None:
        codes -= by_column(packed, packed.zeros[:, rows].to(wide))
    elif MIDDLE[packed.kind]:
        codes -= MIDDLE[packed.kind]
    if scaled:
        codes *= by_column(packed, packed.scales[:, rows].to(dtype).to(wide))
    return codes.to(dtype)


def by_column(packed: Packed, groups: Tensor) -> Tensor:
    """[N, K] of [G, N]."""
    return groups.T.repeat_interleave(packed.group_size, 1)[:, : packed.in_features]


def codes_of(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [N, K], scales [N, G], zeros [N, G] or None), as `pack` takes them."""
    zeros = None if packed.zeros is None else packed.zeros.T
    return unstripe(packed.words, packed.kind, packed.in_features), packed.scales.T, zeros


def merge(parts: list[Packed]) -> Packed:
    """One weight of the rows of several, in turn. ValueError where bits, groups, zero points or orders differ."""
    first = parts[0]
    alike = {(each.kind, each.in_features, each.group_size, each.zeros is None, each.scales.dtype) for each in parts}
    same_order = all(_same(each.order, first.order) for each in parts)
    if len(alike) > 1 or not same_order:
        raise ValueError("packed weights that differ in kind, columns, groups, zero points or order are not one weight")
    return first._replace(
        words=torch.cat([each.words for each in parts]),
        scales=torch.cat([each.scales for each in parts], 1),
        zeros=None if first.zeros is None else torch.cat([each.zeros for each in parts], 1),  # type: ignore[misc]
    )


def _same(order: Tensor | None, other: Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return torch.equal(order, other)


def cut_rows(packed: Packed, low: int, high: int) -> Packed:
    """Rows low to high, as a copy."""
    zeros = None if packed.zeros is None else packed.zeros[:, low:high].contiguous()
    return packed._replace(
        words=packed.words[low:high].clone(), scales=packed.scales[:, low:high].contiguous(), zeros=zeros
    )


def cut_columns(packed: Packed, low: int, high: int) -> Packed:
    """Columns low to high, which are bounds of groups, as a copy. A weight with an order has no such parts."""
    if packed.order is not None:
        raise ValueError("columns are in an order of their own (act-order): cut rows instead")
    size, columns = packed.group_size, packed.in_features
    if packed.scales.shape[0] > 1 and (low % size or (high % size and high != columns)):
        raise ValueError(f"columns {low} to {high} do not lie along groups of {size}")
    codes, scales, zeros = codes_of(packed)
    if len(packed.scales) > 1:
        groups = slice(low // size, -(-high // size))
        scales, zeros = scales[:, groups], None if zeros is None else zeros[:, groups]
    return pack(
        codes[:, low:high], scales, kind=packed.kind, zeros=zeros, group_size=min(size, high - low),
    )  # fmt: skip


def has_kernel(packed: Packed) -> bool:
    """Whether the kernel knows such groups: whole tiles of a step, or whole steps."""
    size, step = packed.group_size, step_columns(packed.kind)
    return len(packed.scales) == 1 or (size % WORDS == 0 and (step % size == 0 or size % step == 0))


def group_of_kernel(packed: Packed) -> int:
    """Columns that share a factor; 0 where one scale a row multiplies the sum, and codes are used as they are."""
    if len(packed.scales) > 1:
        return packed.group_size
    return 0 if packed.zeros is None else packed.words.shape[1] // WORDS * step_columns(packed.kind)


def factors_of(packed: Packed, dtype: torch.dtype) -> Tensor:
    """What the kernel reads of scales and zero points where x has this dtype, of 16 bits.

    One scale a row: fp32 [N]. Else int32 [P, N] of pairs, the first in the low 16 bits: the scales of two groups, or a
    group's scale and what is added to its codes. Groups that only fill a step have zeros.
    """
    group, step = group_of_kernel(packed), step_columns(packed.kind)
    if not group:
        return packed.scales[0].float()
    columns = packed.words.shape[1] // WORDS * step
    scales, zeros = packed.scales.to(dtype), packed.zeros
    if zeros is not None:
        # with a code's own offset, as kernels/packed_kernels.py makes it a number
        offset = {"int4": -128 if dtype == torch.bfloat16 else -1024, "int8": 128}[packed.kind]
        first, second = scales, (offset - zeros.to(torch.float32)).to(dtype)
    else:
        scales = torch.nn.functional.pad(scales, (0, 0, 0, len(scales) % 2))
        first, second = scales[::2], scales[1::2]
    pairs = torch.stack([first, second], -1).contiguous().view(torch.int32)[..., 0]
    needed = columns // group if zeros is not None else -(-columns // group // 2)
    return torch.nn.functional.pad(pairs, (0, 0, 0, max(0, needed - len(pairs)))).contiguous()
