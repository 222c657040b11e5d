"""RMSNorm: the kernel against LlamaRMSNorm."""

import pytest
import torch
from eagle_fast_kernels.rms_norm import add_parts, add_rms_norm, rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", [1, 2, 14])
@pytest.mark.usefixtures("triton_kernels")
def test_a_sum_has_the_bits_of_the_sum_that_is_normed(parts, dtype, device):
    """What a layer sends to another device is what the next layer would have read on its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(parts, 5, 96, generator=generator).to(device)
    residual = torch.randn(5, 99, generator=generator).to(device, dtype)[:, :96]
    weight = torch.ones(96, device=device, dtype=dtype)
    for given in (x, x[0].to(dtype)):
        total = add_parts(given, residual)
        assert torch.equal(total, add_rms_norm(given, residual, weight)[1])
        exact = given.double().reshape(-1, 5, 96).sum(0) + residual.double()
        torch.testing.assert_close(total.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(60, 4096), (1, 8192), (480, 576), (3, 5120)])
def test_real_widths(shape, dtype):
    x, norm = case(shape, dtype, "cuda")
    out = rms_norm(x, norm.weight, 1e-5)
    exact = norm.double()(x.double())
    bound = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-2)  # two roundings of half an ulp, and fp32 inside
    assert ((out.double() - exact).abs() <= 2 * bound).all()
