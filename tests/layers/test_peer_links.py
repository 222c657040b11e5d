"""What is launched where and in which order, on a machine without GPUs: the kernels are played by a few lines each."""

import pytest
import torch
from eagle_fast_kernels.exchange import waiting
from machine import NOTHING, links_on, played

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.layers.links import Links, OutOfStepError, Proposed
from eagle_fast.layers.peer_links import MOST_ROWS

WIDTH, EPS, CPU = 16, 1e-5, torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    return played(monkeypatch)


def case(ranks, rows, seed, parts=2):
    generator = torch.Generator().manual_seed(seed)
    products = [torch.randn(parts, rows, WIDTH, generator=generator) for _ in range(ranks)]
    residual = torch.randn(rows, WIDTH, generator=generator)
    return products, [residual.clone() for _ in range(ranks)], [torch.ones(WIDTH)] * ranks


def check_forward(links, ranks, rows, sites=4):
    """Some sums, as in a forward, are the reference's on all ranks."""
    reference = Links([CPU] * ranks)
    with links.forward():
        for site in range(sites):
            given = case(ranks, rows, site)
            for found, expected in zip(
                links.add_rms_norm(*given, EPS), reference.add_rms_norm(*given, EPS), strict=True
            ):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_of_forwards_of_many_sizes(machine, ranks):
    links = links_on(machine, [CPU] * ranks, WIDTH)
    for rows in (1, 60, 2 * MOST_ROWS + 7, 60, 1):
        check_forward(links, ranks, rows)
        assert all((each.rows == NOTHING).all() for each in links.mailboxes)


