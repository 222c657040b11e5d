"""Products of a few rows: the same as x @ weight.T whatever the number of rows, and on a GPU bit for bit."""

import pytest
import torch
from eagle_fast_kernels import linear
from eagle_fast_kernels.launch import Resources
from eagle_fast_kernels.linear import (
    few_rows_matmul,
    few_rows_sums,
    gated_matmul,
    kernel_product,
    part_bounds,
    streams,
    weight_tile,
)
from eagle_fast_kernels.many_rows import (
    EITHER,
    PARTS,
    TINY,
    WHOLE,
    Shape,
    Way,
    cancel,
    exact_way,
    first_exact,
    row_invariant_gated,
    row_invariant_matmul,
    row_invariant_sums,
    trial,
)
from eagle_fast_kernels.rms_norm import sum_parts_ref
from orders import sum_in_order
from torch import nn

from eagle_fast.layers.linear import FewRowsLinear, QuantizedLinear, is_plain, quantize, use_few_rows_linear


# one row, fewer than a step, whole steps, the last count that takes the fast way, and past it
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (8,), (3, 5), (32,), (33,), (2, 2, 9)])
def test_few_rows(shape, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 48, generator=generator).to(device)
    weight = torch.randn(100, 48, generator=generator).to(device)
    out = few_rows_matmul(x, weight)
    assert out.shape == (*shape, 100)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def case(shape, num_columns, inner, dtype, device, *, int8=False, bias=False):
    """(x, weight, what else the product takes, x and weight in fp64 with the scale multiplied in)."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(*shape, inner, generator=generator, device=device).to(dtype)
    weight = (torch.randn(num_columns, inner, generator=generator, device=device) * inner**-0.5).to(dtype)
    wide, more = weight.double(), {}
    if int8:
        weight, more["scale"] = quantize(weight)
        wide = weight.double() * more["scale"].double()[:, None]
    if bias:
        more["bias"] = torch.randn(num_columns, generator=generator, device=device).to(dtype)
    return x, weight, more, x.double() @ wide.T + (more["bias"].double() if bias else 0)


def gated(z):
    gate, up = z.chunk(2, -1)
    return nn.functional.silu(gate) * up


def check_gated(x, weight, more, dtype, inner):
    """gated_matmul is the gate of the product's rounded halves."""
    check(gated_matmul(x, weight, **more), gated(few_rows_matmul(x, weight, **more).double()), dtype, inner)


def check(out, exact, dtype, inner):
    """Within the rounding of the result and of fp32 sums of numbers about 1, which are cut off every 16 products."""
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert out.shape == exact.shape
    sums = 4 * torch.finfo(torch.float32).eps * (inner / 16 + 8)
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=max(eps / 64, sums))


