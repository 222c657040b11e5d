"""`Links` between GPUs of one host, through each other's memory: see the kernels `exchange` and `exchange_best`.

n ranks, R rows, H hidden size, V vocabulary, k candidates of a row, M rows of a mailbox.

One thread launches for all ranks. Whatever may compile, allocate or wait for a device is done before an exchange is
launched, and then the exchange on all ranks with nothing in between: a rank never spins for one that is not on its way.
Where that is broken off, by an interrupt or for want of memory, the waits run out, and `settle` lets all begin anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import NamedTuple

import torch
from eagle_fast_kernels.exchange import (
    LOOKS,
    MOST_FUSED,
    Mailbox,
    await_pushes,
    exchange_add_rms_norm,
    push,
    waited_for,
)
from eagle_fast_kernels.exchange_best import WORDS, Candidates, exchange_best
from torch import Tensor

from eagle_fast.layers.links import Links, OutOfStepError, Proposed

MOST_ROWS = 2048  # M: more are exchanged in turns, which the host launches one by one


class Buffer(NamedTuple):
    """Where something arrives: it, and how much has arrived and was expected so far."""

    there: Tensor
    arrived: Tensor  # [1] int64
    expected: Tensor  # [1] int64

    @classmethod
    def empty(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> Buffer:
        counters = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        return cls(torch.empty(shape, dtype=dtype, device=device), *counters)


def check_peers(devices: Sequence[torch.device], name: str) -> None:
    """ValueError, with the pair, for GPUs that cannot reach each other's memory; those that can are let."""
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        raise ValueError(f"{name}: CUDA_LAUNCH_BLOCKING=1 lets the first GPU wait for the others for ever: unset it")
    for here, there in apart(devices):
        raise ValueError(
            f"{name}: {here} cannot reach the memory of {there} (no peer access, as on consumer cards and in some "
            "virtual machines): leave it out and spread layers, device_map='balanced'"
        )
    tensors = {device: torch.zeros(8, device=device) for device in devices}
    for here, there in permutations(devices, 2):
        tensors[there].copy_(tensors[here])  # the first copy opens the way
    for device in devices:
        torch.cuda.synchronize(device)


def apart(devices: Sequence[torch.device]) -> list[tuple[torch.device, torch.device]]:
    """Pairs of GPUs of which the first cannot reach the memory of the second."""
    return [pair for pair in permutations(devices, 2) if not torch.cuda.can_device_access_peer(*pair)]


