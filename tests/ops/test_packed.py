"""Products with packed weights: those of the dense weight, whatever the kind and number of rows; bits on a GPU."""

import itertools

import pytest
import torch
from eagle_fast_kernels import packed as module
from eagle_fast_kernels.linear import few_rows_matmul
from eagle_fast_kernels.many_rows import TINY
from eagle_fast_kernels.packed import pack, packed_gated, packed_matmul, packed_sums, packed_tile, part_bounds, unpack
from eagle_fast_kernels.packed_layout import dense_rows
from eagle_fast_kernels.packed_many import (
    PackedShape,
    convert,
    many_gated,
    many_matmul,
    row_invariant_gated,
    row_invariant_matmul,
    row_invariant_sums,
    trial,
)
from eagle_fast_kernels.rms_norm import sum_parts_ref
from no_gpu import run_program
from orders import sum_in_order
from packed_weights import KINDS, cancelling_case, packed_case

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


@pytest.mark.parametrize("name", KINDS)
@HALVES
@pytest.mark.usefixtures("triton_kernels")
def test_weights_are_made_dense(name, dtype, device):
    """In the order that the kernel has them, whole and from some row on, with the scale of a row and without."""
    packed, weight, given = packed_case(name, 70, 320, device=device)
    assert torch.equal(convert(packed, slice(0, 70), dtype), weight(dtype))
    ordered = pack(
        **given, kind=packed.kind, group_size=packed.group_size, order=torch.randperm(320).to(device)
    )  # fmt: skip
    assert torch.equal(convert(ordered, slice(65, 70), dtype), weight(dtype)[65:])
    codes = convert(packed, slice(3, 9), dtype, scaled=False)
    per_row = len(packed.scales) == 1 and packed.zeros is None
    assert torch.equal(codes, dense_rows(packed, slice(3, 9), dtype, scaled=not per_row))


SHAPES = pytest.mark.parametrize(
    ("num_rows", "columns"), [(6144, 4096), (4096, 14336), (28672, 4096), (960, 576), (4096, 11008), (202, 328)]
)


