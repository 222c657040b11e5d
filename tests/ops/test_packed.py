"""Products with packed weights: those of the dense weight, whatever the kind and number of rows; bits on a GPU."""

import pytest
import torch
from eagle_fast_kernels.packed import pack, packed_gated, packed_matmul, packed_sums, packed_tile, part_bounds, unpack
from packed_weights import KINDS, packed_case

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(out, exact, dtype, inner):
    """Within the rounding of the result and of fp32 sums of numbers about 1."""
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert out.shape == exact.shape
    sums = 4 * torch.finfo(torch.float32).eps * (inner / 16 + 8)
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=max(eps / 64, sums))


def gated(z):
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rows_and_product(shape, packed, weight, dtype, device, *, per_row):
    """(x, bias, their product with the weight in fp64)"""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(*shape, packed.in_features, generator=generator, device=device).to(dtype)
    bias = torch.randn(packed.out_features, generator=generator, device=device).to(dtype)
    wide = weight(torch.float32 if per_row else dtype).double()
    return x, bias, x.double() @ wide.T + bias.double()


def check_products(x, packed, bias, exact, dtype):
    check(packed_matmul(x, packed, bias=bias), exact, dtype, packed.in_features)
    sums = packed_sums(x, packed, bias=bias)
    assert sums.shape == (packed_tile(packed, 1, split=True).splits, *exact.shape)
    check(sums.sum(0), exact, torch.float32, packed.in_features)
    out = packed_gated(x, packed, bias=bias)
    check(out, gated(packed_matmul(x, packed, bias=bias).double()), dtype, packed.in_features)


# a part of a step, whole steps, several parts; rows of the weight that are no whole tile
@pytest.mark.parametrize(("shape", "num_rows", "columns"), [((3,), 34, 64), ((1,), 64, 512), ((2, 9), 20, 1120)])
@pytest.mark.parametrize("name", KINDS)
@HALVES
@pytest.mark.usefixtures("triton_kernels")
def test_kernel(shape, num_rows, columns, name, dtype, device):
    packed, weight, _ = packed_case(name, num_rows, columns, device=device)
    x, bias, exact = rows_and_product(shape, packed, weight, dtype, device, per_row=len(packed.scales) == 1)
    if len(packed.scales) == 1 and packed.zeros is not None:  # a factor of the weight, in x's dtype
        exact = x.double() @ weight(dtype).double().T + bias.double()
    check_products(x, packed, bias, exact, dtype)
    assert (len(part_bounds(packed)) > 2) == (columns >= 512 and len(packed.words[0]) >= 128)


@HALVES
@pytest.mark.usefixtures("triton_kernels")
def test_kernel_takes_columns_in_the_order_of_the_weight(dtype, device):
    packed, weight, given = packed_case("int4, groups of 64", 20, 320, device=device)
    order = torch.randperm(320).to(device)
    ordered = pack(**given, kind="int4", order=order)
    x = torch.randn(5, 320, device=device).to(dtype)
    assert torch.equal(packed_matmul(x, ordered), packed_matmul(x[:, order], packed))
    check(packed_matmul(x, ordered), x[:, order].double() @ weight(dtype).double().T, dtype, 320)


@pytest.mark.usefixtures("triton_kernels")
def test_scales_that_a_file_has_in_another_dtype_are_rounded_first(device):
    for kept in (torch.float16, torch.float32):
        packed, _, _ = packed_case("int4, groups of 64", 20, 320, dtype=kept, device=device)
        x = torch.eye(320, device=device)[:40].bfloat16()
        assert torch.equal(packed_matmul(x, packed), unpack(packed, torch.bfloat16)[:, :40].T)


@pytest.mark.parametrize("name", KINDS)
@HALVES
@pytest.mark.usefixtures("triton_kernels")
def test_every_code_becomes_its_number(name, dtype, device):
    """One column after the other of a weight that holds all codes, at every place of a step."""
    packed, _, given = packed_case(name, 256, 64, device=device)
    codes = (torch.arange(256)[:, None] + 3 * torch.arange(64)[None, :]) % (16 if packed.kind == "int4" else 256)
    codes = codes.to(torch.uint8).to(device)
    if packed.kind == "fp8":
        codes[codes & 127 == 127] = 1
        codes = codes.view(torch.float8_e4m3fn)
    packed = pack(**{**given, "codes": codes}, kind=packed.kind, group_size=packed.group_size)
    x = torch.eye(64, device=device).to(dtype)
    expected = unpack(packed, dtype).float()
    if len(packed.scales) == 1 and packed.zeros is None:
        ones = packed._replace(scales=torch.ones_like(packed.scales))
        expected = unpack(ones, torch.float32) * packed.scales.T
    assert torch.equal(packed_sums(x, packed)[0], expected.T)