class PeerLinks(Links):
    """Between distinct GPUs that reach each other's memory. looks: before a wait runs out."""

    @torch.inference_mode(False)  # counters are written in every mode
    def __init__(self, devices: Sequence[torch.device], hidden_size: int, looks: int = LOOKS):
        super().__init__(devices)
        check_peers(devices, f"tensor_parallel={[str(device) for device in devices]}")
        self.looks, self.turn = looks, 0
        self.taken: tuple[str, int] | None = None  # by the last exchange
        self.broken = self.inside = False  # an exchange was not launched on all ranks; one is being launched
        self.loaded: set[tuple] = set()  # kernels of exchanges
        self.buffers: dict[tuple, Buffer] = {}  # graphs go on using those that became too small
        size = len(self.devices), 2, MOST_ROWS
        rows = [torch.empty(*size, hidden_size, dtype=torch.int32, device=device) for device in self.devices]
        words = [torch.empty(*size, WORDS, dtype=torch.long, device=device) for device in self.devices]
        self.mailboxes = [
            Mailbox(
                rank, rows[rank], tuple(each.data_ptr() for each in rows),
                torch.empty(1, dtype=torch.int32, device=device),
                torch.empty(1, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda"),
            )
            for rank, device in enumerate(self.devices)
        ]  # fmt: skip
        self.candidates = [Candidates(each, tuple(other.data_ptr() for other in words)) for each in words]
        self._clear()

    # -- in a forward ----------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self) -> Iterator[None]:
        with self.whole():
            self.turn = 0  # also in every replay of a graph
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Where this block does not come to its end, the ranks are out of step."""
        if self.inside:
            yield
            return
        self.settle()
        self.inside = self.broken = True
        try:
            yield
            self.broken = False
        finally:
            self.inside = False

    def add_rms_norm(
        self, products: Sequence[Tensor], residuals: Sequence[Tensor], weights: Sequence[Tensor], eps: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        products = [each.contiguous() for each in products]
        outs = [residual.new_empty(2, *residual.shape).unbind() for residual in residuals]
        for first in range(0, len(residuals[0]), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            self._exchange(
                [each[..., rows, :].contiguous() for each in products], [each[rows] for each in residuals], weights,
                eps, [(normed[rows], total[rows]) for normed, total in outs],
            )  # fmt: skip
        return [normed for normed, _ in outs], [total for _, total in outs]

    def _exchange(self, products, residuals, weights, eps: float, outs) -> None:
        """Of up to MOST_ROWS rows."""
        arguments = list(zip(products, residuals, weights, self.mailboxes, strict=True))
        parts = tuple((each.shape[:-2], each.dtype) for each in products)  # uneven ranks may have uneven numbers
        size, dtypes = residuals[0].numel(), (residuals[0].dtype, weights[0].dtype)
        key = parts, dtypes, size % 16, len(residuals[0]) <= MOST_FUSED
        self._launch(key, exchange_add_rms_norm, [(*each[:3], eps, each[3]) for each in arguments], outs)

    def best(self, proposals: Sequence[Proposed]) -> list[tuple[Tensor, Tensor]]:
        outs = [(torch.empty_like(each.scores), torch.empty_like(each.tokens)) for each in proposals]
        for first in range(0, len(proposals[0].scores), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            given = zip(proposals, self.mailboxes, self.candidates, strict=True)
            arguments = [(*(part[rows] for part in each), *boxes) for each, *boxes in given]
            parts = [(scores[rows], tokens[rows]) for scores, tokens in outs]
            self._launch(("best", proposals[0].scores.shape[1]), exchange_best, arguments, parts)
        return outs

    def _launch(self, key: tuple, exchange: Callable[..., None], arguments: Sequence[tuple], outs: Sequence) -> None:
        """An exchange, on every rank with its arguments, after its kernel is loaded everywhere. key: of that kernel."""
        if key not in self.loaded:
            self._synchronize()
            for given, out in zip(arguments, outs, strict=True):
                exchange(*given, self.turn, out, looks=0)
            self._synchronize()
            self.loaded.add(key)
        taken = exchange.__name__, self.turn
        assert taken != self.taken, "a peer may not have read yet what it got in this turn"
        for given, out in zip(arguments, outs, strict=True):
            exchange(*given, self.turn, out, looks=self.looks)
        self.taken, self.turn = taken, 1 - self.turn

    # -- from and to rank 0 ----------------------------------------------------------------------------------------

    def send(self, name: str, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        sizes = [each.numel() for each in tensors]
        packed = torch.cat([each.reshape(-1) for each in tensors])[None]
        sent: list[tuple[Tensor, ...]] = [tensors]
        with self.whole():
            for mailbox in self.mailboxes[1:]:
                buffer = self._buffer(name, mailbox.rank, 1, sum(sizes), tensors[0].dtype)
                there = buffer.there[:, : sum(sizes)]
                count = push(packed, there, buffer.arrived)
                await_pushes(buffer.arrived, buffer.expected, count, mailbox, 0, looks=self.looks)
                parts = there[0].split(sizes)
                sent.append(tuple(part.view(each.shape) for part, each in zip(parts, tensors, strict=True)))
        return sent

    def gather(self, name: str, columns: Sequence[Tensor]) -> Tensor:
        num_rows, widths = len(columns[0]), [each.shape[1] for each in columns]
        with self.whole():
            whole = self._buffer(name, 0, num_rows, sum(widths), columns[0].dtype, by_rows=True).there[:num_rows]
            pushed, places = [], whole.split(widths, 1)
            for rank in range(1, len(columns)):
                buffer = self._buffer(f"{name} of {rank}", 0, 1, 1, torch.long)  # its counters
                pushed.append((rank, buffer, push(columns[rank].contiguous(), places[rank], buffer.arrived)))
            places[0].copy_(columns[0])
            for rank, buffer, count in pushed:
                await_pushes(
                    buffer.arrived, buffer.expected, count, self.mailboxes[0], rank, looks=self.looks
                )  # fmt: skip
        return whole

    @torch.inference_mode(False)
    def _buffer(
        self, name: str, rank: int, rows: int, columns: int, dtype: torch.dtype, *, by_rows: bool = False
    ) -> Buffer:
        """At least [rows, columns], on a rank: columns rounded up, or with `by_rows` the rows."""
        size = (_rounded(rows), columns) if by_rows else (rows, _rounded(columns))
        key = name, rank, size, dtype
        if key not in self.buffers:
            self.buffers[key] = Buffer.empty(*size, dtype=dtype, device=self.devices[rank])
            self._synchronize()  # the counters are zero before a peer adds to them
        return self.buffers[key]

    # -- when it went wrong ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        if not self.broken:
            return
        self._synchronize()
        self._clear()
        self.taken, self.broken = None, False

    def _clear(self) -> None:
        """As if nothing had ever been exchanged."""
        for each in (*self.mailboxes, *self.candidates):
            each.clear()
        for buffer in self.buffers.values():
            buffer.arrived.zero_()
            buffer.expected.zero_()
        self._synchronize()

    def check(self) -> None:
        told = [int(mailbox.told) for mailbox in self.mailboxes]
        if any(told):
            self.broken = True
            rank, source = waited_for(next(each for each in told if each))
            raise OutOfStepError(
                f"rank {rank} ({self.devices[rank]}) waited in vain for rank {source} ({self.devices[source]}): did an "
                "interrupt, another program or a debugger hold that GPU up? The call's tokens are lost; call again"
            )

    def _synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


def _rounded(count: int) -> int:
    return 1 << math.ceil(math.log2(count))