def proposals(ranks, rows, seed, k=4):
    """Of a vocabulary whose parts have 20 tokens each."""
    generator, found = torch.Generator().manual_seed(seed), []
    for rank in range(ranks):
        scores = torch.randn(rows, 20, generator=generator)
        peak, (best, places) = scores.amax(1, keepdim=True), scores.topk(k)
        sums = torch.cat([peak, (scores - peak).exp().sum(1, keepdim=True)], 1)
        found.append(Proposed(best, places + 20 * rank, sums))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_best_of_all_ranks_between_sums(machine, ranks):
    """As a tree is grown: bests in a row, one sum between them and two, of fewer rows and of more than fit."""
    links, reference = links_on(machine, [CPU] * ranks, WIDTH), Links([CPU] * ranks)
    for turn in range(3):
        with links.forward():
            for step, rows in enumerate((3, 1, 2 * MOST_ROWS + 7, 5, 5)):
                given = proposals(ranks, rows, 10 * turn + step)
                for found, expected in zip(links.best(given), reference.best(given), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                for _ in range(step // 2):
                    links.add_rms_norm(*case(ranks, 5, step), EPS)
        assert not machine.waiting
        if turn == 0:
            synchronized = machine.synchronized
    assert machine.synchronized == synchronized, "once all is loaded, nothing waits for a device"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_between_the_ranks_proposals(machine, monkeypatch, rank):
    links, given = links_on(machine, [CPU] * 2, WIDTH), proposals(2, 3, 0)
    calls, exchange_best = iter(range(100)), peer_links.exchange_best

    def propose():
        with links.forward():
            best = links.best(given)
            links.add_rms_norm(*case(2, 5, 0), EPS)
            return best

    def interrupted(*args, **options):
        if next(calls) == rank:
            raise KeyboardInterrupt
        exchange_best(*args, **options)

    expected = propose()
    with monkeypatch.context() as patch:
        patch.setattr(peer_links, "exchange_best", interrupted)
        with pytest.raises(KeyboardInterrupt):
            propose()
    assert links.broken
    machine.runs_out = True  # waits are bounded
    links.settle()
    machine.runs_out = False
    for found in propose():
        assert all(torch.equal(a, b) for a, b in zip(found, expected[0], strict=True))


def test_the_same_turn_twice_is_not_taken(machine):
    """A peer that is behind would get the second row before it has read the first."""
    links = links_on(machine, [CPU] * 2, WIDTH)
    check_forward(links, 2, 5, sites=3)
    with pytest.raises(AssertionError, match="may not have read"):
        check_forward(links, 2, 5)
    check_forward(links, 2, 5)


def test_after_the_first_no_forward_waits_for_a_device(machine):
    links = links_on(machine, [CPU] * 2, WIDTH)
    check_forward(links, 2, 60)
    before = machine.synchronized
    for rows in (60, 33):
        check_forward(links, 2, rows)
    assert machine.synchronized == before


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone_may_need_another_kernel(machine, rank):
    """Ranks whose parts of a product are uneven cut them into uneven numbers of parts: nothing is loaded too late."""
    links = links_on(machine, [CPU] * 2, WIDTH)
    reference = Links([CPU] * 2)
    for parts in (2, 3):
        products, residuals, weights = case(2, 5, parts)
        products[rank] = case(2, 5, parts, parts)[0][rank]
        with links.forward():
            for _ in range(2):
                found = links.add_rms_norm(products, residuals, weights, EPS)
        for mine, theirs in zip(found, reference.add_rms_norm(products, residuals, weights, EPS), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_between_the_ranks_launches(machine, monkeypatch, rank):
    links = links_on(machine, [CPU] * 2, WIDTH)
    check_forward(links, 2, 5)
    calls, exchange = iter(range(100)), peer_links.exchange_add_rms_norm

    def interrupted(*args, **options):
        if next(calls) == 2 + rank:  # of the second exchange
            raise KeyboardInterrupt
        exchange(*args, **options)

    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_forward(links, 2, 5)
    assert links.broken
    monkeypatch.setattr(peer_links, "exchange_add_rms_norm", exchange)
    machine.runs_out = True  # waits are bounded
    links.settle()
    machine.runs_out = False
    links.check()
    for _ in range(2):
        check_forward(links, 2, 5)


def test_a_wait_that_ran_out_is_told_with_names_and_then_over(machine):
    links = links_on(machine, [CPU] * 2, WIDTH)
    links.mailboxes[1].told.fill_(waiting(1, 0))
    with pytest.raises(OutOfStepError, match=r"rank 1 \(cpu\) waited in vain for rank 0 \(cpu\)"):
        links.check()
    check_forward(links, 2, 5)
    links.check()


def test_what_rank_0_sends_and_what_it_gathers(machine):
    links = links_on(machine, [CPU] * 3, WIDTH)
    for batch in (1, 3, 2, 9):
        tokens, depths = torch.arange(batch * 4).view(batch, 4), torch.arange(batch)
        for found in links.send("tree", tokens, depths):
            assert torch.equal(found[0], tokens)
            assert torch.equal(found[1], depths)
        columns = [torch.randn(batch, width) for width in (5, 4, 4)]
        assert torch.equal(links.gather("logits", columns), torch.cat(columns, 1))
    assert not machine.waiting


def test_what_arrives_stays_until_the_next_of_its_name(machine):
    links = links_on(machine, [CPU] * 2, WIDTH)
    (_, (tree,)), (_, (path,)) = links.send("tree", torch.arange(3)), links.send("path", torch.arange(3, 6))
    assert (tree.tolist(), path.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_an_interrupt_while_something_is_sent(machine, monkeypatch):
    links = links_on(machine, [CPU] * 2, WIDTH)
    links.send("tree", torch.arange(3))

    def interrupted(*_, **options):
        raise KeyboardInterrupt

    await_pushes = peer_links.await_pushes
    monkeypatch.setattr(peer_links, "await_pushes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        links.send("tree", torch.arange(3))
    monkeypatch.setattr(peer_links, "await_pushes", await_pushes)
    assert [each[0].tolist() for each in links.send("tree", torch.arange(4))] == [[0, 1, 2, 3]] * 2
