"""Sampling: kernel against twin, both against transformers' warpers, and the distribution that comes out."""

import pytest
import torch
from eagle_fast_kernels import sample as sample_module
from eagle_fast_kernels import sample_threshold
from eagle_fast_kernels.noise import gumbel_row_ref
from eagle_fast_kernels.sample import sample
from eagle_fast_kernels.sample_ref import sample_ref, warp_ref
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# temperature, top_k, top_p, min_p: every warper off, alone, together, at its extremes.
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.2),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 40, 0.8, 0.05),
    (1.0, 0, 0.6, 0.02),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 1.0),
    (1.0, 10**6, 1.0, 0.0),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several steps per row at sizes that the interpreter can take."""
    monkeypatch.setattr(sample_module, "CHUNK", 128)
    monkeypatch.setattr(sample_threshold, "TILE", 128)


def make_settings(settings, device):
    """temperature, top_k, top_p, min_p [B] of B rows of SETTINGS, then seeds and sequences."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    columns = zip(zip(*settings, strict=True), dtypes, strict=True)
    columns = [torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns]
    rows = torch.arange(len(settings), device=device)
    return [*columns, 1000 - (rows << 33), rows % 3]


def make_logits(num_sequences, num_nodes, vocab_size, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, num_nodes, vocab_size, generator=generator) * scale


def warp_with_transformers(x, top_k, top_p, min_p):
    """x [R, V] through the warpers of one setting."""
    if top_k:
        x = TopKLogitsWarper(top_k)(None, x)
    if top_p < 1:
        x = TopPLogitsWarper(top_p)(None, x)
    if min_p:
        x = MinPLogitsWarper(min_p)(None, x)
    return x


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("levels", [None, 8], ids=["distinct", "ties"])
def test_kept_sets_are_those_of_transformers(setting, levels):
    x = make_logits(1, 40, 1003)[0]
    if levels:
        x = (x * levels).round() / levels
    _, top_k, top_p, min_p = setting
    kept = warp_ref(x[None], *make_settings([setting], "cpu")[1:4])[0].isfinite()
    expected = warp_with_transformers(x, top_k, top_p, min_p).isfinite()
    if levels is None or top_p == 1:
        assert torch.equal(kept, expected)
        return
    # Of the tokens that tie at the nucleus' border we keep all; above and below it the sets agree.
    assert (kept | ~expected).all()
    border = x.masked_fill(~expected, float("inf")).amin(-1, keepdim=True)
    assert torch.equal(kept & (x > border), expected & (x > border))
    assert not (kept & (x < border)).any()


@pytest.mark.usefixtures("triton_kernels", "small_tiles")
@pytest.mark.parametrize("setting", SETTINGS)
def test_kernel_against_transformers(setting, device):
    """A row that is not a multiple of the tile (161 = 128 + 33): argmax of the warped logits plus noise."""
    logits, positions = make_logits(1, 2, 161).to(device), torch.tensor([[4, 4000]], device=device)
    arguments = make_settings([setting], device)
    temperature, top_k, top_p, min_p = setting
    if temperature:
        x = warp_with_transformers(logits[0] / temperature, top_k, top_p, min_p)
        expected = (x + gumbel_row_ref(arguments[4], arguments[5], positions[0], 161)).argmax(-1)
    else:
        expected = logits[0].argmax(-1)
    assert torch.equal(sample(logits, positions, *arguments)[0], expected)
    assert torch.equal(sample_ref(logits, positions, *arguments)[0], expected)


@pytest.mark.usefixtures("triton_kernels", "small_tiles")
@pytest.mark.parametrize("lane_slots", [1, 2], ids=["overflow", "packed"])
def test_kernel_when_candidates_do_not_fit(lane_slots, monkeypatch, device):
    """Flat rows leave most of the vocabulary to the warpers; with one slot a lane the kernel scans the row instead."""
    monkeypatch.setattr(sample_threshold, "LANE_SLOTS", lane_slots)
    arguments = make_settings([(1.0, 0, 0.9, 0.0), (1.0, 100, 0.7, 0.01)], device)
    logits = make_logits(2, 1, 161, scale=0.5).to(device)
    positions = torch.tensor([[1], [2]], device=device)
    assert torch.equal(sample(logits, positions, *arguments), sample_ref(logits, positions, *arguments))


@pytest.mark.usefixtures("triton_kernels", "small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_with_mixed_settings_dtypes_and_strides(dtype, device):
    """Sequences of a batch differ in every setting; the logits are a slice of a wider buffer, the positions a view."""
    settings = [SETTINGS[i] for i in (0, 2, 6)]
    wide = torch.full((3, 3, 200), float("nan"))
    wide[:, 1:, 5:166] = make_logits(3, 2, 161)
    logits = wide.to(device, dtype)[:, 1:, 5:166]
    positions = torch.arange(6, device=device).view(2, 3).T + 50
    arguments = make_settings(settings, device)
    tokens = sample(logits, positions, *arguments)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, sample_ref(logits, positions, *arguments))


