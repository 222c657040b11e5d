"""bench/tiles.py: which tiles are tried, that their products are right, and what of them has other bits."""

import argparse

import pytest
import torch
from eagle_fast_kernels.linear import Tile, weight_tile
from triton.runtime.errors import OutOfResources

ARGUMENTS = argparse.Namespace(rows=5, repeats=1)


@pytest.fixture
def tiles_bench(bench, monkeypatch):
    module = bench("tiles")
    small = {"COLD": 1, "BLOCKS": (32, 64), "COLUMNS": (64,), "WARPS": (4,), "STAGES": (3,), "SPLITS": (1, 2)}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_products_by_their_names(tiles_bench):
    assert tiles_bench.Product.read("4096x7168:parts") == (4096, 7168, "parts")
    assert tiles_bench.Product.read("128x64") == (128, 64, "whole")
    for wrong in ("128", "128x64:half", "ax64"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            tiles_bench.Product.read(wrong)


def test_tiles_divide_the_columns(tiles_bench, monkeypatch):
    monkeypatch.setattr(tiles_bench, "SPLITS", (1, 2, 3))
    taken = weight_tile(torch.empty(256, 384, dtype=torch.bfloat16), 5, split=True)
    found = list(tiles_bench.tiles(tiles_bench.Product(256, 384, "parts"), taken))
    assert found[0] == taken
    assert len(set(found)) == len(found)
    assert {tile.splits for tile in found} == {1, 3}, "not 2: the tile takes 128 columns a step"
    whole = list(tiles_bench.tiles(tiles_bench.Product(256, 384, "whole"), taken._replace(splits=1)))
    assert {tile.splits for tile in whole} == {1}


@pytest.mark.parametrize("how", ["whole", "parts", "gated"])
def test_every_tile_gives_the_product(tiles_bench, how, device):
    x, weight = (torch.randn(rows, 256, dtype=torch.bfloat16, device=device) for rows in (5, 128))
    expected = x.double() @ weight.double().T
    if how == "gated":
        gate, up = expected.bfloat16().double().chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    for tile in tiles_bench.tiles(tiles_bench.Product(128, 256, how), weight_tile(weight, 5, split=how == "parts")):
        found = tiles_bench.multiply(x, weight, tile, how).double()
        torch.testing.assert_close(found.sum(0) if how == "parts" else found, expected, rtol=2e-2, atol=0.2)


def test_times_are_sorted_and_what_does_not_fit_is_left_out(tiles_bench, monkeypatch, device):
    taken = weight_tile(torch.empty(128, 256, dtype=torch.bfloat16, device=device), 5, split=True)
    others = [taken._replace(splits=3 - taken.splits), taken._replace(num_stages=3), taken._replace(num_warps=8)]
    monkeypatch.setattr(tiles_bench, "tiles", lambda *_: [taken, *others])
    times = iter((2.0, 3.0, 1.0))

    def milliseconds(work, repeats):
        assert len(work()) == 2, "different weights in a row"
        return next(times)

    def multiply(x, weight, tile, how, real=tiles_bench.multiply):
        if tile.num_warps == 8:
            raise OutOfResources(2, 1, "shared memory")
        return real(x, weight, tile, how)

    monkeypatch.setattr(tiles_bench, "milliseconds", milliseconds)
    monkeypatch.setattr(tiles_bench, "multiply", multiply)
    rows = tiles_bench.measure(tiles_bench.Product(128, 256, "parts"), ARGUMENTS, 1e9, device)
    assert [(Tile(*row["tile"]), row["us"]) for row in rows] == [
        (taken, 1000.0),
        (others[1], 500.0),
        (others[0], 1500.0),
    ]
    assert rows[0]["same"]
    assert not rows[2]["same"], "other parts"
    assert rows[0]["share"] == pytest.approx(128 * 256 * 2 / 1e9 / 1e-3, abs=1e-3)