# steps of K that divide and that do not, a weight that is not a whole number of tiles, one row, a batch, many splits
@pytest.mark.parametrize(
    ("shape", "num_columns", "inner"), [((3,), 100, 64), ((1,), 64, 90), ((2, 2), 34, 1024), ((17,), 130, 33)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.usefixtures("triton_kernels")
def test_kernel(shape, num_columns, inner, dtype, int8, device):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 goes to cuBLAS")
    x, weight, more, exact = case(shape, num_columns, inner, dtype, device, int8=int8, bias=True)
    check(few_rows_matmul(x, weight, **more), exact, dtype, inner)
    sums = few_rows_sums(x, weight, **more)
    splits = weight_tile(weight, x[..., 0].numel(), split=True).splits
    assert sums.shape == (splits, *exact.shape)
    assert (splits > 1) == (inner >= 1024)
    check(sums.sum(0), exact, torch.float32, inner)
    check_gated(x, weight, more, dtype, inner)


@pytest.mark.usefixtures("triton_kernels")
def test_rows_of_any_stride_and_weights_of_any_alignment(device):
    x, weight, _, exact = case((5,), 66, 64, torch.float16, device)
    spread = torch.full((5, 75), float("nan"), device=device, dtype=torch.float16)
    spread[:, 3:67] = x
    inside = torch.full((66, 71), float("nan"), device=device, dtype=torch.float16)
    inside[:, 5:69] = weight
    check(few_rows_matmul(spread[:, 3:67], inside[:, 5:69]), exact, torch.float16, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_columns", "inner"),
    [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (3072, 2048), (10240, 5120), (960, 576),
     (576, 1536), (49152, 576), (200, 72)],
)  # fmt: skip
def test_a_row_does_not_depend_on_the_others(num_columns, inner, dtype):
    x, weight, _, exact = case((60,), num_columns, inner, dtype, "cuda")
    gate = gated(few_rows_matmul(x, weight).double())
    products = (few_rows_matmul, exact), (few_rows_sums, exact), (gated_matmul, gate)
    for product, reference in products:
        out = product(x, weight)
        check(out.sum(0) if product is few_rows_sums else out, reference, out.dtype, inner)
        check_rows(product, x, weight)
    cancel(x, weight, torch.Generator("cuda").manual_seed(7))
    for product, _ in products:
        check_rows(product, x, weight)


def check_rows(product, x, weight):
    """Rows alone, in other company, and beside rows that are not numbers."""
    out = product(x, weight)
    for rows in ([7], range(10), range(33, 60)):
        alone = product(x[list(rows)], weight)
        assert torch.equal(alone, out[..., list(rows), :]), (product.__name__, rows)
    poisoned = x.clone()
    poisoned[1:] = float("nan")
    assert torch.equal(product(poisoned, weight)[..., 0, :], out[..., 0, :])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 10, 16, 30, 60, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_columns", "inner"), [(6144, 8192), (4096, 4096), (28672, 4096), (4096, 14336), (960, 1152)]
)
def test_int8_weights(num_columns, inner, dtype, num_rows):
    x, weight, more, exact = case((num_rows,), num_columns, inner, dtype, "cuda", int8=True)
    check(few_rows_matmul(x, weight, **more), exact, dtype, inner)
    check(few_rows_sums(x, weight, **more).sum(0), exact, torch.float32, inner)
    check_gated(x, weight, more, dtype, inner)


# whole tiles of rows and a ragged one
@pytest.mark.parametrize("num_rows", [80, 256])
@pytest.mark.usefixtures("triton_kernels")
def test_int8_weights_of_more_rows(num_rows, device):
    x, weight, more, exact = case((num_rows,), 34, 64, torch.float16, device, int8=True, bias=True)
    assert streams(x, weight)
    assert not streams(x, weight.half())
    check(few_rows_matmul(x, weight, **more), exact, torch.float16, 64)
    check(few_rows_sums(x, weight, **more).sum(0), exact, torch.float32, 64)
    check_gated(x, weight, more, torch.float16, 64)


# whole tiles of rows, a ragged one, and more than one
@pytest.mark.parametrize("num_rows", [65, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("triton_kernels")
def test_more_rows_of_wide_and_narrow_weights(dtype, num_rows, monkeypatch, device):
    """By the kernel, on a GPU with the bits of few rows. What is gated takes it by itself where the weight is wide."""
    monkeypatch.setattr(linear, "resources", lambda device: Resources(2, 232448))
    for num_columns, wide in ((330, True), (130, False)):
        x, weight, more, exact = case((num_rows,), num_columns, 192, dtype, device, bias=True)
        assert not streams(x, weight)
        assert streams(x, weight, gated=True) == (wide and num_rows <= 128)

        def products(rows, weight=weight, bias=more["bias"]):
            found = [added_up(kernel_product(rows, weight, None, bias, split=split), dtype) for split in (False, True)]
            return [*found, gated_matmul(rows, weight, bias=bias)]

        many = products(x)
        whole = many[0] if streams(x, weight, gated=True) else few_rows_matmul(x, weight, **more)
        for product, reference in zip(many, (exact, exact, gated(whole.double())), strict=True):
            check(product, reference, dtype, 192)
        if device.type == "cuda":
            few = [products(part) for part in x.split(50)]
            same = [torch.equal(one, torch.cat(parts)) for one, parts in zip(many, zip(*few, strict=True), strict=True)]
            assert all(same[:2])
            assert same[2] or not streams(x, weight, gated=True)


@pytest.mark.gpu
def test_every_int8_number_becomes_its_bf16():
    values = torch.arange(-128, 128, device="cuda")
    weight = torch.full((256, 64), 77, dtype=torch.int8, device="cuda")
    weight[:, 4:8] = torch.stack([values, -1 - values, values.roll(99), values.roll(-99)], 1)
    x = torch.eye(64, dtype=torch.bfloat16, device="cuda")[4:8]
    product = few_rows_matmul(x, weight, scale=torch.ones(256, device="cuda"))
    assert torch.equal(product, weight[:, 4:8].T.bfloat16())


def added_up(product, dtype):
    """What the kernels that read parts make of them."""
    return product if product.dtype == dtype else sum_parts_ref(product, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [65, 96, 128, 240, 480, 1920])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("num_columns", "inner"),
    [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (3072, 2048), (960, 576), (576, 1536), (200, 72)],
)
def test_more_rows_have_the_bits_of_few(num_columns, inner, bias, dtype, num_rows):
    x, weight, more, _ = case((num_rows,), num_columns, inner, dtype, "cuda", bias=bias)
    pairs = (
        (row_invariant_matmul, few_rows_matmul), (row_invariant_sums, few_rows_sums),
        (row_invariant_gated, gated_matmul),
    )  # fmt: skip
    for terms in ("random", "cancelling"):
        if terms == "cancelling":
            cancel(x, weight, torch.Generator("cuda").manual_seed(7))
            more = {name: each * TINY for name, each in more.items()}
        for many, few in pairs:
            expected = torch.cat([added_up(few(part, weight, **more), dtype) for part in x.split(60)])
            assert torch.equal(added_up(many(x, weight, more.get("bias")), dtype), expected), (many.__name__, terms)
        before = torch.cat([sum_parts_ref(few_rows_sums(part, weight, **more), torch.float32) for part in x.split(60)])
        sums = sum_parts_ref(row_invariant_sums(x, weight, more.get("bias"), rounded=False), torch.float32)
        assert torch.equal(sums, before), "before they are rounded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_trial_tells_orders_of_additions_apart(biased, dtype):
    x, weight, bias = trial(Shape(torch.device("cpu"), dtype, 64, 64, 329, biased, ()))
    one, other = (sum_in_order(x, weight, parts) + (0 if bias is None else bias.float()) for parts in (1, 2))
    assert (one.to(dtype) != other.to(dtype)).float().mean() > 0.2


@pytest.mark.gpu
def test_more_rows_than_torch_has_the_order_for_take_the_kernel(monkeypatch):
    """A weight of odd alignment, and one that no call of torch's has the bits of."""
    x, weight, _, _ = case((100,), 4096, 4096, torch.bfloat16, "cuda")
    inside = torch.empty(4096, 4100, device="cuda", dtype=torch.bfloat16)
    inside[:, 1:4097] = weight
    expected = torch.cat([few_rows_matmul(part, weight) for part in x.split(50)])
    assert torch.equal(row_invariant_matmul(x, inside[:, 1:4097]), expected)
    monkeypatch.setattr("eagle_fast_kernels.many_rows.exact_way", lambda shape, split: None)
    assert torch.equal(row_invariant_matmul(x, weight), expected)


def test_the_first_way_with_the_bits_of_the_kernel_is_taken():
    """Parts count where they are asked for, and their sum, rounded, in the product's place."""
    parts = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(0))
    whole = sum_parts_ref(parts, torch.bfloat16)
    for forms, expected, right, found in (
        (WHOLE, whole, Way(128, False), Way(128, False)),
        (EITHER, parts, Way(70, True), Way(70, True)),
        (EITHER, parts, Way(256, False), Way(256, False)),
        (PARTS, parts, Way(128, True), Way(128, True)),
        (PARTS, parts, Way(70, False), None),
    ):

        def product(way, right=right):
            out = parts if way.by_part else whole
            return out if way == right else out + 1

        assert first_exact(expected, 70, torch.bfloat16, forms, product) == found


def test_parts_cover_the_columns(device):
    for num_columns, inner in ((4096, 4096), (576, 1536), (34, 1024), (130, 33)):
        bounds = part_bounds(torch.empty(num_columns, inner, dtype=torch.bfloat16, device=device))
        assert (bounds[0], bounds[-1]) == (0, inner)
        assert bounds == sorted(set(bounds))


def test_few_rows_and_a_cpu_take_what_they_took(device):
    x, weight, more, _ = case((5,), 64, 32, torch.float32, device, bias=True)
    assert torch.equal(row_invariant_matmul(x, weight, more["bias"]), few_rows_matmul(x, weight, **more))
    assert torch.equal(row_invariant_gated(x, weight, more["bias"]), gated_matmul(x, weight, **more))
    assert torch.equal(row_invariant_sums(x, weight, more["bias"]), few_rows_sums(x, weight, **more))
    assert exact_way.cache_info().currsize == 0 or device.type == "cuda"


@pytest.mark.gpu
def test_more_rows_and_fp32_are_torchs():
    for rows, dtype in ((65, torch.bfloat16), (60, torch.float32)):
        x, weight, more, exact = case((rows,), 256, 512, dtype, "cuda", bias=True)
        assert torch.equal(few_rows_sums(x, weight, **more), nn.functional.linear(x, weight, more["bias"]))
        check(few_rows_matmul(x, weight, **more), exact, dtype, 512)


# ordinary weights, a row of zeros, an outlier, the largest and smallest of each dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantization_error(dtype):
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1] = 0
    weight[2, 7] = 1000
    weight[3] *= torch.finfo(dtype).max / 16
    weight[4] *= torch.finfo(dtype).tiny
    quantized, scale = quantize(weight)
    assert quantized.dtype == torch.int8
    assert quantized.abs().amax(1).tolist() == [127, 0, 127, 127, 127, 127]
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    largest = weight.double().abs().amax(1, keepdim=True)
    assert (error <= largest / 254 * (1 + 2**-15)).all()


