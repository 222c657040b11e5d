"""Products in parts, launches that overlap and weights fetched ahead change when things run, not what comes out."""

import pytest
import torch
from eagle_fast_kernels.draft_head import rope_append
from eagle_fast_kernels.linear import few_rows_sums, gated_matmul, split_rows, weight_tile
from eagle_fast_kernels.lm_head_topk import lm_head_topk
from eagle_fast_kernels.overlap import AHEAD, fetch_ahead
from eagle_fast_kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm

WAYS = pytest.mark.parametrize("way", ["ref", "triton"])


@WAYS
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_rms_norm_adds_the_parts(num_parts, dtype, way, monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    parts = torch.randn(num_parts, 4, 48, device=device)
    residual, weight = torch.randn(4, 48, device=device).to(dtype), torch.randn(48, device=device).to(dtype)
    normed, total = add_rms_norm(parts, residual, weight, 1e-5)
    assert normed.dtype == total.dtype == dtype
    eps = 4 * torch.finfo(dtype).eps
    exact = parts.double().sum(0) + residual.double()
    torch.testing.assert_close(total.double(), exact, rtol=eps, atol=eps)
    expected, _ = add_rms_norm_ref(total, torch.zeros_like(total), weight, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=eps, atol=eps)


def rope_case(device, dtype, num_rows=3, heads=(4, 2), head_dim=16):
    """(positions and what follows of rope_append, slabs) for rows at 5, 6, ... of two sequences."""
    angles = torch.rand(40 + num_rows, head_dim, device=device)
    slabs = torch.zeros(2, 2, heads[1], 40 + num_rows, head_dim, device=device, dtype=dtype)
    positions = (torch.arange(num_rows, device=device) + 5).expand(2, -1)
    slots = torch.tensor([7, 2], device=device)
    return (positions, angles.cos(), angles.sin(), *slabs, slots, *heads), slabs


@WAYS
@pytest.mark.parametrize("normed", [False, True])
def test_rope_append_adds_the_parts(normed, way, monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    parts = torch.randn(3, 2, 3, 8 * 16, device=device)
    norms = {name: torch.rand(16, device=device) + 0.5 for name in ("q_norm", "k_norm")} if normed else {}
    arguments, slabs = rope_case(device, torch.float32)
    queries = rope_append(parts, *arguments, **norms)
    kept = slabs.clone()
    whole = rope_append(parts.sum(0), *arguments, **norms)
    torch.testing.assert_close(queries, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, slabs, rtol=1e-5, atol=1e-5)
    assert kept.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(4096, 14336), (6144, 4096), (960, 576), (128256, 4096), (100, 72)])
def test_split_rows_are_where_the_splits_begin(shape, dtype):
    weight = torch.empty(shape, device="meta", dtype=dtype)
    splits = weight_tile(*shape, weight, 10, split=True).splits
    rows = split_rows(weight)
    assert rows.shape == (shape[0] * splits, shape[1] // splits)
    assert splits == 1 or shape[1] // splits * weight.element_size() >= 256


def test_nothing_is_fetched_ahead_without_a_weight_or_a_gpu():
    for weight in (None, torch.empty(8, 8)):
        assert fetch_ahead(weight)["next_ptr"] is None
        assert fetch_ahead(weight)["fetch_programs"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 60])
def test_fetching_ahead_changes_nothing_else(num_rows):
    qkv = torch.randn(1, 2, num_rows, 48 * 128, device="cuda")
    arguments, slabs = rope_case("cuda", torch.bfloat16, num_rows, (32, 8), 128)
    hidden, lm_head = (
        torch.randn(num_rows, 4096, device="cuda").bfloat16(),
        torch.randn(32000, 4096, device="cuda").bfloat16(),
    )
    expected = rope_append(qkv, *arguments), slabs.clone(), *lm_head_topk(hidden, lm_head, 10)
    for shape, dtype in (
        ((4096, 4096), torch.bfloat16),
        ((6144, 8192), torch.float8_e4m3fn),
        ((7, 24), torch.bfloat16),
    ):
        weight = torch.zeros(shape, device="cuda").to(dtype)
        ahead = fetch_ahead(split_rows(weight))
        fetched = ahead["next_rows"] * ahead["NEXT_LINES"] * 128
        assert fetched <= AHEAD
        assert torch.cuda.get_device_capability() < (9, 0) or ahead["next_ptr"] is not None
        out = rope_append(qkv, *arguments, then=split_rows(weight)), slabs
        out += lm_head_topk(hidden, lm_head, 10, then=split_rows(weight))
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 60])
def test_overlapping_kernels_wait_for_each_other(num_rows):
    """A chain in one graph, its buffers used again and again, against the same kernels one at a time."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, device="cuda", generator=generator) * scale).bfloat16()

    size, inner = 2048, 5632
    shapes = (size, size), (2 * inner, size), (size, inner)
    layers = [[random(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(4)]
    weight, x = random(size), random(num_rows, size)

    def chain(after_each):
        residual = x
        normed = rms_norm(residual, weight)
        for o, gate_up, down in layers:
            after_each()
            sums = few_rows_sums(normed, o)
            after_each()
            normed, residual = add_rms_norm(sums, residual, weight)
            after_each()
            gated = gated_matmul(normed, gate_up)
            after_each()
            sums = few_rows_sums(gated, down)
            after_each()
            normed, residual = add_rms_norm(sums, residual, weight)
        return normed, residual

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    chain(torch.cuda.synchronize)
    with torch.cuda.graph(graph, stream=stream):
        out = chain(lambda: None)
    for _ in range(20):
        x.copy_(random(num_rows, size))
        expected = chain(torch.cuda.synchronize)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
