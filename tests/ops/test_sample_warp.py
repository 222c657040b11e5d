"""The scores that a token was drawn from: transformers' warpers, and the set that the sampler itself kept."""

import pytest
import torch
from eagle_fast_kernels import sample as sample_module
from eagle_fast_kernels import sample_threshold
from eagle_fast_kernels.sample import sample
from eagle_fast_kernels.sample_warp import warp
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# temperature, top_k, top_p, min_p: one sequence each
SETTINGS = [(0.0, 3, 0.5, 0.2), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 40, 0.8, 0.05)]


def settings(device):
    """temperature, top_k, top_p, min_p [B]"""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    return [
        torch.tensor(values, dtype=dtype, device=device)
        for values, dtype in zip(zip(*SETTINGS, strict=True), dtypes, strict=True)
    ]


def draw(logits, count=1):
    """[count, B, T]: what `sample` draws from logits [B, T, V] at `count` positions."""
    batch, nodes, _ = logits.shape
    zeros = torch.zeros(batch, dtype=torch.long, device=logits.device)
    positions = torch.arange(nodes, device=logits.device).repeat(batch, 1)
    at = (positions + number * nodes for number in range(count))
    return torch.stack([sample(logits, each, *settings(logits.device), zeros + 5, zeros) for each in at])


def check(device, vocab_size, levels=None):
    """161 = 128 + 33 tokens: not a multiple of the tile."""
    logits = torch.randn(len(SETTINGS), 3, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    logits = ((logits * levels).round() / levels if levels else logits).to(device)
    tokens = draw(logits)[0]
    found = warp(logits, tokens, *settings(device))
    assert found.dtype == torch.float32
    for row, (temperature, top_k, top_p, min_p) in enumerate(SETTINGS):
        expected = logits[row]
        if temperature:
            expected = expected / temperature
            expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
            expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
            expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
        if levels and top_p < 1 and temperature:  # we keep all ties of the last one
            kept = found[row].isfinite()
            assert (kept | expected.isinf()).all()
            assert (kept == (found[row] >= expected.masked_fill(expected.isinf(), torch.inf).amin(-1)[:, None])).all()
            expected = torch.where(kept, logits[row] / temperature, -torch.inf)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=0)
    return found, logits


@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
def test_warpers_are_those_of_transformers(levels, device):
    check(device, 161, levels)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
def test_by_the_samplers_kernels(levels, monkeypatch, device):
    monkeypatch.setattr(sample_module, "CHUNK", 128)
    monkeypatch.setattr(sample_threshold, "TILE", 128)
    check(device, 161, levels)


def test_what_was_drawn_stays(device):
    """Where min-p and rounding would remove it."""
    logits = torch.zeros(1, 1, 9, device=device)
    logits[0, 0, 4] = -1.0
    one = torch.ones(1, device=device)
    scores = warp(logits, torch.full((1, 1), 4, device=device), one, one.long() * 0, one, one * 0.9)
    assert torch.equal(scores, logits)


@pytest.mark.gpu
def test_at_size(device):
    """Llama 3's vocabulary: whatever is drawn is among what is kept, and what is kept is transformers'."""
    found, logits = check(device, 128256)
    for tokens in draw(logits, count=50):
        assert found.gather(-1, tokens[..., None]).isfinite().all()


@pytest.mark.parametrize(
    ("at", "change", "name"),
    [
        (0, lambda x: x.transpose(1, 2), "logits"), (0, lambda x: x.long(), "logits"),
        (1, lambda x: x[:, :1], "tokens"), (1, lambda x: x.int(), "tokens"), (2, lambda x: x[:1], "temperature"),
        (3, lambda x: x.float(), "top_k"), (4, lambda x: x.double(), "top_p"), (5, lambda x: x[:, None], "min_p"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(at, change, name, device):
    logits = torch.randn(len(SETTINGS), 2, 40, device=device)
    arguments = [logits, torch.zeros(len(SETTINGS), 2, dtype=torch.long, device=device), *settings(device)]
    warp(*arguments)
    arguments[at] = change(arguments[at])
    with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
        warp(*arguments)
