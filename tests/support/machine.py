"""GPUs that reach each other's memory, where there are none: the kernels of exchanges are played by a few lines each.

After `machine = played(monkeypatch)` ranks on the CPU may be linked as GPUs are, by `links_on(machine, ...)`. What a
kernel waits for may come later; a wait that the host itself would keep from ending is an error.
"""

from __future__ import annotations

import torch
from eagle_fast_kernels.exchange import own_sum_ref, waiting
from eagle_fast_kernels.rms_norm import rms_norm_ref

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.layers.peer_links import PeerLinks


class Machine:
    """Kernels wait until what they wait for is there; a rank that waits may not be kept from it by the host."""

    def __init__(self):
        self.boxes, self.waiting, self.loaded, self.runs_out, self.synchronized = [], [], set(), False, 0

    def exchange(self, x, residual, weight, eps, mailbox, index, out, base=None, looks=0):
        kernel = x.shape[:-2], residual.dtype
        assert kernel in self.loaded or base is not None, "a kernel is loaded while nobody waits"
        self.loaded.add(kernel)
        wanted, turn, rows = int(mailbox.base if base is None else base) + index + 1, index % 2, slice(len(residual))
        for peer in self.boxes:
            if peer is not mailbox:
                assert not self.reads(peer, turn, wanted), "rows are pushed over rows that are still to be read"
                peer.rows[mailbox.rank, turn, rows] = own_sum_ref(x, residual.dtype)
                peer.flags[mailbox.rank, turn, rows] = wanted

        def there():
            flags = [mailbox.flags[source, turn, rows] for source in range(len(self.boxes)) if source != mailbox.rank]
            return all(bool((each >= wanted).all()) for each in flags)

        def finish():
            total = torch.zeros_like(residual, dtype=torch.float32)
            for source in range(len(self.boxes)):
                mine = source == mailbox.rank
                total += own_sum_ref(x, residual.dtype) if mine else mailbox.rows[source, turn, rows]
            out[1].copy_(total.to(residual.dtype) + residual)
            out[0].copy_(rms_norm_ref(out[1], weight, eps))

        self.launch(mailbox, there, finish, (turn, wanted))

    def reads(self, mailbox, turn, wanted):
        """Whether a rank has yet to read rows of an earlier exchange in these turns."""
        return any(each[0] is mailbox and each[3][0] == turn and each[3][1] < wanted for each in self.waiting)

    def push(self, x, there, arrived):
        there.copy_(x)
        arrived += 3
        self.go_on()
        return 3

    def await_pushes(self, arrived, expected, count, mailbox, source, looks=0):
        wanted = int(expected) + count
        self.launch(mailbox, lambda: int(arrived) >= wanted, lambda: expected.fill_(wanted), (None, 0))

    def launch(self, mailbox, there, finish, reads):
        self.waiting.append((mailbox, there, finish, reads))
        self.go_on()

    def go_on(self):
        for each in list(self.waiting):
            if each[1]():
                self.waiting.remove(each)
                each[2]()

    def synchronize(self, device):
        self.synchronized += 1
        if self.runs_out:
            for mailbox, *_ in self.waiting:
                mailbox.fault.fill_(1)
                mailbox.told.fill_(waiting(mailbox.rank, 1 - mailbox.rank))
            self.waiting.clear()
        assert not self.waiting, "the host waits for a device whose rank waits for what the host has yet to launch"


def played(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(peer_links, "check_peers", lambda *_: None)
    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", machine.exchange)
    monkeypatch.setattr(peer_links, "push", machine.push)
    monkeypatch.setattr(peer_links, "await_pushes", machine.await_pushes)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    return machine


def links_on(machine: Machine, ranks: int, width: int) -> PeerLinks:
    links = PeerLinks([torch.device("cpu")] * ranks, width)
    machine.boxes = links.mailboxes
    return links
