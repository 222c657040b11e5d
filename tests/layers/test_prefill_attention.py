"""Attention of prompt chunks against dense attention in fp64, whichever way a chunk takes."""

import pytest
import torch

from eagle_fast import attention
from eagle_fast.layers.attention import PrefillStep, prefill_attention

# window, chunk, softcap, sinks: as the families have them, smaller than the prompt, and larger.
KINDS = {
    "full": (0, 0, 0.0, False),
    "window": (9, 0, 0.0, False),
    "window of one": (1, 0, 0.0, False),
    "window wider than all": (500, 0, 0.0, False),
    "chunk": (0, 16, 0.0, False),
    "softcap": (0, 0, 5.0, False),
    "softcap, window": (11, 0, 5.0, False),
    "sinks": (0, 0, 0.0, True),
    "sinks, window": (7, 0, 0.0, True),
}


def make(num_rows, heads, head_dim, batch=2, dtype=torch.float32, device="cpu"):
    """q of the whole prompt; k and v as views of a longer slab, NaN behind the prompt."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, num_rows, heads[0], head_dim, generator=generator).transpose(1, 2)
    slab = torch.full((2, batch, heads[1], num_rows + 5, head_dim), float("nan"))
    slab[..., :num_rows, :] = torch.randn(2, batch, heads[1], num_rows, head_dim, generator=generator)
    sinks = torch.randn(heads[0], generator=generator)
    return (each.to(device, dtype) for each in (q, slab[0], slab[1], sinks))


def dense(q, k, v, window, chunk, softcap, sinks):
    """[B, T, Hq, D] in fp64, each score written down."""
    num_rows, groups = q.shape[2], q.shape[1] // k.shape[1]
    q, k, v = (each[:, :, :num_rows].double() for each in (q, k, v))
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(num_rows, device=q.device)
    back = row[:, None] - row
    visible = (back >= 0) & (back < (window or num_rows))
    if chunk:
        visible &= row[:, None] // chunk == row // chunk
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :num_rows]
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def in_chunks(q, k, v, size, **options):
    """The prompt in chunks of `size`, the last one shorter."""
    outs = []
    for start in range(0, q.shape[2], size):
        part = q[:, :, start : start + size]
        outs.append(
            prefill_attention(part, k, v, PrefillStep(start, part.shape[2]), scale=q.shape[-1] ** -0.5, **options)
        )
    return torch.cat(outs, 1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("size", "block"), [(61, 1024), (61, 8), (20, 1024), (20, 8)])
def test_any_chunks_and_blocks_give_dense_attention(size, block, heads, kind, device, monkeypatch):
    """61 rows: no multiple of a window, a chunk or a block."""
    monkeypatch.setattr(attention, "BLOCK", block)
    window, chunk, softcap, with_sinks = kind
    q, k, v, sinks = make(61, heads, 16, device=device)
    sinks = sinks if with_sinks else None
    out = in_chunks(q, k, v, size, window=window, chunk=chunk, softcap=softcap, sinks=sinks)
    assert out.is_contiguous()
    expected = dense(q, k, v, window, chunk, softcap, sinks)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "window", "softcap", "sinks"])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (12, 12)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_real_shapes_in_bf16(head_dim, heads, kind, device):
    """A second chunk, which starts behind others, takes flash attention where nothing else is asked for."""
    _, _, softcap, with_sinks = KINDS[kind]
    window = 1500 if kind == "window" else 0
    q, k, v, sinks = make(2500, heads, head_dim, batch=1, dtype=torch.bfloat16, device=device)
    sinks = sinks if with_sinks else None
    expected = dense(q, k, v, window, 0, softcap, sinks)
    whole = in_chunks(q, k, v, 2500, window=window, softcap=softcap, sinks=sinks).double() - expected
    parts = in_chunks(q, k, v, 1100, window=window, softcap=softcap, sinks=sinks).double() - expected
    for error in (whole, parts):
        assert error.norm() < 6e-3 * expected.norm()
        assert error.abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.gpu
def test_a_long_chunk_holds_no_scores(device):
    """8,192 x 16,384 scores of 32 heads would take 8.6 GB in bf16, as a mask 134 MB."""
    q, k, v, _ = make(16384, (32, 8), 128, batch=1, dtype=torch.bfloat16, device=device)
    part = q[:, :, 8192:]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill_attention(part, k, v, PrefillStep(8192, 8192), scale=128**-0.5)
    assert torch.cuda.max_memory_allocated() - before < 2.5 * part.numel() * part.element_size()
