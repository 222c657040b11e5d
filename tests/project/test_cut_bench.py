"""bench/lib/shapes.py on a CPU: targets of any shape over ranks, plain and packed, with a head."""

import importlib
from pathlib import Path

import pytest
import torch

from eagle_fast import EaModel, TreeConfig
from eagle_fast.target.rank_files import cut_of

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.mark.parametrize("bits", [(None, None), (8, None), (4, None), (4, 8)])
def test_targets_over_ranks(bits, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    shapes = importlib.import_module("lib.shapes")
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
