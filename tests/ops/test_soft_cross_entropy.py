"""The training loss: losses and gradients as autograd finds them in fp64."""

import pytest
import torch
from eagle_fast_kernels.soft_cross_entropy import soft_cross_entropy

# 1 and 5 are below a tile, 128 fills the smallest, 131 and 5000 end in a part of one
SIZES = [(3, 1), (4, 5), (2, 128), (5, 131), (3, 5000)]


def oracle(logits, targets, weights):
    z = logits.double().requires_grad_()
    losses = -(targets.double() * z.log_softmax(-1)).sum(-1)
    (losses * weights.double()).sum().backward()
    return losses.detach(), z.grad


def rows(num_rows, vocab_size, device, dtype=torch.float32):
    """Logits, targets that are cut short as by a draft vocabulary, and weights; columns past V are poisoned."""
    generator = torch.Generator().manual_seed(vocab_size)
    wide = torch.full((2, num_rows, vocab_size + 3), torch.nan)
    wide[0, :, :vocab_size] = 4 * torch.randn(num_rows, vocab_size, generator=generator)
    targets = (3 * torch.randn(num_rows, vocab_size, generator=generator)).softmax(-1)
    wide[1, :, :vocab_size] = targets * torch.rand(num_rows, 1, generator=generator)
    weights = torch.rand(num_rows, generator=generator)
    logits, targets = wide.to(device, dtype)[..., :vocab_size]
    return logits, targets, weights.to(device)


@pytest.mark.parametrize("way", ["ref", "triton"])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SIZES)
def test_losses_and_gradients(num_rows, vocab_size, way, device, monkeypatch):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    logits, targets, weights = rows(num_rows, vocab_size, device)
    losses, gradient = oracle(logits, targets, weights)
    best = logits.argmax(-1)
    found = soft_cross_entropy(logits, targets, weights)
    torch.testing.assert_close(found.losses.double(), losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(found.best, best)


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_rows_of_weight_zero_and_of_infinite_logits(way, device, monkeypatch):
    """A row without weight has no gradient; a token that cannot come (-inf) has none either; the first best wins."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    logits = torch.tensor([[1.0, 2.0, 2.0, -torch.inf], [0.5, 0.0, 0.0, 0.0]], device=device)
    targets = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]], device=device)
    found = soft_cross_entropy(logits, targets, torch.tensor([1.0, 0.0], device=device))
    assert found.best.tolist() == [1, 0]
    assert torch.equal(logits[1], torch.zeros(4, device=device))
    assert logits[0, 3] == 0
    assert found.losses.isfinite().all()
    torch.testing.assert_close(logits[0].sum(), torch.zeros((), device=device), atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [16384, 24001, 32000])
def test_bf16_at_real_size(vocab_size, device):
    logits, targets, weights = rows(257, vocab_size, device, torch.bfloat16)
    losses, gradient = oracle(logits, targets, weights)
    found = soft_cross_entropy(logits, targets, weights)
    torch.testing.assert_close(found.losses.double(), losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits.double(), gradient, atol=1e-6, rtol=2**-8)
