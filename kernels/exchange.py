"""What ranks, one GPU each of one process, exchange through each other's memory, without the host and without NCCL.

n ranks, S parts, R rows, H hidden size.

    exchange_add_rms_norm   total = sum over ranks of x + residual, normed = rms(total), on every rank
    push, await_pushes      a tensor into a peer's memory; all that was pushed is there

Each rank adds up its own parts of a row in fp32, stores the row into every peer's mailbox, raises a flag there with
system-scope release, and waits for the flags of the others, which it reads with acquire. The rows of all ranks are
added up in rank order in fp32 and rounded as `add_rms_norm` rounds the parts of a product: all ranks end with the same
bits, and a row's bits do not depend on how many rows there are.

Flags count and are never taken back: a replayed CUDA graph finds in `base`, on its device, how many exchanges there
were before. The rows of one exchange may be overwritten by the next but one: by then its peers have pushed the next
one, after they read this.

Waits are bounded, by a number of looks (about a microsecond each). After one has run out, `fault` is raised, later ones
give up at their first look, and `told`, in the host's memory, says who waited for whom. Until then nothing may wait for
the host: all ranks' kernels are loaded, and all else is launched and allocated, before an exchange is launched.

Rows of a wide exchange (`MOST_FUSED`) are pushed by one launch and awaited by the next, so that no program waits for
one that has no room to run.

Bytes: 60 rows of 4096 in fp32 are 1 MB each way, 3 us over NVLink; the flag's way is the rest.
Left out: more ranks than one host has; bf16 rows, which would round each rank's sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import BY_ROWS, FLOAT32, FLOATS, HUGE, number, tensor, whole
from .launch import device_guard
from .overlap import after_earlier_kernels, dependent_launch
from .rms_norm import MOST_COLUMNS, normalize, num_warps, rms_norm_ref, sum_parts

LOOKS = 4_000_000  # at a flag before a wait gives up
MOST_FUSED = 128  # rows that are pushed and awaited by one launch
PUSH_PROGRAMS, PUSH_BLOCK = 64, 4096


class Mailbox(NamedTuple):
    """What one rank finds of the others, and how it reaches them; `M` rows at most."""

    rank: int
    rows: Tensor  # [n, 2, M, H] fp32, by who pushed them, in turns
    flags: Tensor  # [n, 2, M] int64
    row_addresses: Tensor  # [n] int64, of `rows` of all ranks
    flag_addresses: Tensor  # [n] int64
    base: Tensor  # [1] int64, exchanges before the running forward
    fault: Tensor  # [1] int32, 1 after a wait that ran out
    told: Tensor  # [1] int64 in pinned memory of the host, `waited_for` of a wait that ran out


def waiting(rank: int, source: int) -> int:
    """What `told` is set to where `rank` waits for `source` in vain."""
    return 1 + rank * 256 + source


def waited_for(told: int) -> tuple[int, int]:
    """(rank, source) of `waiting`."""
    return divmod(told - 1, 256)


@triton.jit
def _wait(flag_ptr, wanted, fault_ptr, told_ptr, code, looks):
    """Until the flag is `wanted` or more, or looks run out. All that decides is read by one thread for all: atomics."""
    seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    if seen < wanted:
        left = looks
        if tl.atomic_add(fault_ptr, 0, sem="relaxed", scope="gpu") != 0:
            left = 0
        while (seen < wanted) & (left > 0):
            seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
            left -= 1
        if seen < wanted:
            before = tl.atomic_xchg(fault_ptr, 1, sem="relaxed", scope="gpu")
            if before == 0:
                tl.store(told_ptr, code)


@triton.jit(do_not_specialize=["index", "looks"])
def _exchange_kernel(
    x_ptr, rows_ptr, flags_ptr, row_addresses_ptr, flag_addresses_ptr, base_ptr, fault_ptr, told_ptr, residual_ptr,
    weight_ptr, normed_ptr, total_ptr, eps, index, looks, stride_s, MOST: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PUSH: tl.constexpr,
    WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    wanted = tl.load(base_ptr) + index + 1
    place = (index % 2) * MOST + row  # among the rows of one source
    mine = sum_parts(x_ptr + row * H, i, mask, stride_s, PARTS, tl.float32)
    if PUSH:
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                there = tl.load(row_addresses_ptr + peer).to(tl.pointer_type(tl.float32))
                there = tl.multiple_of(there, 16)
                tl.store(there + (RANK * 2 * MOST + place) * H + i, mine, mask=mask)
        tl.debug_barrier()
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                flag = tl.load(flag_addresses_ptr + peer).to(tl.pointer_type(tl.int64))
                tl.atomic_xchg(flag + RANK * 2 * MOST + place, wanted, sem="release", scope="sys")
    if WAIT:
        weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * H + i, mask=mask, other=0.0).to(tl.float32)
        for source in tl.static_range(RANKS):
            if source != RANK:
                flag = flags_ptr + source * 2 * MOST + place
                _wait(flag, wanted, fault_ptr, told_ptr, 1 + RANK * 256 + source, looks)
        tl.debug_barrier()
        total = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(RANKS):
            if source == RANK:
                total += mine
            else:
                theirs = rows_ptr + (source * 2 * MOST + place) * H + i
                total += tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cv")
        total = total.to(total_ptr.dtype.element_ty).to(tl.float32) + residual
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * H + i, rounded, mask=mask)
        total = rounded.to(tl.float32)
        normed, _ = normalize(total, total, weight, weight, H, eps, total_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * H + i, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _push_kernel(
    x_ptr, there_ptr, arrived_ptr, num_rows, columns, stride_x, stride_there, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier_kernels(PDL)
    blocks = tl.cdiv(columns, BLOCK)
    for tile in range(tl.program_id(0), num_rows * blocks, tl.num_programs(0)):
        row = (tile // blocks).to(tl.int64)
        i = tile % blocks * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + row * stride_x + i, mask=i < columns)
        tl.store(there_ptr + row * stride_there + i, values, mask=i < columns)
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=["count", "code", "looks"])
def _await_kernel(
    arrived_ptr, expected_ptr, fault_ptr, told_ptr, count, code, looks, PDL: tl.constexpr
):  # fmt: skip
    after_earlier_kernels(PDL)
    wanted = tl.load(expected_ptr) + count
    _wait(arrived_ptr, wanted, fault_ptr, told_ptr, code, looks)
    tl.store(expected_ptr, wanted)


def exchange_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mailbox: Mailbox, index: int, out: tuple[Tensor, Tensor],
    *, base: Tensor | None = None, looks: int = LOOKS,
) -> None:  # fmt: skip
    """Launch one rank's side; out is (normed, total), both [R, H] as residual is.

    x: its product [R, H], or parts of it, fp32 [S, R, H]. index: of the exchange within a forward. base: in place of
    the mailbox's; one below all flags lets the kernel wait for nobody, which loads it. Every rank has to launch its own
    with nothing else in between. ValueError where arguments do not fit, on a CPU too: there is `_ref` for one.
    """
    num_rows, width, parts = _check(x, residual, weight, eps, mailbox, index, out)
    block = triton.next_power_of_2(width)
    halves = [(True, True)] if num_rows <= MOST_FUSED else [(True, False), (False, True)]
    with device_guard(x):
        for pushes, waits in halves:
            _exchange_kernel[(num_rows,)](
                parts, mailbox.rows, mailbox.flags, mailbox.row_addresses, mailbox.flag_addresses,
                mailbox.base if base is None else base, mailbox.fault, mailbox.told, residual, weight, *out, eps, index,
                looks, parts.stride(0), MOST=mailbox.rows.shape[2], RANK=mailbox.rank, RANKS=len(mailbox.rows), H=width,
                BLOCK=block, PARTS=len(parts), PUSH=pushes, WAIT=waits, num_warps=num_warps(block),
                enable_fp_fusion=False, **dependent_launch(x.device),
            )  # fmt: skip


def push(x: Tensor, there: Tensor, arrived: Tensor) -> int:
    """Copy x [R, C] to `there` [R, C], in a peer's memory, rows contiguous; then `arrived` [1] int64, there too, grows
    by what is returned."""
    num_rows, columns = tensor("x", x, "R C", None)
    tensor("there", there, "R C", (x.dtype,), (num_rows, columns), layout=BY_ROWS)
    tensor("arrived", arrived, "1", (torch.int64,), (1,), near=("there", there))
    programs = min(PUSH_PROGRAMS, num_rows * triton.cdiv(columns, PUSH_BLOCK))
    with device_guard(x):
        _push_kernel[(programs,)](
            x, there, arrived, num_rows, columns, x.stride(0), there.stride(0), BLOCK=PUSH_BLOCK, num_warps=8,
            **dependent_launch(x.device),
        )  # fmt: skip
    return programs


def await_pushes(
    arrived: Tensor, expected: Tensor, count: int, mailbox: Mailbox, source: int, *, looks: int = LOOKS
) -> None:
    """On this device, what comes next waits until `arrived` [1] has grown by `count` since the last time, which
    `expected` [1] knows. source: the rank that is named where it does not."""
    tensor("arrived", arrived, "1", (torch.int64,), (1,))
    tensor("expected", expected, "1", (torch.int64,), (1,), near=("arrived", arrived))
    with device_guard(arrived):
        _await_kernel[(1,)](
            arrived, expected, mailbox.fault, mailbox.told, whole("count", count, 1), waiting(mailbox.rank, source),
            looks, num_warps=1, **dependent_launch(arrived.device),
        )  # fmt: skip


def _check(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mailbox: Mailbox, index: int, out: tuple[Tensor, Tensor]
) -> tuple[int, int, Tensor]:
    """(R, H, parts [S, R, H])"""
    num_rows, width = tensor("residual", residual, "R H", FLOATS)
    near = ("residual", residual)
    if isinstance(x, Tensor) and x.dim() == 3:
        tensor("x", x, "S R H", FLOAT32, (None, num_rows, width), near=near)
    else:
        tensor("x", x, "R H", (residual.dtype,), (num_rows, width), near=near)
    tensor("weight", weight, "H", FLOATS, (width,), near=near)
    number("eps", eps, 0, HUGE)
    whole("index", index)
    for name, each in zip(("normed", "total"), out, strict=True):
        tensor(name, each, "R H", (residual.dtype,), (num_rows, width), near=near)
    ranks, _, most, _ = tensor("mailbox.rows", mailbox.rows, "n 2 M H", FLOAT32, (None, 2, None, width), near=near)
    tensor("mailbox.flags", mailbox.flags, "n 2 M", (torch.int64,), (ranks, 2, most), near=near)
    if num_rows > most or width > MOST_COLUMNS:
        raise ValueError(f"residual is {[num_rows, width]}; expected at most {[most, MOST_COLUMNS]}")
    _check_gpu("residual", residual)
    return num_rows, width, x if x.dim() == 3 else x[None]


def _check_gpu(name: str, x: Tensor) -> None:
    if not x.is_cuda:
        raise ValueError(f"{name} is on {x.device}; expected a GPU: elsewhere there is no peer to wait for")


def exchange_add_rms_norm_ref(
    parts: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(normed, total) from the products of all ranks, on one device; plain PyTorch."""
    total = own_sum_ref(parts[0], residual.dtype)
    for each in parts[1:]:
        total = total + own_sum_ref(each, residual.dtype)
    total = (total.to(residual.dtype) + residual).to(residual.dtype)
    return rms_norm_ref(total, weight, eps), total


def own_sum_ref(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a rank pushes: its product [R, H] in fp32 or wider, or the sum over parts [S, R, H]."""
    wide = x.to(torch.promote_types(dtype, torch.float32))
    if x.dim() == 2:
        return wide
    total = wide[0]
    for part in wide[1:]:
        total = total + part
    return total
