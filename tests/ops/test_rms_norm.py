"""RMSNorm: the kernel against the norms of transformers, and a row alone against the same row among others."""

import pytest
import torch
from eagle_fast_kernels.rms_norm import add_parts, add_rms_norm, rms_norm, rms_norm_ref
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

# how a norm of transformers is made for some weight's shape, and what it computes
KINDS = {
    "llama": (lambda shape: LlamaRMSNorm(*shape, eps=1e-5), {}),
    "olmo": (lambda shape: Olmo2RMSNorm(*shape, eps=1e-5), {"round_once": True}),
    "gemma": (lambda shape: Gemma2RMSNorm(*shape, eps=1e-5), {"round_once": True, "plus_one": True}),
    "cohere": (lambda shape: CohereLayerNorm(shape, eps=1e-5), {"centered": True, "round_once": True}),
    "without a weight": (lambda shape: Llama4TextL2Norm(eps=1e-5), {}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def norm_of_kind(kind, shape, dtype, device):
    """(the norm of transformers with a random weight, its weight, the keywords of ours)."""
    make, rounding = KINDS[kind]
    norm = make(shape).to(device, dtype)
    weight = getattr(norm, "weight", None)
    if weight is not None:
        weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return norm, weight, rounding


def case(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(device, dtype) * 3
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(device, dtype)
    norm.weight.data = torch.randn(shape[-1], generator=generator).to(device, dtype)
    return x, norm


# a row, an odd width, a batch, rows that are not contiguous
@pytest.mark.parametrize("shape", [(1, 64), (5, 63), (2, 3, 96), (4, 1, 33)])
@pytest.mark.usefixtures("triton_kernels")
def test_equals_llama(shape, device):
    x, norm = case(shape, torch.float32, device)
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x), rtol=1e-5, atol=1e-5)
    wide = torch.full((*shape[:-1], shape[-1] + 7), float("nan"), device=device)
    wide[..., : shape[-1]] = x
    torch.testing.assert_close(rms_norm(wide[..., : shape[-1]], norm.weight, 1e-5), norm(x), rtol=1e-5, atol=1e-5)


@EACH_KIND
@DTYPES
@torch.no_grad()
def test_every_kind_is_that_of_transformers(kind, dtype, monkeypatch, device):
    norm, weight, rounding = norm_of_kind(kind, (48,), dtype, device)
    x = (torch.randn(2, 48, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 3 + 1).transpose(1, 2)
    expected = norm(x)
    if device.type == "cpu":
        assert torch.equal(rms_norm_ref(x, weight, 1e-5, **rounding), expected)
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "triton")
    actual = rms_norm(x, weight, 1e-5, **rounding)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("kind", ["llama", "cohere"])
@torch.no_grad()
def test_heads_may_have_a_weight_each(kind, monkeypatch, device):
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(device)
    norms = [norm_of_kind(kind, (16,), torch.float32, device)[0] for _ in range(3)]
    for head, each in enumerate(norms):
        each.weight.data = weight[head].clone()
    rounding = KINDS[kind][1]
    expected = torch.stack([each(x[:, :, head]) for head, each in enumerate(norms)], 2)
    for way in ("ref", "triton"):
        monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
        torch.testing.assert_close(rms_norm(x, weight, 1e-5, **rounding), expected, rtol=1e-5, atol=1e-5)


@EACH_KIND
@DTYPES
@pytest.mark.usefixtures("triton_kernels")
@torch.no_grad()
def test_a_row_has_the_same_bits_however_many_there_are(kind, dtype, device):
    for width in (24, 1536):
        _, weight, rounding = norm_of_kind(kind, (width,), dtype, device)
        x = torch.randn(60, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        among = rms_norm(x, weight, 1e-5, **rounding)
        for count in (1, 2, 5):
            for first in (0, 60 - count):
                rows = slice(first, first + count)
                assert torch.equal(rms_norm(x[rows], weight, 1e-5, **rounding), among[rows])
        strided = x.repeat(1, 2)[7, :width]
        assert torch.equal(rms_norm(strided, weight, 1e-5, **rounding), among[7])


@pytest.mark.parametrize("way", ["ref", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_parts", [1, 2, 14])
def test_parts_have_the_bits_of_the_product_that_comes_whole(num_parts, dtype, way, monkeypatch, device):
    """And what a layer sends to another device is what the next layer would have read on its own."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(num_parts, 5, 96, generator=generator).to(device)
    residual = torch.randn(5, 99, generator=generator).to(device, dtype)[:, :96]
    whole = add_parts(parts, torch.zeros_like(residual))  # rounded as it rounds there: interpreted, bfloat16 is cut off
    torch.testing.assert_close(whole.double(), parts.double().sum(0), rtol=torch.finfo(dtype).eps, atol=1e-5)
    weight = torch.randn(96, generator=generator).to(device, dtype)
    normed, total = add_rms_norm(whole, residual, weight)
    for mine, expected in zip(add_rms_norm(parts, residual, weight), (normed, total), strict=True):
        assert torch.equal(mine, expected)
    for given in (parts, whole):
        assert torch.equal(add_parts(given, residual), total)
    assert torch.equal(rms_norm(total, weight), normed)
    exact = whole.double() + residual.double()
    torch.testing.assert_close(total.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
@EACH_KIND
@DTYPES
@pytest.mark.parametrize("width", [64, 128, 576, 2304, 4096, 5120])
@torch.no_grad()
def test_a_row_of_a_real_width_has_the_same_bits_however_many_there_are(width, kind, dtype):
    norm, weight, rounding = norm_of_kind(kind, (width,), dtype, "cuda")
    x = torch.randn(2048, width, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    among = rms_norm(x, weight, 1e-5, **rounding)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(among, norm(x), rtol=eps, atol=eps)
    for count in (1, 2, 5, 60, 65, 600):
        assert torch.equal(rms_norm(x[-count:], weight, 1e-5, **rounding), among[-count:])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("num_parts", [1, 4, 14])
@pytest.mark.parametrize("width", [576, 2304, 4096, 5120])
def test_a_sum_of_a_real_width_has_the_same_bits_in_every_form(width, num_parts, dtype):
    """In parts or whole, in one launch with its norm or not, alone or among others."""
    generator = torch.Generator("cuda").manual_seed(0)
    parts = torch.randn(num_parts, 100, width, device="cuda", generator=generator)
    residual = torch.randn(100, width, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(width, device="cuda", generator=generator).to(dtype)
    whole = add_parts(parts, torch.zeros_like(residual))
    normed, total = add_rms_norm(parts, residual, weight)
    assert torch.equal(rms_norm(total, weight), normed)
    for rows in (slice(0, 100), slice(7, 8), slice(20, 80)):
        for given in (parts[:, rows], whole[rows]):
            assert torch.equal(add_parts(given, residual[rows]), total[rows])
            for mine, expected in zip(add_rms_norm(given, residual[rows], weight), (normed, total), strict=True):
                assert torch.equal(mine, expected[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(60, 4096), (1, 8192), (480, 576), (3, 5120)])
def test_real_widths(shape, dtype):
    x, norm = case(shape, dtype, "cuda")
    out = rms_norm(x, norm.weight, 1e-5)
    exact = norm.double()(x.double())
    bound = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-2)  # two roundings of half an ulp, and fp32 inside
    assert ((out.double() - exact).abs() <= 2 * bound).all()
