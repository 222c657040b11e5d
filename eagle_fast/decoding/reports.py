"""What rounds report to the host, on the way: the device goes on while the host reads.

B sequences, A most tokens that a round emits.

A round leaves its report, counts, emitted tokens and ranks, in one device tensor. Behind every round an asynchronous
copy takes it to pinned memory, into one slot of a ring, and an event marks its arrival. The host waits for the event of
the oldest slot alone, so newer rounds keep running meanwhile. All of it is ordered by the stream, and pinned memory is
not reused before the copies into it are done: a ring may be dropped with reports under way.
"""

from __future__ import annotations

import torch


class ReportRing:
    """The reports of up to `slots` rounds that were launched and not yet read, oldest first.

    report: of the largest round, on the device that emits; on a CPU a copy is there at once.
    """

    def __init__(self, report: torch.Tensor, slots: int):
        self.report = report
        self.slots = torch.empty(slots, report.numel(), dtype=report.dtype, device="cpu", pin_memory=report.is_cuda)
        self.filled: list[torch.Tensor] = [report] * slots  # what of each slot was sent, in its shape
        # with more rounds under way the host may sleep until it is woken, some 50 us late; else it spins
        self.arrived = [torch.cuda.Event(blocking=slots > 1) for _ in range(slots if report.is_cuda else 0)]
        self.num_sent = self.num_read = 0

    def __len__(self) -> int:
        """Reports under way."""
        return self.num_sent - self.num_read

    def send(self, report: torch.Tensor | None = None) -> None:
        """Copy the report of the round that was launched last, once it is there; by default that of the largest."""
        assert len(self) < len(self.slots), "every slot holds a report that was not read"
        report = self.report if report is None else report
        slot = self.num_sent % len(self.slots)
        self.filled[slot] = self.slots[slot, : report.numel()].view(report.shape)
        self.filled[slot].copy_(report, non_blocking=True)
        if self.arrived:
            self.arrived[slot].record(torch.cuda.current_stream(report.device))
        self.num_sent += 1

    def read(self) -> list:
        """Wait for the oldest report: its numbers, in lists of its shape."""
        assert len(self) > 0, "no report is under way"
        slot = self.num_read % len(self.slots)
        if self.arrived:
            self.arrived[slot].synchronize()
        self.num_read += 1
        return self.filled[slot].tolist()
