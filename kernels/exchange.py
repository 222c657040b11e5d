"""What ranks, one GPU each of one process, exchange through each other's memory, without the host and without NCCL.

n ranks, S parts, R rows, H hidden size.

    exchange_add_rms_norm   total = sum over ranks of x + residual, normed = rms(total), on every rank
    push, await_pushes      a tensor into a peer's memory; all that was pushed is there

Each rank adds up its own parts of a row in fp32 and stores the row into every peer's mailbox. A place where nothing has
arrived holds NOTHING, a NaN that no sum is: the peer reads its mailbox until no number of the row is NOTHING, which
costs no flag, no fence and no second way over the link, and puts NOTHING back. The rows of all ranks are added up in
rank order in fp32 and rounded as `add_rms_norm` rounds the parts of a product: all ranks end with the same bits, and a
row's bits do not depend on how many rows there are.

Exchanges take turns with two sets of rows. A rank pushes its next but one after all rows of the peer's next have come,
and the peer had pushed those after its earlier kernels had ended, those included that emptied the places.

Waits are bounded, by a number of looks (about a microsecond each). After one has run out, `fault` is raised, later ones
give up at their first look, and `told`, in the host's memory, says who waited for whom. Until then nothing may wait for
the host: all ranks' kernels are loaded, and all else is launched and allocated, before an exchange is launched.

Rows of a wide exchange (`MOST_FUSED`) are pushed by one launch and awaited by the next, so that no program waits for
one that has no room to run. What is no row (`push`) comes with a counter, which grows with system-scope release, is
read with acquire, and is never taken back: a replayed CUDA graph finds on its device what it was before.

Bytes: 60 rows of 4096 in fp32 are 1 MB each way, 3 us over NVLink; their way there is the rest.
Left out: more ranks than one host has; bf16 rows, which would round each rank's sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .check import BY_ROWS, FLOAT32, FLOATS, HUGE, number, tensor, whole
from .launch import device_guard
from .overlap import after_earlier_kernels, dependent_launch
from .rms_norm import MOST_COLUMNS, normalize, num_warps, rms_norm_ref, sum_parts

LOOKS = 4_000_000  # before a wait gives up
MOST_FUSED = 128  # rows that are pushed and awaited by one launch
PUSH_PROGRAMS, PUSH_BLOCK = 128, 8192
NOTHING = tl.constexpr(-1)  # the bits of a float where no number has arrived
NO_NUMBER = tl.constexpr(0x7FFFFFFF)  # those of a sum that would have the same


class Mailbox(NamedTuple):
    """What one rank finds of the others, and how it reaches them; `M` rows at most."""

    rank: int
    rows: Tensor  # [n, 2, M, H] int32, the bits of fp32 numbers, by who pushed them, in turns
    addresses: tuple[int, ...]  # of `rows` of all ranks
    fault: Tensor  # [1] int32, 1 after a wait that ran out
    told: Tensor  # [1] int64 in pinned memory of the host, `waited_for` of a wait that ran out

    def clear(self) -> None:
        """As if no rank had ever pushed anything."""
        self.rows.fill_(NOTHING.value)
        self.fault.zero_()
        self.told.zero_()


def waiting(rank: int, source: int) -> int:
    """What `told` is set to where `rank` waits for `source` in vain."""
    return 1 + rank * 256 + source


def waited_for(told: int) -> tuple[int, int]:
    """(rank, source) of `waiting`."""
    return divmod(told - 1, 256)


@triton.jit
def _give_up(fault_ptr, told_ptr, code):
    """Raise `fault`, and tell where no wait has run out before."""
    if tl.atomic_xchg(fault_ptr, 1, sem="relaxed", scope="gpu") == 0:
        tl.store(told_ptr, code)


@triton.jit
def _looks_left(fault_ptr, looks):
    """None where an earlier wait has run out. Read by one thread for all: an atomic."""
    return tl.where(tl.atomic_add(fault_ptr, 0, sem="relaxed", scope="gpu") == 0, looks, 0)


@triton.jit
def _wait(counter_ptr, wanted, fault_ptr, told_ptr, code, looks):
    """Until the counter is `wanted` or more, or looks run out. What decides is read by one thread for all: atomics."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
    if seen < wanted:
        left = _looks_left(fault_ptr, looks)
        while (seen < wanted) & (left > 0):
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
            left -= 1
        if seen < wanted:
            _give_up(fault_ptr, told_ptr, code)


