"""Benches of cut targets on a CPU: any shape over ranks, plain and packed, with a head; what exchanges cost."""

import argparse

import pytest
import torch

from eagle_fast import EaModel, TreeConfig
from eagle_fast.layers.links import Links
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.ranked import RankedTarget


@pytest.mark.parametrize("bits", [(None, None), (8, None), (4, None), (4, 8)])
def test_targets_over_ranks(bits, bench):
    shapes = bench("lib.shapes")
    target = shapes.build_cut_target("tiny", [torch.device("cpu")] * 2, *bits, torch.float32)
    model = EaModel(target, shapes.build_head(target), tree=TreeConfig(8, 2, 3), adaptive=False)
    ids = torch.randint(0, 131, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eagenerate(ids, max_new_tokens=8), model.naivegenerate(ids, max_new_tokens=8))
    held = sum(rank.num_bytes - rank.table_bytes for rank in cut_of(target).ranks)
    assert shapes.target_bytes(target) == held
    dense = shapes.build_target("tiny", "cpu", torch.float32)
    norms = sum(weight.nbytes for name, weight in dense.named_parameters() if "norm" in name)
    if bits == (None, None):
        rotary = sum(each.nbytes for each in dense.buffers())
        assert held == shapes.target_bytes(dense) - norms - rotary
    else:
        assert held < shapes.target_bytes(dense)


def test_exchanges_are_timed_by_leaving_them_out(bench, monkeypatch):
    exchange, shapes = bench("exchange"), bench("lib.shapes")
    cut = cut_of(model := shapes.build_cut_target("tiny", [torch.device("cpu")] * 2, dtype=torch.float32))
    target = RankedTarget(model, cut.ranks, cut.order)
    counted, sums = [], Links.add_rms_norm

    def counting(self, *args):
        counted[-1] += 1
        return sums(self, *args)

    def milliseconds(work, repeats, devices, links):
        counted.append(0)
        work()
        return 3.0 if len(counted) == 1 else 1.0

    monkeypatch.setattr(Links, "add_rms_norm", counting)
    monkeypatch.setattr(exchange, "milliseconds", milliseconds)
    row = exchange.measure(target, 5, argparse.Namespace(context=7, repeats=1))
    assert counted == [2 * 2, 0]
    assert (row["rows"], row["exchanges"], row["exchange_us"]) == (5, 4, 500.0)
    assert "add_rms_norm" not in vars(target.links)
