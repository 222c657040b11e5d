"""What rounds report to the host, on the way: the device goes on while the host reads.

B sequences, A most tokens that a round emits.

A round leaves its report, counts and emitted tokens, in one device tensor [B, 1 + A]. Behind every round an
asynchronous copy takes it to pinned memory, into one slot of a ring, and an event marks its arrival. The host waits for
the event of the oldest slot alone, so newer rounds keep running meanwhile. All of it is ordered by the stream, and
pinned memory is not reused before the copies into it are done: a ring may be dropped with reports under way.
"""

from __future__ import annotations

import torch


class ReportRing:
    """The reports of up to `slots` rounds that were launched and not yet read, oldest first.

    report [B, 1 + A] int64, on the device that emits; on a CPU a copy is there at once.
    """

    def __init__(self, report: torch.Tensor, slots: int):
        self.report = report
        self.slots = torch.empty(slots, *report.shape, dtype=report.dtype, device="cpu", pin_memory=report.is_cuda)
        # with more rounds under way the host may sleep until it is woken, some 50 us late; else it spins
        self.arrived = [torch.cuda.Event(blocking=slots > 1) for _ in range(slots if report.is_cuda else 0)]
        self.num_sent = self.num_read = 0

    def __len__(self) -> int:
        """Reports under way."""
        return self.num_sent - self.num_read

    def send(self) -> None:
        """Copy the report of the round that was launched last, once it is there."""
        assert len(self) < len(self.slots), "every slot holds a report that was not read"
        slot = self.num_sent % len(self.slots)
        self.slots[slot].copy_(self.report, non_blocking=True)
        if self.arrived:
            self.arrived[slot].record(torch.cuda.current_stream(self.report.device))
        self.num_sent += 1

    def read(self) -> list[list[int]]:
        """Wait for the oldest report: for every sequence its count, then A tokens."""
        assert len(self) > 0, "no report is under way"
        slot = self.num_read % len(self.slots)
        if self.arrived:
            self.arrived[slot].synchronize()
        self.num_read += 1
        return self.slots[slot].tolist()
