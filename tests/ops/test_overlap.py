"""Products in parts, and launches that overlap: they change when things run, not what comes out."""

import functools

import pytest
import torch
from eagle_fast_kernels.draft_head import rope_append
from eagle_fast_kernels.linear import few_rows_sums, gated_matmul
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


@WAYS
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_are_rotated_and_written_to_the_bits_of_the_product_that_comes_whole(
    dtype, normed, way, monkeypatch, device
):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    parts = torch.randn(3, 2, 3, 8 * 16, device=device)
    check_parts_and_rows(parts, normed, dtype, device)


def check_parts_and_rows(parts, normed, dtype, device):
    """The same queries, keys and values from parts [S, 2, T, 8 D] or whole, of all rows or of the last alone."""
    num_rows, head_dim = parts.shape[2], parts.shape[3] // 8
    norms = {name: (torch.rand(head_dim, device=device) + 0.5).to(dtype) for name in ("q_norm", "k_norm")}
    (positions, cos, sin, keys, values, slots, *heads), slabs = rope_case(device, dtype, num_rows, head_dim=head_dim)

    def run(qkv, rows=slice(None)):
        slabs.zero_()
        arguments = (positions[:, rows].contiguous(), cos, sin, keys, values, slots + (rows.start or 0), *heads)
        queries = rope_append(qkv[..., rows, :], *arguments, **(norms if normed else {}))
        return queries.clone(), slabs.clone()

    whole = functools.reduce(torch.add, parts).to(dtype)
    queries, kept = run(parts)
    assert kept.any()
    for mine, expected in zip(run(whole), (queries, kept), strict=True):
        assert torch.equal(mine, expected)
    for given in (parts, whole):
        last = run(given, slice(num_rows - 1, num_rows))
        assert torch.equal(last[0], queries[:, :, -1:])
        for sequence, slot in enumerate((7, 2)):
            row = slot + num_rows - 1
            assert torch.equal(last[1][:, sequence, :, row], kept[:, sequence, :, row])


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_rotated_row_of_a_real_width_has_the_same_bits_in_every_form(head_dim, dtype, normed):
    """One row in a program, and several: 2 sequences of 1, 30 and 60 rows."""
    for num_rows in (30, 60):
        check_parts_and_rows(torch.randn(4, 2, num_rows, 8 * head_dim, device="cuda"), normed, dtype, "cuda")


@WAYS
def test_rope_append_counts_the_rows_where_it_has_no_positions(way, monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    x = torch.randn(2, 3, 8 * 16, device=device)
    (_, *arguments), slabs = rope_case(device, torch.float32)
    expected = rope_append(x, torch.arange(6, device=device).view(2, 3), *arguments)
    kept = slabs.clone()
    assert torch.equal(rope_append(x, None, *arguments), expected)
    assert torch.equal(slabs, kept)


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