def on_gpu(name, num_rows, columns, dtype, rows=256):
    """(x [256, K], packed weight), each group with a scale of its own."""
    columns_of_groups = columns // 32 * 32 if KINDS[name][1] else columns
    packed, _, _ = packed_case(name, num_rows, columns_of_groups, dtype=dtype, device="cuda")
    x = torch.randn(rows, columns_of_groups, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
    return x, packed


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@HALVES
@SHAPES
def test_a_row_does_not_depend_on_the_others(num_rows, columns, name, dtype):
    x, packed = on_gpu(name, num_rows, columns, dtype)
    weight = unpack(packed, torch.float32 if len(packed.scales) == 1 and packed.zeros is None else dtype).double()
    exact = x[:64].double() @ weight.T
    gate = gated(packed_matmul(x[:64], packed).double())
    for product, reference in ((packed_matmul, exact), (packed_sums, exact), (packed_gated, gate)):
        out = product(x[:64], packed)
        check(out.sum(0) if product is packed_sums else out, reference, out.dtype, packed.in_features)
        check_rows(product, x, packed)
        check_rows(product, *cancelling_case(name, num_rows, packed.in_features, 64, dtype, "cuda"))


def check_rows(product, x, packed):
    """Rows alone, in other company, and beside rows that are not numbers."""
    out = product(x[:64], packed)
    for first, count in ((0, 1), (7, 1), (0, 10), (0, 16), (30, 17), (5, 32), (0, 33), (0, 60)):
        rows = slice(first, first + count)
        assert torch.equal(product(x[rows], packed), out[..., rows, :]), (product.__name__, first, count)
    poisoned = x[:64].clone()
    poisoned[1:] = float("nan")
    assert torch.equal(product(poisoned, packed)[..., 0, :], out[..., 0, :])


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@HALVES
@SHAPES
def test_bits_are_those_of_the_dense_weight(num_rows, columns, name, dtype):
    x, packed = on_gpu(name, num_rows, columns, dtype, rows=60)
    if len(packed.scales) == 1 and packed.zeros is None:
        packed = packed._replace(scales=torch.ones_like(packed.scales))
    assert torch.equal(packed_matmul(x, packed), few_rows_matmul(x, unpack(packed, dtype)))
    bounds, weight = part_bounds(packed), unpack(packed, dtype)
    for part, (low, high) in zip(packed_sums(x, packed), itertools.pairwise(bounds), strict=True):
        alone = few_rows_matmul(x[:, low:high].contiguous(), weight[:, low:high].contiguous())
        assert torch.equal(part.to(dtype), alone)


on_hopper = pytest.mark.skipif(
    not (module.HAS_GLUON and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="needs a Hopper GPU and a release of Triton that the kernel is written for",
)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", KINDS)
@HALVES
@SHAPES
def test_kernel_of_hopper_gives_the_bits_of_the_other(num_rows, columns, name, dtype, bias, monkeypatch):
    """Products and parts; a gate is within its own rounding, since the two kernels divide in other ways."""
    x, packed = on_gpu(name, num_rows, columns, dtype)
    bias = torch.randn(num_rows, device="cuda").to(dtype) if bias else None
    taken = module.by_hopper(x, packed, gated=False), module.by_hopper(x, packed, gated=True)
    assert taken == (num_rows % 4 == 0 and x.stride(0) % 8 == 0, num_rows % 8 == 0 and x.stride(0) % 8 == 0)
    for rows in (1, 10, 17, 33, 60, 64, 100, 256):
        out = [product(x[:rows], packed, bias=bias) for product in (packed_matmul, packed_sums, packed_gated)]
        with monkeypatch.context() as patch:
            patch.setattr(module, "HAS_GLUON", False)
            other = [product(x[:rows], packed, bias=bias) for product in (packed_matmul, packed_sums, packed_gated)]
        assert torch.equal(out[0], other[0])
        assert torch.equal(out[1], other[1])
        check(out[2], other[2].double(), dtype, packed.in_features)


@pytest.mark.skipif(not module.HAS_GLUON, reason="another release of Triton")
def test_rows_and_weights_that_tma_can_fetch():
    """On 16 bytes, both halves of a gated weight too."""
    packed, _, _ = packed_case("int4, groups of 64", 36, 320)
    x, can_fetch = torch.zeros(4, 328, dtype=torch.bfloat16), module.hopper.can_fetch
    assert can_fetch(x[:, :320], packed, gated=False)
    assert not can_fetch(x[:, :320], packed, gated=True)
    assert not can_fetch(x[:, 4:324], packed, gated=False)
    assert not can_fetch(torch.zeros(4, 324, dtype=torch.bfloat16)[:, :320], packed, gated=False)
    assert not can_fetch(x[:0, :320], packed, gated=False)


def added_up(product, dtype):
    return product if product.dtype == dtype else sum_parts_ref(product, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [65, 96, 128, 240, 256, 480])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", KINDS)
@SHAPES
def test_more_rows_have_the_bits_of_few(num_rows, columns, name, bias, rows):
    x, packed = on_gpu(name, num_rows, columns, torch.bfloat16, rows=rows)
    bias = torch.randn(num_rows, device="cuda").bfloat16() if bias else None
    pairs = (
        (row_invariant_matmul, packed_matmul), (row_invariant_sums, packed_sums), (row_invariant_gated, packed_gated),
    )  # fmt: skip
    for terms in ("random", "cancelling"):
        if terms == "cancelling":
            x, packed = cancelling_case(name, num_rows, packed.in_features, rows, torch.bfloat16, "cuda")
            bias = None if bias is None else bias * TINY
        for many, few in pairs:
            expected = torch.cat([added_up(few(part, packed, bias=bias), x.dtype) for part in x.split(60)])
            assert torch.equal(added_up(many(x, packed, bias), x.dtype), expected), (many.__name__, terms)
        parts = torch.cat([packed_sums(part, packed, bias=bias) for part in x.split(60)], 1)
        assert torch.equal(row_invariant_sums(x, packed, bias, rounded=False), parts), "before they are rounded"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@HALVES
def test_a_trial_tells_orders_of_additions_apart(dtype, biased, name):
    kind, size, zeros = KINDS[name]
    shape = PackedShape(torch.device("cpu"), dtype, 64, 64, (0, 328), kind, size or 328, zeros, biased, ())
    x, packed, bias = trial(shape)
    weight = unpack(packed, torch.float32 if len(packed.scales) == 1 and not zeros else dtype)
    one, other = (sum_in_order(x, weight, parts) + (0 if bias is None else bias.float()) for parts in (1, 2))
    assert (one.to(dtype) != other.to(dtype)).float().mean() > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_prompt(name):
    x, packed = on_gpu(name, 1024, 896, torch.bfloat16, rows=700)
    exact = x.double() @ unpack(packed, torch.bfloat16).double().T
    check(many_matmul(x, packed), exact, x.dtype, 896)
    check(many_gated(x, packed), gated(many_matmul(x, packed).double()), x.dtype, 896)


COMPILE = """
import sys, torch
from no_gpu import assembled, overlap_of, pretend, recorded

capability, dtype, path = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]

pretend(capability)
from eagle_fast_kernels import packed, packed_many
from eagle_fast_kernels.launch import Resources
hopper = sys.argv[4] == "gluon"
from orders import sum_in_order
from packed_weights import KINDS, cancelling_case, packed_case

kernels = [(packed, "packed_kernel"), (packed_many, "dense_kernel")]
if hopper:
    packed.hopper.is_hopper = lambda device: True
    kernels[0] = packed.hopper, "packed_hopper_kernel"
compiled = recorded(*kernels)
for module in (packed, packed_many):
    module.use_triton = lambda *tensors: True
    module.dependent_launch = lambda device: overlap_of(capability)
packed._is_hopper = lambda device: capability == 90
packed.resources = lambda device: Resources(132, {80: 166912, 89: 101376, 90: 232448}[capability])
for name in KINDS:
    weight, _, _ = packed_case(name, 128, 1024)
    packed_many.convert(weight, slice(0, 128), dtype)
    x = torch.zeros(64, 1024, dtype=dtype)
    packed.packed_sums(x[:1], weight)
    packed.packed_sums(x, weight)
    packed.packed_gated(x, weight)
for each in compiled:
    ptx, said = each.asm["ptx"], assembled(each, capability, path)
    # before Hopper ptxas takes a few bytes of memory to fit one program more
    spilled = int(said.split(" bytes spill stores")[0].split()[-1])
    assert spilled <= (0 if capability == 90 else 64) and "arning" not in said, said
    most = packed.resources(None)[1]
    assert each.metadata.shared <= (most // 2 - 1024 if hopper else most), each.metadata.shared
    if capability == 90 and "wgmma" in ptx:
        assert ptx.count("wgmma.mma_async") == ptx.count("}, {"), "a weight comes from shared memory"
print("compiled", len(compiled))
"""


def compile_kernels(capability, dtype, tmp_path, which="triton"):
    done = run_program(COMPILE, capability, dtype, tmp_path / "kernel.ptx", which)
    assert done.stdout.split() == ["compiled", str(len(KINDS) * 4)], done.stderr[-3000:]


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bfloat16"), (89, "bfloat16"), (90, "bfloat16"), (90, "float16")]
)
def test_kernels_compile_without_spills(capability, dtype, tmp_path):
    """For three generations of GPUs, on any machine; on Hopper all weights go from registers into the products."""
    compile_kernels(capability, dtype, tmp_path)


@pytest.mark.skipif(not module.HAS_GLUON, reason="another release of Triton")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kernel_of_hopper_compiles_without_spills(dtype, tmp_path):
    """In half of the memory of a multiprocessor, so that two programs share it."""
    compile_kernels(90, dtype, tmp_path, "gluon")