def test_quantized_linear_computes_with_its_weights(device):
    linear = FewRowsLinear(64, 48).to(device)
    quantized = QuantizedLinear(linear)
    weight = quantized.weight.float() * quantized.scale[:, None]
    for rows in (3, 100):
        x = torch.randn(2, rows, 64, device=device)
        torch.testing.assert_close(quantized(x), nn.functional.linear(x, weight, linear.bias))
        torch.testing.assert_close(quantized.gated(x), gated(quantized(x)))


def test_model_is_swapped_but_shares_its_weights():
    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(Quantized(4, 4), nn.Linear(4, 3, bias=False)))
    x = torch.randn(5, 8)
    expected = model(x)
    first = model[0]
    use_few_rows_linear(model)
    assert type(model[0]) is type(model[1][1]) is FewRowsLinear
    assert type(model[1][0]) is Quantized
    assert type(first) is nn.Linear
    assert model[0].weight is first.weight
    torch.testing.assert_close(model(x), expected)


def test_what_kernels_cannot_read_is_left_alone():
    """torchao keeps nn.Linear and puts a tensor of its own in; others give a module a forward of its own."""

    class Packed(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Packed), requires_grad=False)
    model[2].forward = lambda x: x
    assert [is_plain(each) for each in model] == [True, False, False]
    use_few_rows_linear(model)
    assert [type(each) for each in model] == [FewRowsLinear, nn.Linear, nn.Linear]


