"""What is launched where and in which order, on a machine without GPUs: the kernels are played by a few lines each."""

import pytest
import torch
from eagle_fast_kernels.exchange import own_sum_ref, waiting
from eagle_fast_kernels.rms_norm import rms_norm_ref

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.layers.links import Links, OutOfStepError
from eagle_fast.layers.peer_links import MOST_ROWS, PeerLinks

WIDTH, EPS = 16, 1e-5


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


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(peer_links, "check_peers", lambda *_: None)
    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", machine.exchange)
    monkeypatch.setattr(peer_links, "push", machine.push)
    monkeypatch.setattr(peer_links, "await_pushes", machine.await_pushes)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    return machine


def links_on(machine, ranks=2):
    links = PeerLinks([torch.device("cpu")] * ranks, WIDTH)
    machine.boxes = links.mailboxes
    return links


def case(ranks, rows, seed, parts=2):
    generator = torch.Generator().manual_seed(seed)
    products = [torch.randn(parts, rows, WIDTH, generator=generator) for _ in range(ranks)]
    residual = torch.randn(rows, WIDTH, generator=generator)
    return products, [residual.clone() for _ in range(ranks)], [torch.ones(WIDTH)] * ranks


def check_forward(links, ranks, rows, sites=4):
    """Some sums, as in a forward, are the reference's on all ranks."""
    reference = Links([torch.device("cpu")] * ranks)
    with links.forward():
        for site in range(sites):
            given = case(ranks, rows, site)
            for found, expected in zip(
                links.add_rms_norm(*given, EPS), reference.add_rms_norm(*given, EPS), strict=True
            ):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_of_forwards_of_many_sizes(machine, ranks):
    links = links_on(machine, ranks)
    for rows in (1, 60, 2 * MOST_ROWS + 7, 60, 1):
        check_forward(links, ranks, rows)
    assert [int(each.base) for each in links.mailboxes] == [4 * 4 + 4 * 3] * ranks


def test_an_odd_number_of_sums_leaves_the_turns_in_step(machine):
    links = links_on(machine)
    for _ in range(3):
        check_forward(links, 2, 5, sites=3)
    assert [int(each.base) for each in links.mailboxes] == [12, 12]


def test_after_the_first_no_forward_waits_for_a_device(machine):
    links = links_on(machine)
    check_forward(links, 2, 60)
    before = machine.synchronized
    for rows in (60, 33):
        check_forward(links, 2, rows)
    assert machine.synchronized == before


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_between_the_ranks_launches(machine, monkeypatch, rank):
    links = links_on(machine)
    check_forward(links, 2, 5)
    calls = iter(range(100))

    def interrupted(x, residual, weight, eps, mailbox, *more, **options):
        if next(calls) == 2 + rank:  # of the second exchange
            raise KeyboardInterrupt
        machine.exchange(x, residual, weight, eps, mailbox, *more, **options)

    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_forward(links, 2, 5)
    assert links.broken
    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", machine.exchange)
    machine.runs_out = True  # waits are bounded
    links.settle()
    machine.runs_out = False
    links.check()
    for _ in range(2):
        check_forward(links, 2, 5)


def test_a_wait_that_ran_out_is_told_with_names_and_then_over(machine):
    links = links_on(machine)
    links.mailboxes[1].told.fill_(waiting(1, 0))
    with pytest.raises(OutOfStepError, match=r"rank 1 \(cpu\) waited in vain for rank 0 \(cpu\)"):
        links.check()
    check_forward(links, 2, 5)
    links.check()


def test_what_rank_0_sends_and_what_it_gathers(machine):
    links = links_on(machine, 3)
    for batch in (1, 3, 2, 9):
        tokens, depths = torch.arange(batch * 4).view(batch, 4), torch.arange(batch)
        for found in links.send("tree", tokens, depths):
            assert torch.equal(found[0], tokens)
            assert torch.equal(found[1], depths)
        columns = [torch.randn(batch, width) for width in (5, 4, 4)]
        assert torch.equal(links.gather("logits", columns), torch.cat(columns, 1))
    assert not machine.waiting


def test_what_arrives_stays_until_the_next_of_its_name(machine):
    links = links_on(machine)
    (_, (tree,)), (_, (path,)) = links.send("tree", torch.arange(3)), links.send("path", torch.arange(3, 6))
    assert (tree.tolist(), path.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_an_interrupt_while_something_is_sent(machine, monkeypatch):
    links = links_on(machine)
    links.send("tree", torch.arange(3))

    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(peer_links, "await_pushes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        links.send("tree", torch.arange(3))
    monkeypatch.setattr(peer_links, "await_pushes", machine.await_pushes)
    assert [each[0].tolist() for each in links.send("tree", torch.arange(4))] == [[0, 1, 2, 3]] * 2
