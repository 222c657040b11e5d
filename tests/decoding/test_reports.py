"""The ring that takes what rounds emitted to the host: order, room, and no waiting for newer rounds."""

import pytest
import torch

from eagle_fast.decoding.reports import ReportRing


def rounds(ring, first, count):
    """Launch: round n reports n everywhere."""
    for number in range(first, first + count):
        ring.report.fill_(number)
        ring.send()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_reports_arrive_once_and_in_order(slots, device):
    ring = ReportRing(torch.zeros(2, 4, dtype=torch.long, device=device), slots)
    sent = read = 0
    for wanted in (1, slots, 0, slots, 1, 0, slots):  # under way after each turn: full, empty, wrapped around
        while len(ring) > wanted:
            assert ring.read() == [[read] * 4] * 2
            read += 1
        rounds(ring, sent, wanted - len(ring))
        sent = read + len(ring)
        assert len(ring) == wanted
    while len(ring):
        assert ring.read() == [[read] * 4] * 2
        read += 1
    assert read == sent


def test_a_ring_holds_no_more_than_its_slots(device):
    ring = ReportRing(torch.zeros(1, 2, dtype=torch.long, device=device), 2)
    with pytest.raises(AssertionError, match="no report"):
        ring.read()
    rounds(ring, 5, 2)
    with pytest.raises(AssertionError, match="every slot"):
        ring.send()
    assert [ring.read(), ring.read()] == [[[5, 5]], [[6, 6]]]


@pytest.mark.gpu
def test_reading_waits_for_no_newer_round():
    """The second round takes about a second, and neither reading nor sending waits for it."""
    ring = ReportRing(torch.zeros(1, 9, dtype=torch.long, device="cuda"), 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            ring.report.tolist()
        rounds(ring, 1, 1)
        torch.cuda._sleep(2_000_000_000)
        rounds(ring, 2, 1)
        assert ring.read() == [[1] * 9]
        assert not ring.arrived[1].query()
        assert ring.read() == [[2] * 9]
    finally:
        torch.cuda.set_sync_debug_mode("default")
