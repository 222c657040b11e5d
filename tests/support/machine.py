"""GPUs that reach each other's memory, where there are none: the kernels of exchanges are played by a few lines each.

After `machine = played(monkeypatch)` ranks on the CPU may be linked as GPUs are, by `links_on(machine, ...)`. The
wrappers of kernels run as they are, with all that they check. What a kernel waits for may come later; a wait that the
host itself would keep from ending is an error, and so is a kernel that is compiled while another one waits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from eagle_fast_kernels import exchange, exchange_best
from eagle_fast_kernels.exchange import own_sum_ref, waiting
from eagle_fast_kernels.exchange_best import exchange_best_ref
from eagle_fast_kernels.rms_norm import rms_norm_ref
from torch import Tensor

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.layers.peer_links import PeerLinks
from eagle_fast.target import ranked

NOTHING = exchange.NOTHING.value


class Kernel:
    """What takes a kernel's place: `play` of its arguments by name, after Triton's rules say what is compiled anew."""

    def __init__(self, machine: Machine, jitted, play):
        self.machine, self.play, self.compiled = machine, play, set()
        self.names = list(inspect.signature(jitted.fn).parameters)
        interpreted = getattr(jitted, "kwargs", None)
        self.unspecialized = (
            {each.name for each in jitted.params if each.do_not_specialize}
            if interpreted is None
            else set(interpreted["do_not_specialize"])
        )

    def __getitem__(self, grid):
        return lambda *args, **options: self._launch(*grid, {**dict(zip(self.names, args, strict=False)), **options})

    def _launch(self, programs, given) -> None:
        key = tuple((name, self._kind(name, value)) for name, value in sorted(given.items()))
        if key not in self.compiled:
            assert not self.machine.waiting, "a kernel is loaded while another one waits"
            self.compiled.add(key)
        self.play(given, programs)

    def _kind(self, name: str, value):
        """What a kernel is compiled for, of one argument."""
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, float):
            return float
        if name.isupper() or not isinstance(value, int):
            return value
        kind = "int32" if -(2**31) <= value < 2**31 else "int64"
        return kind if name in self.unspecialized else (kind, value == 1, value % 16 == 0)


class Machine:
    """Kernels wait until what they wait for is there; a rank that waits may not be kept from it by the host."""

    def __init__(self):
        self.boxes, self.waiting, self.runs_out, self.synchronized = [], [], False, 0
        self.candidates = []

    def exchange(self, given, programs):
        if not given["looks"]:
            return
        rank, turn, x, residual = given["RANK"], given["turn"], given["x_ptr"], given["residual_ptr"]
        mailbox, dtype, rows = self.boxes[rank], residual.dtype, slice(len(residual))
        mine = own_sum_ref(x, dtype) if given["PARTS"] > 1 else own_sum_ref(x[0], dtype)
        if given["PUSH"]:
            for peer in self.boxes:
                if peer is not mailbox:
                    place = peer.rows[rank, turn, rows]
                    assert (place == NOTHING).all(), "rows are pushed over rows that are still to be read"
                    place.copy_(mine.view(torch.int32))
        if not given["WAIT"]:
            return
        others = [mailbox.rows[source, turn, rows] for source in range(len(self.boxes)) if source != rank]

        def finish():
            total = torch.zeros_like(residual, dtype=torch.float32)
            for source in range(len(self.boxes)):
                total += mine if source == rank else mailbox.rows[source, turn, rows].view(torch.float32)
            for each in others:
                each.fill_(NOTHING)
            given["total_ptr"].copy_(total.to(dtype) + residual)
            given["normed_ptr"].copy_(rms_norm_ref(given["total_ptr"], given["weight_ptr"], given["eps"]))

        self.launch(mailbox, lambda: all((each != NOTHING).all() for each in others), finish)

    def best(self, given, programs):
        if not given["looks"]:
            return
        rank, turn, mine = given["RANK"], given["turn"], [given[name] for name in ("y_ptr", "tokens_ptr", "sums_ptr")]
        own, k, rows = self.candidates[rank], mine[0].shape[1], slice(len(mine[0]))
        for peer in self.candidates:
            place = peer.words[rank, turn, rows, : k + 1]
            assert (place == NOTHING).all(), "words are pushed over words that are still to be read"
            place[:, :k] = (mine[0].view(torch.int32).long() << 32) | mine[1]
            place[:, k] = mine[2].view(torch.long)[:, 0]
        pushed = own.words[:, turn, rows, : k + 1]

        def finish():
            parts = []
            for words in pushed.unbind():
                sums = words[:, k:].clone().view(torch.float32)
                parts.append(((words[:, :k] >> 32).int().view(torch.float32), words[:, :k] & 0xFFFFFFFF, sums))
            for out, found in zip((given["scores_ptr"], given["best_ptr"]), exchange_best_ref(parts), strict=True):
                out.copy_(found)
            pushed.fill_(NOTHING)

        self.launch(self.boxes[rank], lambda: (pushed != NOTHING).all(), finish)

    def push(self, given, programs):
        given["there_ptr"].copy_(given["x_ptr"])
        given["arrived_ptr"].add_(programs)
        self.go_on()

    def await_pushes(self, given, programs):
        arrived, expected = given["arrived_ptr"], given["expected_ptr"]
        wanted = int(expected) + given["count"]
        (mailbox,) = [each for each in self.boxes if each.told is given["told_ptr"]]
        self.launch(mailbox, lambda: int(arrived) >= wanted, lambda: expected.fill_(wanted))

    def launch(self, mailbox, there, finish):
        self.waiting.append((mailbox, there, finish))
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
    for name, play in (("exchange", machine.exchange), ("push", machine.push), ("await", machine.await_pushes)):
        kernel = getattr(exchange, f"_{name}_kernel")
        monkeypatch.setattr(exchange, f"_{name}_kernel", Kernel(machine, kernel, play))
    monkeypatch.setattr(exchange_best, "_best_kernel", Kernel(machine, exchange_best._best_kernel, machine.best))
    for module in (exchange, exchange_best):
        monkeypatch.setattr(module, "_check_gpu", lambda *_: None)
    monkeypatch.setattr(peer_links, "check_peers", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    return machine


def links_on(machine: Machine, devices: Sequence[torch.device], width: int) -> PeerLinks:
    links = PeerLinks(devices, width)
    machine.boxes, machine.candidates = links.mailboxes, links.candidates
    return links


def linked(monkeypatch) -> Machine:
    """What plays the kernels of ranks that are made from now on."""
    machine = played(monkeypatch)
    made = lambda devices, width: links_on(machine, devices, width)  # noqa: E731
    monkeypatch.setattr(ranked, "links_between", made)
    return machine