def test_gradients():
    x = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.double, requires_grad=True)
    for product in (few_rows_matmul, few_rows_sums, gated_matmul):
        assert torch.autograd.gradcheck(product, (x, weight))


@pytest.mark.parametrize("bias", [True, False])
def test_parts_of_rows_and_of_columns(bias, device):
    weight, x = torch.randn(12, 80, device=device), torch.randn(5, 80, device=device)
    linear = FewRowsLinear.of(weight, torch.randn(12, device=device) if bias else None)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    rows = linear.cut([0, 3, 4, 12], 0)
    assert [each.out_features for each in rows] == [3, 1, 8]
    torch.testing.assert_close(torch.cat([each(x) for each in rows], -1), expected, rtol=1e-5, atol=1e-5)
    first, second = linear.cut([0, 33, 80], 1)
    assert (first.in_features, second.in_features, second.bias) == (33, 47, None)
    torch.testing.assert_close(first(x[:, :33]) + second(x[:, 33:]), expected, rtol=1e-5, atol=1e-5)
    for part in (*rows, first, second):  # a GPU's kernels read whole rows, and the whole may go
        assert part.weight.is_contiguous()
        assert part.weight.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        assert not part.weight.requires_grad


def test_halves_of_an_mlp_add_up(device):
    """As two GPUs share it: rows of gate and of up, the columns of down that read them."""
    gate, up, down = (torch.randn(*size, device=device) for size in ((48, 20), (48, 20), (20, 48)))
    x = torch.randn(3, 20, device=device)
    expected = gated(torch.cat([x @ gate.T, x @ up.T], -1)) @ down.T
    bounds = [0, 16, 48]
    gates, ups = (FewRowsLinear.of(each).cut(bounds, 0) for each in (gate, up))
    downs = FewRowsLinear.of(down).cut(bounds, 1)
    out = sum(
        last(FewRowsLinear.of(torch.cat([one.weight, other.weight])).gated(x))
        for one, other, last in zip(gates, ups, downs, strict=True)
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_bounds_that_are_none_are_refused():
    linear = FewRowsLinear.of(torch.randn(12, 20))
    for axis, end in ((0, 12), (1, 20)):
        for bounds in ([0, 4], [4, end], [0, 8, 4, end], [0, 4, 4, end], [0]):
            with pytest.raises(ValueError, match=f"from 0 to {end}"):
                linear.cut(bounds, axis)
    with pytest.raises(ValueError, match="axis is 2"):
        linear.cut([0, 12], 2)