@triton.jit
def _take_row(ptrs, mask, fault_ptr, told_ptr, code, looks):
    """The row that a peer pushes to these places, in fp32, which hold NOTHING then as before. No looks: whatever is
    there, at once."""
    bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
    if looks > 0:
        lacks = tl.max((bits == NOTHING).to(tl.int32), 0)
        if lacks > 0:
            left = _looks_left(fault_ptr, looks)
            while (lacks > 0) & (left > 0):
                bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
                lacks = tl.max((bits == NOTHING).to(tl.int32), 0)
                left -= 1
            if lacks > 0:
                _give_up(fault_ptr, told_ptr, code)
        tl.store(ptrs, tl.full(bits.shape, NOTHING, tl.int32), mask=mask)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["turn", "looks"])
def _exchange_kernel(
    x_ptr, rows_ptr, addresses, fault_ptr, told_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, eps, turn,
    looks, stride_s, MOST: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, PUSH: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < H
    place = turn * MOST + row  # among the rows of one source
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)  # which no kernel writes
    if PDL:
        gdc_wait()
    mine = sum_parts(x_ptr + row * H, i, mask, stride_s, PARTS, tl.float32)
    if PUSH:
        bits = mine.to(tl.int32, bitcast=True)
        bits = tl.where(bits == NOTHING, NO_NUMBER, bits)
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                address = addresses[peer].to(tl.int64)  # a low one comes as int32
                there = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
                tl.store(there + (RANK * 2 * MOST + place) * H + i, bits, mask=mask & (looks > 0))
    if WAIT:
        residual = tl.load(residual_ptr + row * H + i, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(RANKS):
            if source == RANK:
                total += mine
            else:
                here = rows_ptr + (source * 2 * MOST + place) * H + i
                total += _take_row(here, mask, fault_ptr, told_ptr, 1 + RANK * 256 + source, looks)
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
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mailbox: Mailbox, turn: int, out: tuple[Tensor, Tensor],
    *, looks: int = LOOKS,
) -> None:  # fmt: skip
    """Launch one rank's side; out is (normed, total), both [R, H] as residual is.

    x: its product [R, H], or parts of it, fp32 [S, R, H]. turn: 0 and 1 by turns. looks: 0 to exchange nothing and wait
    for nobody, which loads the kernel. Every rank has to launch its own with nothing else in between. ValueError where
    arguments do not fit, on a CPU too: there is `_ref` for one.
    """
    num_rows, width, parts = _check(x, residual, weight, eps, mailbox, turn, out)
    block = triton.next_power_of_2(width)
    halves = [(True, True)] if num_rows <= MOST_FUSED else [(True, False), (False, True)]
    with device_guard(x):
        for pushes, waits in halves:
            _exchange_kernel[(num_rows,)](
                parts, mailbox.rows, mailbox.addresses, mailbox.fault, mailbox.told, residual, weight, *out, eps, turn,
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
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mailbox: Mailbox, turn: int, out: tuple[Tensor, Tensor]
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
    whole("turn", turn, 0, 1)
    for name, each in zip(("normed", "total"), out, strict=True):
        tensor(name, each, "R H", (residual.dtype,), (num_rows, width), near=near)
    sizes = None, 2, None, width
    most = tensor("mailbox.rows", mailbox.rows, "n 2 M H", (torch.int32,), sizes, near=near)[2]
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