def special_rows(vocab_size):
    """Rows with something odd in them, and the greedy answer to each."""
    rows = torch.full((7, vocab_size), -1.0)
    rows[0, vocab_size // 2] = float("nan")
    rows[1] = float("-inf")
    rows[2, 3] = float("inf")
    rows[3] = float("-inf")
    rows[3, vocab_size - 1] = -50.0
    rows[4, [7, vocab_size - 2]] = 5.0
    rows[5] = 0.0
    rows[6, 2:4] = torch.tensor([-0.0, 0.0])
    return rows[None], [-1, -1, -1, vocab_size - 1, 7, 0, 2]


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (0, 2, 6)])
def test_special_rows(use_kernel, setting, device, request):
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    logits, greedy = special_rows(150)
    positions = torch.arange(7, device=device)[None]
    op = sample if use_kernel else sample_ref
    tokens = op(logits.to(device), positions, *make_settings([setting], device))[0].tolist()
    if setting[0] == 0:
        assert tokens == greedy
    else:
        assert tokens[:4] == greedy[:4]
        assert all(0 <= token < 150 for token in tokens[4:])


@pytest.mark.parametrize("temperature", [1e-30, 1e-5])
def test_tiny_temperature_is_greedy(temperature, device):
    logits = make_logits(1, 20, 500, scale=100).to(device)
    arguments = make_settings([(temperature, 0, 0.9, 0.1)], device)
    tokens = sample(logits, torch.zeros(1, 20, dtype=torch.int64, device=device), *arguments)
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_tree_draws_what_the_plain_loop_draws(device):
    """The token of a row is a function of (logits, seed, sequence, position), not of the rows it is verified with."""
    logits = make_logits(2, 13, 777).to(device)
    positions = torch.randint(0, 5000, (2, 13), generator=torch.Generator().manual_seed(1)).to(device)
    for setting in SETTINGS[2:8]:
        arguments = make_settings([setting, setting], device)
        together = sample(logits, positions, *arguments)
        for b in range(2):
            of_b = [a[b : b + 1] for a in arguments]
            for t in range(13):
                alone = sample(logits[b : b + 1, t : t + 1], positions[b : b + 1, t : t + 1], *of_b)
                assert alone.item() == together[b, t].item()


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (2, 4, 6)])
def test_distribution_is_the_softmax(setting, device):
    """Chi-square over the positions of one sequence: 1e-6 quantiles of 12 and 20 degrees of freedom are 49 and 62."""
    num_draws, vocab_size = 40_000, 13
    logits = make_logits(1, 1, vocab_size, scale=1.5).to(device)
    positions = torch.arange(num_draws, device=device)[None]
    arguments = make_settings([setting], device)
    tokens = sample(logits.expand(1, num_draws, vocab_size), positions, *arguments)
    probs = warp_with_transformers(logits[0].cpu() / setting[0], *setting[1:])[0].softmax(-1).double()
    counts = torch.bincount(tokens[0].cpu(), minlength=vocab_size)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * num_draws
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 49
    # Neighbouring positions are independent: the joint counts of the two likeliest tokens.
    top = probs.topk(2).indices
    first, second = (tokens[0, :-1].cpu() == top[0]), (tokens[0, 1:].cpu() == top[1])
    joint, product = (first & second).double().mean(), probs[top[0]] * probs[top[1]]
    assert abs(joint - product) < 5 * (product / num_draws).sqrt()


def assert_same_up_to_rounding(tokens, logits, positions, arguments):
    """Tokens differ from the twin's only where sums or logarithms rounded differently: few rows, each of them close."""
    expected = sample_ref(logits, positions, *arguments)
    differs = (tokens != expected).nonzero()
    assert len(differs) <= max(1, 0.02 * tokens.numel())
    temperature, top_k, top_p, min_p, seeds, sequences = arguments
    for b, t in differs.tolist():
        x = logits[b, t].float() / temperature[b]
        warped = warp_ref(x[None, None], *(a[b : b + 1] for a in (top_k, top_p, min_p)))[0, 0]
        y = x + gumbel_row_ref(seeds[b], sequences[b], positions[b, t], len(x))
        pair = torch.stack([tokens[b, t], expected[b, t]])
        border = warped[warped.isfinite()].min()
        assert (y[pair[0]] - y[pair[1]]).abs() < 1e-4 or (x[pair] - border).abs().min() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_at_size(setting, num_sequences, dtype, device):
    """60 nodes over the vocabulary of Llama 3, with a peaked row, a flat one and one that holds a NaN."""
    logits = make_logits(num_sequences, 60, 128256).to(device)
    logits[:, 0] *= 0.05
    logits[:, 1] *= 3
    logits[:, 2, 100_000] = float("nan")
    logits = logits.to(dtype)
    positions = torch.randint(0, 30000, (num_sequences, 60), device=device)
    arguments = make_settings([setting] * num_sequences, device)
    tokens = sample(logits, positions, *arguments)
    assert (tokens[:, 2] == -1).all()
    if setting[0] == 0:
        assert torch.equal(tokens, sample_ref(logits, positions, *arguments))
    else:
        assert_same_up_to_rounding(tokens, logits, positions, arguments)


@pytest.mark.gpu
def test_one_graph_serves_all_settings(device):
    logits, positions = make_logits(2, 5, 32000).to(device), torch.arange(10, device=device).view(2, 5)
    arguments = make_settings([SETTINGS[0]] * 2, device)
    sample(logits, positions, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        tokens = sample(logits, positions, *arguments)
    for setting in SETTINGS:
        for static, value in zip(arguments, make_settings([setting] * 2, device), strict=True):
            static.copy_(value)
        graph.replay()
        assert torch.equal(tokens, sample(logits, positions, *arguments))
