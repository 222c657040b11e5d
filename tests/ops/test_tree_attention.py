"""Tree attention against a dense fp64 oracle that walks parents instead of reading bitmasks.

Small shapes run the kernel everywhere (interpreted without a GPU), real ones on a GPU. Rows past the live ones are NaN
in every case, and prefix rows that no query may reach (window, chunk) are large noise.
"""

import random
from typing import NamedTuple

import pytest
import torch
from eagle_fast_kernels import tree_attention as module
from eagle_fast_kernels.tree_attention import tree_attention
from eagle_fast_kernels.tree_attention_ref import _visible, tree_attention_ref
from no_gpu import run_program


class Case(NamedTuple):
    """heads = (query heads, KV heads); lengths one per sequence; the cache has `spare` rows past the last live one."""

    lengths: tuple[int, ...]
    num_queries: int
    heads: tuple[int, int]
    head_dim: int
    first: int = 0
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    spare: int = 7


class Problem(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    ancestors: torch.Tensor
    options: dict
    parents: list[list[int]]


def random_tree(num_nodes, generator):
    """Parents before children. Shallow and deep mixed, so that ancestors sit in every word of the mask."""
    return [-1] + [generator.randrange(max(0, i - 9), i) if i % 3 else i // 2 for i in range(1, num_nodes)]


def lineage(parents, node):
    """The node and its ancestors."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found


def pack(slot_lists, num_words):
    """Bitmask words of lists of slots, as int64."""
    words = [[0] * num_words for _ in slot_lists]
    for row, slots in zip(words, slot_lists, strict=True):
        for slot in slots:
            row[slot // 64] |= 1 << slot % 64
    return [[w - (1 << 64) if w >> 63 else w for w in row] for row in words]


def build(case, dtype=torch.float32, device="cpu", seed=0):
    """Random inputs as the engine makes them: q a transposed view, k and v views of one slab."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    num_slots, num_sequences = case.first + case.num_queries, len(case.lengths)
    num_heads, num_kv_heads = case.heads
    num_rows = max(case.lengths) + num_slots + case.spare
    q = torch.randn(num_sequences, case.num_queries, num_heads, case.head_dim, device=device) * 2
    slab = torch.randn(2, 3, num_sequences, num_kv_heads, num_rows, case.head_dim, device=device)
    sinks = torch.randn(num_heads, device=device, dtype=dtype) if case.sinks else None
    parents = [random_tree(num_slots, generator) for _ in case.lengths]
    depths = torch.tensor([[len(lineage(p, i)) - 1 for i in range(num_slots)] for p in parents], device=device)
    num_words = (num_slots + 63) // 64
    ancestors = [pack([lineage(p, i) for i in range(case.first, num_slots)], num_words) for p in parents]
    for sequence, length in enumerate(case.lengths):
        slab[:, :, sequence, :, length + num_slots :] = float("nan")
        reach = length - case.window + 1 if case.window else length // case.chunk * case.chunk if case.chunk else 0
        slab[:, :, sequence, :, : max(0, reach)] *= 3e3
    slab = slab.to(dtype)
    options = dict(scale=case.head_dim**-0.5, depths=depths if case.window or case.chunk else None, first=case.first)
    options.update(window=case.window, chunk=case.chunk, softcap=case.softcap, sinks=sinks)
    lengths = torch.tensor(case.lengths, device=device)
    ancestors = torch.tensor(ancestors, device=device)
    return Problem(q.to(dtype).transpose(1, 2), slab[0, 1], slab[1, 1], lengths, ancestors, options, parents)


def to(problem, device):
    """The problem on a device; q, k and v keep their strides."""

    def move(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    options = {name: move(value) for name, value in problem.options.items()}
    return Problem(*map(move, problem[:5]), options, problem.parents)


def oracle(case, problem):
    """[B, T, Hq, D] in fp64: one softmax at a time over the rows that a query may see."""
    q, k, v = (t.double() for t in (problem.q, problem.k, problem.v))
    group = case.heads[0] // case.heads[1]
    out = torch.empty(len(case.lengths), case.num_queries, case.heads[0], case.head_dim, dtype=torch.float64)
    for b, length in enumerate(case.lengths):
        parents = problem.parents[b]
        positions = list(range(length)) + [length + len(lineage(parents, j)) - 1 for j in range(len(parents))]
        for t in range(case.num_queries):
            node = case.first + t
            here = positions[length + node]
            rows = [*range(length), *sorted(length + j for j in lineage(parents, node))]
            if case.window:
                rows = [n for n in rows if here - positions[n] < case.window]
            if case.chunk:
                rows = [n for n in rows if here // case.chunk == positions[n] // case.chunk]
            for h in range(case.heads[0]):
                scores = k[b, h // group, rows] @ q[b, h, t] * problem.options["scale"]
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                if case.sinks:
                    scores = torch.cat((scores, problem.options["sinks"][h].double()[None]))
                out[b, t, h] = scores.softmax(0)[: len(rows)] @ v[b, h // group, rows]
    return out


def run(function, problem):
    return function(problem.q, problem.k, problem.v, problem.lengths, problem.ancestors, **problem.options)


# Odd sizes leave every tile ragged; tiles of the cache end at 16, 32 or 64 rows, mask words at 64 slots.
SMALL = {
    "one node, empty prefix": Case((0,), 1, (1, 1), 16),
    "one node": Case((37,), 1, (4, 4), 32),
    "plain": Case((63,), 11, (4, 4), 32),
    "full tiles": Case((64,), 32, (2, 2), 16, spare=0),
    "gqa 3, D 24": Case((45,), 7, (6, 2), 24),
    "gqa 4, ragged, one empty": Case((111, 0, 33), 5, (8, 2), 16),
    "gqa 8, D 96": Case((20,), 5, (8, 1), 96),
    "D 80": Case((70,), 6, (3, 1), 80),
    "65 nodes, two words": Case((13,), 65, (1, 1), 16),
    "131 nodes, three words": Case((5, 2), 131, (1, 1), 16),
    "draft level": Case((29, 3), 4, (4, 2), 32, first=8),
    "draft level over 64 slots": Case((10,), 5, (3, 1), 16, first=70),
    "window": Case((90, 4), 12, (4, 2), 16, window=9),
    "window of one": Case((40,), 6, (2, 2), 16, window=1),
    "window wider than all": Case((21,), 6, (2, 2), 16, window=500),
    "window within a draft level": Case((50,), 4, (3, 1), 16, first=24, window=3),
    "chunk": Case((75, 64), 12, (4, 2), 16, chunk=16),
    "chunk and window": Case((61,), 13, (2, 1), 16, chunk=32, window=11),
    "softcap": Case((40,), 9, (4, 1), 32, softcap=3.0),
    "sinks": Case((40, 1), 5, (8, 2), 32, sinks=True),
    "sinks, window, softcap": Case((77,), 10, (4, 2), 48, window=20, softcap=20.0, sinks=True),
}
SPLIT = {
    "one node, empty prefix": Case((0,), 1, (1, 1), 16),
    "plain": Case((63,), 11, (3, 1), 32),
    "ragged": Case((111, 0, 33), 3, (4, 2), 16),
    "draft level, window": Case((90,), 4, (4, 2), 16, first=28, window=9),
    "chunk": Case((75, 64), 5, (2, 1), 16, chunk=16),
    "sinks, softcap": Case((100, 1), 4, (3, 1), 24, sinks=True, softcap=20.0),
}


def set_fold(monkeypatch, fold):
    monkeypatch.setattr(module, "_tile", lambda *a, tile=module._tile: tile(*a)._replace(fold=fold))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_kernel_equals_dense_attention(case, device, monkeypatch):
    set_fold(monkeypatch, True)
    problem = build(case)
    out = run(tree_attention, to(problem, device))
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), oracle(case, problem), atol=5e-6, rtol=1e-5)


@pytest.fixture
def nan_in_new_memory():
    """Freshly allocated tensors hold NaN."""
    torch.use_deterministic_algorithms(True)  # fills them
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("triton_kernels", "nan_in_new_memory")
@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT.keys())
def test_splits_combine_to_dense_attention(case, device, monkeypatch):
    """A program for each split, of which most find no rows left, and write nothing."""
    set_fold(monkeypatch, False)
    problem = build(case)
    out = run(tree_attention, to(problem, device)).cpu()
    torch.testing.assert_close(out.double(), oracle(case, problem), atol=5e-6, rtol=1e-5)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_in_half_precision(dtype, device):
    case = Case((63, 5), 7, (4, 2), 32, window=40, sinks=True)
    problem = build(case, dtype)
    expected = oracle(case, problem)
    error = (run(tree_attention, to(problem, device)).cpu().double() - expected).abs().max()
    # bf16 stores truncate in the interpreter: one unit in the last place instead of half of one.
    assert error < expected.abs().max() * (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_reference_equals_dense_attention(case):
    problem = build(case)
    torch.testing.assert_close(run(tree_attention_ref, problem).double(), oracle(case, problem), atol=2e-6, rtol=1e-5)


def test_reference_keeps_fp64():
    case = SMALL["sinks, window, softcap"]
    problem = build(case, torch.float64)
    torch.testing.assert_close(run(tree_attention_ref, problem), oracle(case, problem), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_query_that_sees_nothing_gets_zeros(way, monkeypatch, device):
    """Padding rows of a batch carry an empty mask; their sequence may be empty too."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    problem = build(Case((0,), 5, (2, 1), 16), device=device)
    problem.ancestors[:, 3] = 0
    out = run(tree_attention, problem)
    assert out[:, 3].eq(0).all()
    assert out[:, :3].ne(0).all()


@pytest.mark.usefixtures("triton_kernels")
def test_bits_past_the_live_slots_are_ignored(device):
    problem = build(Case((30,), 6, (2, 1), 16, first=3), device=device)
    expected = run(tree_attention, problem)
    problem.ancestors.bitwise_or_(-1 << 9)
    assert torch.equal(run(tree_attention, problem), expected)


@pytest.mark.usefixtures("triton_kernels")
def test_strided_masks_and_depths(device):
    """One mask buffer serves every draft level: rows of a longer tensor, wider than they need to be."""
    case = Case((30, 7), 6, (2, 1), 16, first=3, window=20)
    problem = build(case, device=device)
    words = torch.full((2, 20, 3), -1, device=device)
    words[:, 5:11, :1] = problem.ancestors
    depths = torch.full((2, 40), 10**6, device=device)
    depths[:, :9] = problem.options["depths"]
    changed = problem._replace(ancestors=words[:, 5:11], options=problem.options | {"depths": depths})
    assert torch.equal(run(tree_attention, changed), run(tree_attention, problem))


@pytest.mark.usefixtures("triton_kernels")
def test_strided_caches(device):
    """K and V need not share a layout: [B, L, Hkv, D] beside a slab whose rows have NaN between them."""
    problem = build(Case((30, 7), 6, (6, 3), 16), device=device)
    rows_first = problem.k.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.full((*problem.v.shape[:3], 24), float("nan"), device=device)
    padded[..., :16] = problem.v
    changed = problem._replace(q=problem.q.contiguous(), k=rows_first, v=padded[..., :16])
    assert torch.equal(run(tree_attention, changed), run(tree_attention, problem))


def test_window_without_depths_is_refused():
    problem = build(Case((30,), 6, (2, 1), 16))
    with pytest.raises(ValueError, match="pass the depths"):
        tree_attention(*problem[:5], scale=1.0, window=4)


@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (8, 1), (64, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [101376, 166912, 232448], ids=["100 KB", "163 KB", "227 KB"])
def test_tiles_fit_the_gpu(heads, head_dim, dtype, memory, monkeypatch):
    """Shared memory of one program holds a query tile and every stage's K and V; all take the same blocks of keys."""
    monkeypatch.setattr(module, "resources", lambda device: (132, memory))
    blocks = set()
    for num_queries in (1, 10, 60, 256):
        for num_sequences in (1, 32):
            q = torch.empty(num_sequences, heads[0], num_queries, head_dim, dtype=dtype, device="meta")
            k = torch.empty(num_sequences, heads[1], 4096, head_dim, dtype=dtype, device="meta")
            tile = module._tile(q, k, 0)
            block_d = 1 << (head_dim - 1).bit_length()
            rows = tile.block_m + 2 * tile.block_n * tile.num_stages
            assert rows * block_d * q.element_size() <= memory
            programs = -(-num_queries * heads[0] // heads[1] // tile.block_m) * heads[1] * num_sequences
            assert tile.fold == (programs >= 99)
            blocks.add(tile.block_n)
    assert len(blocks) == 1
    assert module.UNIT.value % blocks.pop() == 0


# Shapes of Llama, Qwen2.5 (7 heads per KV head), Phi, Gemma-2, gpt-oss, MHA models; 32,000 rows: many tiles per split.
REAL = {
    "llama 8b, verify, 2k": Case((2048,), 60, (32, 8), 128),
    "llama 8b, verify, 32k": Case((32000,), 60, (32, 8), 128),
    "llama 8b, no prefix": Case((0,), 60, (32, 8), 128),
    "llama 8b, one token, 32k": Case((32000,), 1, (32, 8), 128),
    "llama 8b, one token, nothing else": Case((0,), 1, (32, 8), 128, spare=2000),
    "llama 8b, draft level": Case((1111,), 10, (32, 8), 128, first=40),
    "llama 70b, 256 nodes": Case((777,), 256, (64, 8), 128),
    "8 ragged sequences": Case((5, 2048, 0, 333, 64, 1023, 17, 900), 63, (32, 8), 128),
    "mha, D 64": Case((500,), 111, (12, 12), 64),
    "gqa 3, D 64": Case((1500,), 61, (9, 3), 64),
    "gqa 7, D 128": Case((900,), 60, (28, 4), 128),
    "mqa, D 128": Case((900,), 60, (48, 1), 128),
    "D 80, window": Case((3000, 100), 60, (32, 32), 80, window=2047),
    "D 96, window": Case((3000,), 60, (32, 32), 96, window=2047),
    "D 256, softcap, window": Case((5000, 600), 60, (16, 8), 256, window=4096, softcap=50.0),
    "D 256, gqa 8, 200 nodes": Case((1000,), 200, (8, 1), 256),
    "gpt-oss, sinks, window": Case((1000, 50), 60, (64, 8), 64, window=128, sinks=True),
    "chunk": Case((9000,), 60, (40, 8), 128, chunk=8192),
}


PRECISIONS = [
    pytest.param(case, dtype, id=f"{name}, {dtype}")
    for name, case in REAL.items()
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if "llama" in name or "256" in name else ()))
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), PRECISIONS)
def test_real_shapes_are_as_close_as_pytorch(case, dtype):
    problem = build(case, dtype, "cuda")
    wide = problem._replace(q=problem.q.double(), k=problem.k.double(), v=problem.v.double())
    exact = run(tree_attention_ref, wide)
    error = run(tree_attention, problem).double() - exact
    pytorch_error = naive(case, problem).double() - exact
    allowed = 2 * pytorch_error.abs().max()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()  # of the output itself, which is not to be avoided
    assert error.isfinite().all()
    assert error.abs().max() <= allowed + rounding
    # averages of 32,000 values are small beside their terms: there the bound is PyTorch's own error
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype] * exact.norm()
    assert error.norm() <= max(bound, pytorch_error.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama 8b, verify, 32k", "gqa 7, D 128", "D 96, window", "gpt-oss, sinks, window"])
def test_a_row_does_not_depend_on_the_others(name, dtype):
    """Bit by bit: with other queries in all the other rows. How many there are: test_tree_attention_bits.py."""
    problem = build(REAL[name], dtype, "cuda")
    expected = run(tree_attention, problem)
    for node in (0, 17, REAL[name].num_queries - 1):
        others = torch.randn_like(problem.q)
        others[:, :, node] = problem.q[:, :, node]
        assert torch.equal(run(tree_attention, problem._replace(q=others))[:, node], expected[:, node])


def check_replays(problem, every):
    """Nothing of a launch depends on the lengths: a graph captured at one is right at others."""
    problem.k.nan_to_num_()
    problem.v.nan_to_num_()
    run(tree_attention, problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = run(tree_attention, problem)
    for lengths in every:
        problem.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        torch.testing.assert_close(out, run(tree_attention_ref, problem), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_captured_graph_serves_every_length():
    problem = build(Case((3000, 2000), 60, (32, 8), 128), torch.bfloat16, "cuda")
    check_replays(problem, ((0, 17), (3000, 1), (64, 2999), (1000, 1000)))


def naive(case, problem):
    """Attention as PyTorch code writes it, every step in the inputs' precision, softmax in fp32."""
    q, k, v, options = problem.q, problem.k, problem.v, problem.options
    num_rows = k.shape[2]
    slots = torch.arange(num_rows, device=q.device) - problem.lengths[:, None]
    depths, first, window, chunk = (options[name] for name in ("depths", "first", "window", "chunk"))
    visible = _visible(slots, problem.lengths, problem.ancestors, depths, first, case.num_queries, window, chunk)
    visible = visible[:, None]
    group = case.heads[0] // case.heads[1]
    keys = k.nan_to_num().repeat_interleave(group, 1)
    scores = (q @ keys.transpose(2, 3)) * options["scale"]
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if case.sinks:
        sink = options["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., :num_rows].to(q.dtype)
    return (weights @ v.nan_to_num().repeat_interleave(group, 1)).transpose(1, 2)


# -- many rows over a long cache: kernels/tree_attention_hopper.py -----------------------------------------------------

on_hopper = pytest.mark.skipif(
    not (module.HAS_GLUON and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="needs a Hopper GPU and a release of Triton that the kernel is written for",
)


@pytest.fixture
def by_hopper(monkeypatch):
    """Caches of any length."""
    monkeypatch.setattr(module, "HOPPER_CACHE", 0)


ENDS = [(0,), (1,), (63,), (64,), (65,), (4000,), (5000,), (5000, 0, 129), (127, 4000, 1)]


def long_case(lengths, num_queries, rows=8192, **options):
    spare = rows - max(lengths) - num_queries - options.get("first", 0)
    return Case(lengths, num_queries, (32, 8), 128, spare=spare, **options)


def relative_error(out, exact):
    assert out.isfinite().all()
    return ((out.float() - exact).norm() / exact.norm()).item()


@on_hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("by_hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_queries", [17, 60, 64, 100])
@pytest.mark.parametrize("lengths", ENDS, ids=str)
def test_specialised_warps_give_the_bits_of_the_other_kernel(lengths, num_queries, dtype, monkeypatch):
    """The prefix ends anywhere in a block of 64 rows; several sequences also have a draft's `first` and sinks."""
    options = {"first": 30, "sinks": True} if len(lengths) > 1 else {}
    problem = build(long_case(lengths, num_queries, **options), dtype, "cuda")
    assert module._by_hopper(problem.q, problem.k, problem.v, 0)
    wide = problem._replace(q=problem.q.float(), k=problem.k.float(), v=problem.v.float())
    exact = run(tree_attention_ref, wide)
    out = run(tree_attention, problem)
    assert relative_error(out, exact) < (1e-3 if dtype == torch.float16 else 6e-3)
    monkeypatch.setattr(module, "HOPPER_CACHE", 2**40)
    assert torch.equal(run(tree_attention, problem), out)


@on_hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("by_hopper")
@pytest.mark.parametrize("lengths", [(4500,), (4500, 300), (130,)], ids=str)
def test_specialised_warps_where_the_cache_ends_in_a_block(lengths):
    """The cache has no row past the live ones of the longest sequence."""
    problem = build(long_case(lengths, 60, rows=4560), torch.bfloat16, "cuda")
    assert module._by_hopper(problem.q, problem.k, problem.v, 0)
    wide = problem._replace(q=problem.q.float(), k=problem.k.float(), v=problem.v.float())
    assert relative_error(run(tree_attention, problem), run(tree_attention_ref, wide)) < 6e-3


@on_hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("by_hopper")
def test_specialised_warps_give_zeros_to_a_query_that_sees_nothing():
    problem = build(long_case((0, 300), 60), torch.bfloat16, "cuda")
    problem.ancestors[:, 3] = 0
    out = run(tree_attention, problem)
    assert out[0, 3].eq(0).all()
    assert out[1, 3].ne(0).any()
    assert out.isfinite().all()


@on_hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("by_hopper")
def test_captured_graph_of_specialised_warps_serves_every_length():
    problem = build(long_case((5000, 2000, 0), 60), torch.bfloat16, "cuda")
    check_replays(problem, ((0, 17, 5000), (8132, 1, 128), (64, 4999, 127), (3000, 3000, 3000)))


@pytest.mark.skipif(not module.HAS_GLUON, reason="another release of Triton")
def test_caches_that_tma_can_fetch():
    """Rows of one matrix on 16 bytes: slabs and parts of their rows, but neither heads side by side nor odd places."""
    slab = torch.empty(2, 3, 8, 40, 128, dtype=torch.bfloat16)
    can_fetch = module.hopper.can_fetch
    assert can_fetch(slab[1])
    assert can_fetch(slab[1, :, :, 4:30])
    assert can_fetch(slab[1, 1:2, 3:4, :, 8:72])
    assert not can_fetch(slab[1].reshape(3, 40, 8, 128).transpose(1, 2))
    assert not can_fetch(slab[1, :, :, :, 4:68])
    assert not can_fetch(torch.empty(3, 8, 40, 132, dtype=torch.bfloat16)[..., :128])
    assert not can_fetch(slab[1, :, :, :1].expand(-1, -1, 40, -1))


COMPILE = """
import sys, torch
from no_gpu import assembled, pretend, recorded
from eagle_fast_kernels import tree_attention_hopper as hopper

pretend(90)
hopper.is_hopper = lambda device: True
compiled = recorded((hopper, "_attend_hopper_kernel"))
q = torch.zeros(1, 32, 60, 128, dtype=getattr(torch, sys.argv[1]))
kv, lengths = torch.zeros(1, 8, 4104, 128, dtype=q.dtype), torch.zeros(1).long()
ancestors = torch.zeros(1, 60, 1).long()
acc, sums = torch.zeros(8, 18, 240, 128), torch.zeros(2, 8, 18, 240)
for pdl in ({"PDL": False}, {"PDL": True, "launch_pdl": True}):
    hopper.attend(q, kv, kv, lengths, ancestors, acc, *sums, scale=0.1, first=0, **pdl)
for each in compiled:
    said = assembled(each, 90, sys.argv[2])
    assert each.metadata.shared <= 232448 and " 0 bytes spill stores" in said and "arning" not in said, said
print("compiled", len(compiled))
"""


@pytest.mark.skipif(not module.HAS_GLUON, reason="another release of Triton")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_specialised_warps_compile_without_spills(dtype, tmp_path):
    """For Hopper, on any machine: what fits, in registers alone, and no product that the compiler puts in sequence."""
    done = run_program(COMPILE, dtype, tmp_path / "kernel.ptx")
    assert done.stdout.split() == ["compiled", "2"], done.stderr


@pytest.mark.parametrize("window", [0, 5, 50])
@pytest.mark.parametrize("sees_itself", [True, False])
def test_a_row_alone_on_a_cpu(window, sees_itself):
    """The way of plain decoding against two copies of the same sequence, which take the long way."""
    torch.manual_seed(0)
    lengths, depths = torch.tensor([17]), torch.zeros(1, 1, dtype=torch.long)
    q, (k, v) = torch.randn(1, 6, 1, 16), torch.randn(2, 1, 2, 40, 16)
    k[:, :, 18:] = v[:, :, 18:] = float("nan")
    ancestors = torch.full((1, 1, 1), int(sees_itself))
    arguments = q, k, v, lengths, ancestors, depths
    *tensors, depths_of_both = (each.repeat(2, *[1] * (each.dim() - 1)) for each in arguments)
    options = {"scale": 0.3, "window": window}
    alone = tree_attention_ref(*arguments[:-1], depths=depths, **options)
    both = tree_attention_ref(*tensors, depths=depths_of_both, **options)
    assert alone.is_contiguous()
    torch.testing.assert_close(alone, both[:1], atol=1e-6, rtol=1e-6)
