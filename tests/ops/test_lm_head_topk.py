"""The draft head's logits, log-softmax and top-k in one pass: kernel and twin against double precision."""

import pytest
import torch
from eagle_fast_kernels.lm_head_topk import lm_head_topk, lm_head_topk_ref
from eagle_fast_kernels.noise import gumbel_ref

from eagle_fast.layers.linear import quantize

OPTIONS = ["bias", "scale", "token_ids", "noise"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    num_rows, vocab_size, hidden_size, options=(), device="cpu", dtype=torch.float32, weight_dtype=None, sequences=None
):
    """hidden, weight and the keywords named in `options`; every third sequence (by default every row is one) has no
    noise, all differ in their scales."""
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(device, dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * (3 / hidden_size**0.5)
    keywords = {}
    if "bias" in options:
        keywords["bias"] = torch.randn(vocab_size, generator=generator).to(device, dtype)
    if "scale" in options:
        keywords["scale"] = (torch.rand(vocab_size, generator=generator) + 0.5).to(device)
    if weight_dtype == torch.int8:
        weight, scale = quantize(weight)
        keywords["scale"] = scale.to(device)
    if "token_ids" in options:
        keywords["token_ids"] = torch.randperm(3 * vocab_size, generator=generator)[:vocab_size].to(device)
    if "noise" in options:
        b = torch.arange(sequences or num_rows, device=device)
        keywords["gain"] = 0.7 + 0.2 * (b % 7)
        keywords["share"] = torch.where(b % 3 == 2, 0.0, 0.5 + 0.3 * (b % 5))
        keywords |= {"positions": 100 + b // 2, "seeds": 7 - (b << 34), "sequences": b % 4}
    return hidden, weight.to(device, weight_dtype or dtype), keywords


def logits_of(hidden, weight, bias=None, scale=None, token_ids=None, gain=None, share=None, **noise_key):
    """The formula in double precision, [R, Vd]."""
    z = torch.cat([hidden.double() @ part.double().T for part in weight.split(4096)], -1)
    z = z if scale is None else z * scale
    z = z if bias is None else z + bias
    if gain is not None:
        tokens = torch.arange(len(weight), device=z.device) if token_ids is None else token_ids
        key = [noise_key[name][:, None] for name in ("seeds", "sequences", "positions")]
        z = gain[:, None] * z + share[:, None] * gumbel_ref(*key, tokens)
    return z


def check(scores, tokens, hidden, weight, k, tolerance, **keywords):
    """Scores within `tolerance`; tokens the k best, save where logits lie within the tolerance of each other."""
    log_probs = logits_of(hidden, weight, **keywords).log_softmax(-1)
    best, index = log_probs.sort(dim=-1, descending=True, stable=True)
    token_ids = keywords.get("token_ids")
    expected = index[:, :k] if token_ids is None else token_ids[index[:, :k]]
    assert scores.dtype == torch.float32
    assert tokens.dtype == torch.int64
    assert (scores.double() - best[:, :k]).abs().max() < tolerance
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (scores <= 0).all()
    assert all(len(set(row)) == k for row in tokens.tolist())
    # Every token carries its own log-probability, so a token out of order is one that ties within the tolerance.
    draft_of = torch.full((int(expected.max()) + len(weight) * 3 + 1,), -1, device=tokens.device)
    draft_of[token_ids if token_ids is not None else torch.arange(len(weight), device=tokens.device)] = torch.arange(
        len(weight), device=tokens.device
    )
    assert (log_probs.gather(1, draft_of[tokens]) - scores).abs().max() < tolerance
    assert (tokens == expected).double().mean() > 0.9


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("num_rows", "k", "options"),
    [(1, 1, ()), (5, 10, OPTIONS), (17, 16, ("noise",)), (33, 3, ("bias", "token_ids")), (70, 2, ("scale",))],
    ids=str,
)
def test_kernel_against_double(num_rows, k, options, device):
    """Row blocks of 16, 32 and twice 64; 203 columns are three tiles and 11 more, 40 features not a multiple either."""
    hidden, weight, keywords = make(num_rows, 203, 40, options, device)
    scores, tokens = lm_head_topk(hidden, weight, k, **keywords)
    check(scores, tokens, hidden, weight, k, 2e-5, **keywords)
    ref_scores, ref_tokens = lm_head_topk_ref(hidden, weight, k, **keywords)
    assert torch.equal(tokens, ref_tokens)
    torch.testing.assert_close(scores, ref_scores, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [(), OPTIONS, *[(name,) for name in OPTIONS]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ref_against_double(options, dtype, device):
    hidden, weight, keywords = make(11, 501, 64, options, device, dtype)
    check(*lm_head_topk_ref(hidden, weight, 7, **keywords), hidden, weight, 7, 2e-5, **keywords)


@pytest.mark.parametrize("options", [OPTIONS, ("noise",)], ids=str)
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_rows_of_a_sequence_share_its_noise(use_kernel, sequences, options, device, request):
    """As with the settings of each sequence given for each of its rows."""
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    hidden, weight, keywords = make(20, 75, 40, options, device, sequences=sequences)
    noise = ("gain", "share", "positions", "seeds", "sequences")
    a_row = keywords | {name: keywords[name].repeat_interleave(20 // sequences) for name in noise}
    for mine, theirs in zip(
        lm_head_topk(hidden, weight, 4, **keywords), lm_head_topk(hidden, weight, 4, **a_row), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_kernel_dtypes_and_strides(dtype, weight_dtype, device):
    """Inputs of 16 and 8 bits multiply without rounding, so they meet the same bound; both operands are views."""
    hidden, weight, keywords = make(6, 75, 48, ("scale", "noise"), device, dtype, weight_dtype)
    hidden = torch.cat([hidden, torch.full_like(hidden, float("nan"))], 1)[:, :48]
    wide = torch.cat([weight.float(), torch.full((75, 16), float("nan"), device=device)], 1).to(weight_dtype)
    scores, tokens = lm_head_topk(hidden, wide[:, :48], 4, **keywords)
    check(scores, tokens, hidden, weight, 4, 2e-5, **keywords)


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_ties_go_to_the_lower_draft_index(use_kernel, device, request):
    """Equal weight rows give equal logits to the bit, within a tile and across tiles."""
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    hidden, weight, _ = make(3, 150, 32, device=device)
    weight = weight.round()
    hidden = hidden.round()
    weight[[3, 40, 90, 149]] = 4 * hidden[0]
    token_ids = torch.arange(150, 0, -1, device=device)
    _, tokens = lm_head_topk(hidden, weight, 6, token_ids=token_ids)
    assert (150 - tokens[0, :4]).tolist() == [3, 40, 90, 149]
    z = hidden @ weight.T  # small integers: exact
    expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :6]
    assert torch.equal(tokens, token_ids[expected])


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_the_best_of_more_tiles_than_k(use_kernel, device, request):
    """Equal maxima of tiles, one tile with all the best, the best in the last tile."""
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    k, vocab_size = 5, 64 * 9 + 1
    logits = torch.zeros(4, vocab_size, device=device)
    logits[1, 300:310] = torch.arange(10.0, device=device)
    logits[2, ::64] = 3.0
    logits[2, 7::64] = 3.0
    logits[3, -1] = 1.0
    hidden = torch.eye(4, 32, device=device)
    _, tokens = lm_head_topk(hidden, torch.nn.functional.pad(logits.T, (0, 28)), k)
    expected = [[0, 1, 2, 3, 4], [309, 308, 307, 306, 305], [0, 7, 64, 71, 128], [vocab_size - 1, 0, 1, 2, 3]]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_rows_that_are_not_finite(use_kernel, device, request):
    """NaN counts as -inf, tokens stay distinct and inside the vocabulary, other rows do not notice."""
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    hidden, weight, _ = make(3, 70, 32, device=device)
    clean_scores, clean_tokens = lm_head_topk(hidden, weight, 5)
    hidden[1] = float("nan")
    bias = torch.zeros(70, device=device)
    bias[60:] = float("-inf")
    scores, tokens = lm_head_topk(hidden, weight, 5, bias=bias)
    assert scores[1].tolist() == [float("-inf")] * 5
    assert tokens[1].tolist() == [0, 1, 2, 3, 4]
    assert (tokens < 60).all()
    unbiased_scores, unbiased_tokens = lm_head_topk(hidden, weight, 5)
    assert torch.equal(unbiased_tokens[::2], clean_tokens[::2])
    assert torch.equal(unbiased_scores[::2], clean_scores[::2])
    nearly_all = torch.full((70,), float("-inf"), device=device)
    nearly_all[66] = 0.0
    scores, tokens = lm_head_topk(hidden[:1], weight, 5, bias=nearly_all)
    assert scores[0].tolist() == [0.0] + [float("-inf")] * 4
    assert tokens[0].tolist() == [66, 0, 1, 2, 3]


def test_noise_needs_all_of_its_arguments():
    hidden, weight, keywords = make(2, 9, 8, ("noise",))
    del keywords["seeds"]
    with pytest.raises(ValueError, match="together"):
        lm_head_topk(hidden, weight, 2, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 10, 16, 33, 64, 100])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-4),
        (torch.bfloat16, torch.bfloat16, 2e-4),
        (torch.float16, torch.float16, 2e-4),
        (torch.bfloat16, torch.int8, 2e-4),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [(), ("token_ids", "noise")], ids=str)
def test_at_size(num_rows, dtype, weight_dtype, tolerance, options, device):
    """EAGLE-3's head for Llama-3.1-8B. Products of 16-bit inputs are exact: only the float32 sums over 4096 round."""
    hidden, weight, keywords = make(num_rows, 32000, 4096, options, device, dtype, weight_dtype)
    scores, tokens = lm_head_topk(hidden, weight, 10, **keywords)
    check(scores, tokens, hidden, weight, 10, tolerance, **keywords)


@pytest.mark.gpu
def test_whole_vocabulary_at_size(device):
    """EAGLE-1 and -2 heads share the target's vocabulary."""
    hidden, weight, keywords = make(10, 128256, 1024, ("noise",), device, torch.bfloat16)
    scores, tokens = lm_head_topk(hidden, weight, 10, **keywords)
    check(scores, tokens, hidden, weight, 10, 2e-4, **keywords)
