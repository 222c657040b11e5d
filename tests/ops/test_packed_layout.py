"""Packed weights and back: every code, scale and zero point at its column, parts and merges of them."""

import pytest
import torch
from eagle_fast_kernels.packed import pack, packed_gated, packed_matmul, packed_sums, unpack
from eagle_fast_kernels.packed_layout import codes_of, cut_columns, cut_rows, merge, step_columns
from packed_weights import KINDS, packed_case


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("columns", [64, 256, 320, 896])
def test_what_is_packed_comes_back(name, columns):
    packed, dense, given = packed_case(name, 10, columns)
    codes, scales, zeros = codes_of(packed)
    assert torch.equal(codes.view(torch.uint8), given["codes"].view(torch.uint8))
    assert torch.equal(scales, given["scales"])
    assert (zeros is None) == (given["zeros"] is None)
    assert zeros is None or torch.equal(zeros, given["zeros"])
    assert torch.equal(unpack(packed, torch.float32), dense(torch.float32))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(unpack(packed, dtype), dense(dtype))


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_words_hold_whole_steps_and_no_more(kind):
    step = step_columns(kind)
    for columns, steps in ((1, 1), (step, 1), (step + 1, 2)):
        codes = torch.zeros(3, columns, dtype=torch.uint8)
        codes = codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes
        packed = pack(codes, torch.ones(3, 1), kind=kind)
        assert packed.words.shape == (3, steps * 32)
        assert packed.num_bytes == 3 * steps * 128 + 12


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_dense_weight(name, device):
    packed, dense, _ = packed_case(name, 12, 320, device=device)
    bias = torch.randn(12, device=device)
    x = torch.randn(2, 5, 320, device=device)
    expected = x.double() @ dense(torch.float32).double().T + bias.double()
    torch.testing.assert_close(packed_matmul(x, packed, bias=bias).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed_sums(x, packed, bias=bias).double(), expected, rtol=1e-4, atol=1e-4)
    gate, up = expected.chunk(2, -1)
    gated = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(packed_gated(x, packed, bias=bias).double(), gated, rtol=1e-4, atol=1e-4)


def test_a_weight_with_an_order_multiplies_the_columns_that_it_names():
    packed, dense, given = packed_case("int4, groups of 32", 6, 64)
    order = torch.randperm(64)
    ordered = pack(given["codes"], given["scales"], kind="int4", order=order)
    weight = torch.empty(6, 64)
    weight[:, order] = dense(torch.float32)
    assert torch.equal(unpack(ordered, torch.float32), weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(packed_matmul(x, ordered), packed_matmul(x[:, order], packed))


@pytest.mark.parametrize("name", KINDS)
def test_parts_and_merges(name):
    packed, dense, _ = packed_case(name, 12, 640)
    weight = dense(torch.float32)
    parts = [cut_rows(packed, low, high) for low, high in ((0, 5), (5, 6), (6, 12))]
    assert [each.out_features for each in parts] == [5, 1, 6]
    assert torch.equal(torch.cat([unpack(each, torch.float32) for each in parts]), weight)
    again = merge(parts)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], packed[:2], strict=True))
    assert torch.equal(unpack(again, torch.float32), weight)
    parts = [cut_columns(packed, low, high) for low, high in ((0, 256), (256, 640))]
    assert torch.equal(torch.cat([unpack(each, torch.float32) for each in parts], 1), weight)


def test_parts_that_are_not_weights_are_refused():
    packed, _, given = packed_case("int4, groups of 64", 4, 128)
    with pytest.raises(ValueError, match="groups of 64"):
        cut_columns(packed, 0, 32)
    ordered = pack(given["codes"], given["scales"], kind="int4", order=torch.randperm(128))
    with pytest.raises(ValueError, match="act-order"):
        cut_columns(ordered, 0, 64)
    for other in (ordered, packed_case("int4, groups of 32", 4, 128)[0], packed_case("int4, zeros", 4, 128)[0]):
        with pytest.raises(ValueError, match="are not one weight"):
            merge([packed, other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int3"}, "kind"), ({"kind": "fp8"}, "codes"), ({"scales": torch.ones(4, 3)}, "group_size"),
        ({"scales": torch.ones(5, 2)}, "scales"), ({"group_size": 50}, "groups"), ({"group_size": 0}, "group_size"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, "zeros"), ({"order": torch.arange(3)}, "order"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"codes": torch.zeros(4, 128, dtype=torch.uint8), "scales": torch.ones(4, 2), "kind": "int4"}
    pack(**arguments)
    with pytest.raises(ValueError, match=message):
        pack(**{**arguments, **change})


def test_rows_that_do_not_fit_are_refused():
    packed, _, _ = packed_case("int4, groups of 64", 3, 128)
    with pytest.raises(ValueError, match="rows of 64"):
        packed_matmul(torch.zeros(2, 64), packed)
    with pytest.raises(ValueError, match="bias"):
        packed_matmul(torch.zeros(2, 128), packed, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="3 rows"):
        packed_gated(torch.zeros(2, 128), packed)
