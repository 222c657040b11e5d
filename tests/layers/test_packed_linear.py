"""PackedLinear: a layer like another, over a weight of few bits."""

import copy

import pytest
import torch
from eagle_fast_kernels.packed import pack
from packed_weights import KINDS, packed_case
from torch import nn

from eagle_fast.layers.packed import PackedLinear, merge_packed


def layer(name="int4, groups of 64", num_rows=12, columns=320, bias=True, seed=0, device="cpu"):
    packed, dense, _ = packed_case(name, num_rows, columns, seed=seed, device=device)
    bias = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)).to(device) if bias else None
    return PackedLinear.of(packed, bias), dense(torch.float32), bias


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_layer_of_the_dense_weight(name, device):
    linear, weight, bias = layer(name, device=device)
    for shape in ((1,), (2, 7), (40,)):
        x = torch.randn(*shape, 320, device=device)
        expected = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
        sums = linear.sums(x)
        torch.testing.assert_close(sums.sum(0) if sums.dim() > x.dim() else sums, expected, rtol=1e-4, atol=1e-4)
        gate, up = expected.chunk(2, -1)
        torch.testing.assert_close(linear.gated(x), nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear.dense(), weight)
    assert (linear.in_features, linear.out_features, linear.dtype) == (320, 12, torch.float32)
    assert linear.device.type == device.type
    assert linear.num_bytes == sum(each.nbytes for each in linear.buffers())


def test_copies_and_casts_keep_the_weight():
    linear, weight, _ = layer()
    other = copy.deepcopy(linear)
    assert other.words is not linear.words
    assert torch.equal(other.dense(), weight)
    scales = linear.scales.clone()
    linear.to(torch.float16)
    assert linear.dtype == linear.bias.dtype == torch.float16
    assert torch.equal(linear.scales, scales)
    assert linear.words.dtype == torch.int32
    x = torch.randn(3, 320).half()
    expected = nn.functional.linear(x.float(), linear.dense().float(), linear.bias.float())
    torch.testing.assert_close(linear(x).float(), expected, rtol=1e-3, atol=1e-3)
    assert not list(linear.parameters())
    again = layer(seed=1)[0]
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again.float().dense(), weight)


def test_layers_become_one():
    parts = [layer(num_rows=rows, seed=rows) for rows in (4, 6, 2)]
    merged = merge_packed([linear for linear, _, _ in parts])
    assert merged.out_features == 12
    assert torch.equal(merged.dense(), torch.cat([weight for _, weight, _ in parts]))
    assert torch.equal(merged.bias, torch.cat([bias for _, _, bias in parts]))


def test_layers_that_differ_do_not():
    first = layer()[0]
    for other in (layer("int4, groups of 32")[0], layer("int8, a scale a row")[0], layer(bias=False)[0]):
        assert merge_packed([first, other]) is None
    _, _, given = packed_case("int4, groups of 64", 12, 320)
    orders = [torch.randperm(320, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    ordered = [PackedLinear.of(pack(**given, kind="int4", order=order), first.bias) for order in orders]
    assert merge_packed(ordered[:2]) is not None
    assert merge_packed(ordered[1:]) is None
    assert merge_packed([first, ordered[0]]) is None


@pytest.mark.parametrize("name", KINDS)
def test_parts_of_rows_and_of_columns(name):
    linear, weight, bias = layer(name, columns=640)
    x = torch.randn(5, 640)
    expected = nn.functional.linear(x, weight, bias)
    rows = linear.cut([0, 4, 12], 0)
    torch.testing.assert_close(torch.cat([each(x) for each in rows], -1), expected, rtol=1e-4, atol=1e-4)
    first, second = linear.cut([0, 256, 640], 1)
    assert (first.in_features, second.in_features, second.bias) == (256, 384, None)
    torch.testing.assert_close(first(x[:, :256]) + second(x[:, 256:]), expected, rtol=1e-4, atol=1e-4)


def test_bounds_that_are_none_are_refused():
    linear = layer()[0]
    for bounds in ([0, 4], [4, 12], [0, 8, 4, 12], [0, 4, 4, 12], [0]):
        with pytest.raises(ValueError, match="from 0 to 12"):
            linear.cut(bounds, 0)
    with pytest.raises(ValueError, match="axis"):
        linear.cut([0, 12], 2)
    with pytest.raises(ValueError, match="groups of 64"):
        linear.cut([0, 32, 320], 1)
