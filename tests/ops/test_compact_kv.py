"""compact_kv moves exactly the accepted rows, bit by bit, against a Python loop over rows."""

import pytest
import torch
from eagle_fast_kernels.compact_kv import compact_kv, compact_kv_ref


def random_paths(counts, num_nodes, max_path, seed=0):
    """Strictly increasing node lists that start at the root; past the count, garbage that must not be used."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(-(10**9), 10**9, (len(counts), max_path), generator=generator)
    for row, count in zip(path, counts, strict=True):
        nodes = torch.randperm(num_nodes - 1, generator=generator)[: max(0, count - 1)] + 1
        row[:count] = torch.cat((torch.zeros(1, dtype=torch.long), nodes.sort().values))[:count]
    return path


def bits(x):
    return x.contiguous().view(torch.uint8)


def moved(slab, path, counts, lengths):
    """The same moves on a copy, a row at a time."""
    out = slab.clone()
    for b, (count, length) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
        for r, node in enumerate(path[b, :count].tolist()):
            out[:, b, :, length + r] = slab[:, b, :, length + node]
    return out


# (N, Hkv, L, D, lengths, counts, nodes, max path): paths of 0, 1 and all steps; caches full to the last row.
SMALL = {
    "one step": (2, 1, 20, 16, (3,), (1,), 5, 4),
    "ragged": (3, 2, 40, 24, (7, 0, 20), (5, 3, 0), 17, 6),
    "full path of 18": (2, 3, 70, 80, (5, 9), (18, 1), 60, 18),
    "nothing accepted in a full cache": (2, 1, 12, 16, (12, 2), (0, 4), 9, 7),
    "ends at the last row": (1, 2, 30, 32, (14,), (9,), 16, 9),
    "more steps than rows left": (2, 2, 10, 16, (8, 1), (1, 4), 7, 9),
}


@pytest.mark.parametrize("way", ["ref", "triton"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_rows_move_exactly(case, way, device, monkeypatch):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    num_buffers, num_heads, num_rows, head_dim, lengths, counts, num_nodes, max_path = case
    path = random_paths(counts, num_nodes, max_path).to(device)
    counts, lengths = torch.tensor(counts, device=device), torch.tensor(lengths, device=device)
    slab = torch.randn(num_buffers, len(lengths), num_heads, num_rows, head_dim, device=device)
    expected = moved(slab, path, counts, lengths)
    compact_kv(slab, path, counts, lengths)
    assert torch.equal(slab, expected)


@pytest.mark.parametrize("way", ["ref", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_bits_survive_in_any_dtype(dtype, way, device, monkeypatch):
    """Random bits: NaN with payloads, infinities and denormals among them."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    slab = torch.randint(0, 256, (2, 2, 1, 30, 16 * dtype.itemsize), dtype=torch.uint8, device=device).view(dtype)
    path = torch.tensor([[0, 2, 3, 9], [0, 1, 4, 5]], device=device)
    counts, lengths = torch.tensor([4, 3], device=device), torch.tensor([11, 20], device=device)
    expected = moved(slab.view(torch.uint8), path, counts, lengths)
    compact_kv(slab, path, counts, lengths)
    assert torch.equal(bits(slab), expected)


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_views_of_a_slab(way, device, monkeypatch):
    """A batch slice of a larger slab with rows before heads: nothing beside it changes."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    whole = torch.randn(2, 4, 25, 3, 20, device=device)
    view = whole[:, 1:3, :, :, :16].transpose(2, 3)
    before = whole.clone()
    path = torch.tensor([[0, 3, 7], [0, 1, 2]], device=device)
    counts, lengths = torch.tensor([3, 3], device=device), torch.tensor([10, 4], device=device)
    expected = moved(view, path, counts, lengths)
    compact_kv(view, path, torch.stack([counts, lengths], 1)[:, 0], lengths)
    assert torch.equal(view, expected)
    before[:, 1:3, :, :, :16] = whole[:, 1:3, :, :, :16]
    assert torch.equal(whole, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_32_layers_of_8_sequences(head_dim, dtype):
    """Sources and targets overlap and many programs run at once: any race shows, most likely within 20 trials."""
    lengths = torch.tensor([0, 511, 64, 1000, 33, 700, 255, 940], device="cuda")
    for seed in range(20):
        counts = [1, 18, 9, 0, 18, 17, 2, 18]
        path = random_paths(counts, 60, 18, seed).cuda()
        if seed % 2:  # moves by one row: every target but the first is the source of the step before
            path = torch.where(torch.arange(18, device="cuda") == 0, 0, torch.arange(18, device="cuda") + 1).repeat(
                8, 1
            )
        slab = torch.randn(64, 8, 8, 1024, head_dim, device="cuda", dtype=dtype)
        expected = slab.clone()
        compact_kv_ref(expected, path, torch.tensor(counts, device="cuda"), lengths)
        compact_kv(slab, path, torch.tensor(counts, device="cuda"), lengths)
        assert torch.equal(slab, expected)
