"""To the bit: in 16 bits on a GPU, text and logits with a head are those of plain decoding of each prompt alone.

The models of the zoo are sharp, so a text alone would forgive most roundings: the logits of every token are compared as
well, and its log-probability. A test at the end shows that what depends on the neighbours is found.
"""

import functools
import random
import tempfile
import warnings
from typing import NamedTuple

import pytest
import torch
from decoders import prompt, rebuilt, with_head
from often_right import write_often_right_head
from torch import Tensor
from zoo import make

from eagle_fast import EaModel, SamplingParams, TreeConfig
from eagle_fast.config import MAX_DEPTH, ROOT_ALONE
from eagle_fast.decoding.records import Keeps
from eagle_fast.decoding.request import pad_left
from eagle_fast.decoding.round import Round

# plain, norms of q and k, windows and a soft cap, longrope's switch at 64 tokens, layers with LayerNorm and biases
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3_longrope", "gpt2", "olmo2"]
DTYPES = [torch.bfloat16, torch.float16]
SETTINGS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "top_p": 0.9}}
LENGTHS = [9, 1, 70, 130, 33]
TREES = [TreeConfig(60, 7, 10), TreeConfig(8, 7, 1), TreeConfig(4, 3, 1)]
CONTEXTS = [63, 64, 65, 127, 2047, 4095, 32000]
NEW = 40
gpu = pytest.mark.gpu
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


class Text(NamedTuple):
    """What was decoded of one sequence: N new tokens, their logits [N, V] and log-probabilities [N]."""

    tokens: list[int]
    logits: Tensor
    logprobs: Tensor


@functools.cache
def half(name, dtype, device, tree=TREES[0]):
    """A decoder in 16 bits, with a head that is often right."""
    return with_head(make(name, dtype=dtype), device, **vars(tree))


def prompts(lengths):
    return [prompt(length, torch.device("cpu"), seed)[0].tolist() for seed, length in enumerate(lengths)]


def decode(model, method, texts, seeds, **options):
    """(a Text for each sequence, statistics) of prompts that are decoded as one batch."""
    batch = {name: each.to(model.target.device) for name, each in pad_left(texts).items()}
    wanted = {"output_logits": True, "output_logprobs": True, "return_dict_in_generate": True}
    options = {"max_new_tokens": NEW, "seed": seeds, **wanted, **options}
    out = getattr(model, method)(**batch, **options)
    first, logits = max(map(len, texts)), torch.stack(out.logits, 1)
    rows = zip(out.sequences[:, first:].tolist(), logits, out.logprobs, out.statistics.new_tokens, strict=True)
    return [Text(new[:n], own[:n], probs[:n]) for new, own, probs, n in rows], out.statistics


def alone(model, texts, **options):
    """Plain decoding of each prompt by itself, with its own seed."""
    return [decode(model, "naivegenerate", [text], [seed], **options)[0][0] for seed, text in enumerate(texts)]


def different_rows(found, expected):
    """How many rows of logits, over all texts, have a bit that is not the expected one, up to where texts part."""
    count = 0
    for mine, theirs in zip(found, expected, strict=True):
        pairs = zip(mine.logits.view(torch.int32), theirs.logits.view(torch.int32), strict=False)
        count += sum(not torch.equal(one, other) for one, other in pairs)
    return count


def assert_same(found, expected):
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert different_rows(found, expected) == 0
    assert all(torch.equal(mine.logprobs, theirs.logprobs) for mine, theirs in zip(found, expected, strict=True))


# -- texts -------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_neither_head_nor_neighbours_change_a_bit(name, dtype, settings, device):
    """One prompt at a time, and five of other lengths at once."""
    model, texts, options = half(name, dtype, device), prompts(LENGTHS), SETTINGS[settings]
    expected, seeds = alone(model, texts, **options), list(range(len(texts)))
    tokens = rounds = 0
    for seed, text in enumerate(texts):
        found, statistics = decode(model, "eagenerate", [text], [seed], **options)
        assert_same(found, expected[seed : seed + 1])
        tokens, rounds = tokens + sum(statistics.new_tokens), rounds + sum(statistics.accepted)
    assert tokens > 1.5 * rounds, "trees of which nothing is accepted show little"
    for method in ("eagenerate", "naivegenerate"):
        assert_same(decode(model, method, texts, seeds, **options)[0], expected)


@gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_no_tree_changes_a_bit(tree, dtype, settings, device):
    texts, options = prompts(LENGTHS), SETTINGS[settings]
    for name in ("llama", "gemma3_text"):
        model = half(name, dtype, device, tree)
        expected = alone(model, texts, **options)
        assert_same(decode(model, "eagenerate", texts[3:4], [3], **options)[0], expected[3:4])
        assert_same(decode(model, "eagenerate", texts, list(range(5)), **options)[0], expected)


@functools.cache
def packed(bits, dtype, device, tree=TREES[0]):
    """The same of a model whose weights are rounded to so many bits, lm_head and embedding to 8."""
    model = make("qwen2", num_hidden_layers=3, hidden_size=256, intermediate_size=1536)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* runs from its packed weights")
        model.save_pretrained(folder)
        options = {"device_map": device.type, "dtype": dtype, "target_bits": bits, "lm_head_bits": 8, **vars(tree)}
        return EaModel.from_pretrained(None, folder, write_often_right_head(model, f"{folder}/head"), **options)


@gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_change_no_bit(bits, dtype, settings, device):
    """One prompt and five, each with a large tree, a chain and a few nodes: rows for the kernel alone, and for more."""
    texts, options = prompts(LENGTHS), SETTINGS[settings]
    for tree in TREES:
        model = packed(bits, dtype, device, tree)
        assert model.exactness == "bitwise", model.exactness.reason
        expected = alone(model, texts, **options)
        assert_same(decode(model, "eagenerate", texts[3:4], [3], **options)[0], expected[3:4])
        for method in ("eagenerate", "naivegenerate"):
            assert_same(decode(model, method, texts, list(range(5)), **options)[0], expected)


@gpu
def test_samples_of_one_prompt_are_as_alone(device):
    model, text = half("llama", torch.bfloat16, device), prompts([33])[0]
    expected = alone(model, [text] * 5, temperature=1.0)
    found, _ = decode(model, "eagenerate", [text] * 5, list(range(5)), temperature=1.0)
    assert len({tuple(each.tokens) for each in found}) == 5
    assert_same(found, expected)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_allocated_rows_change_no_bit(name, dtype, device):
    """Caches of 256 rows and of 8192, with the head and without."""
    model, texts, found = half(name, dtype, device), prompts([9, 120, 64]), []
    for head, tree in ((None, ROOT_ALONE), (model.ea_layer, model.tree)):
        for capacity in (256, 8192):
            for batch in ([texts[0]], texts):
                state = Round(model.target, head, tree, len(batch), capacity - tree.num_slots, Keeps.ROWS)
                assert state.cache.slab.capacity == capacity
                found.append(first_text(state, batch))
    assert_same(found[1:], found[:1] * (len(found) - 1))


def first_text(state, texts):
    """NEW tokens of the first of these prompts."""
    state.sampling.load(SamplingParams(), shared_noise=True)
    state.begin(texts, [len(text) + NEW - 1 for text in texts])
    assert state.kept is not None
    tokens, logits, logprobs = [], [], []
    while len(tokens) < NEW:
        state.step()
        count = int(state.counts[0])
        tokens += state.emitted[0, :count].tolist()
        logits.append(state.kept.logits[0, :count].clone())
        logprobs.append(state.kept.logprobs[0, :count].clone())
    return Text(tokens, torch.cat(logits), torch.cat(logprobs))


@gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3_longrope"])
def test_turns_that_reuse_rows_are_plain_decodings(name, dtype, settings, device):
    """Three conversations alone and as a batch: each goes on from its own rows, whatever its neighbours share."""
    model, texts = rebuilt(half(name, dtype, device)), prompts([9, 70, 33])
    more, seeds = prompts([3, 20, 1]), [0, 1, 2]
    options = {**SETTINGS[settings], "reuse_cache": True}

    def turns(method, rows):
        model.states.clear()
        said, own = [texts[row] for row in rows], [seeds[row] for row in rows]
        first, _ = decode(model, method, said, own, **options)
        longer = [[*text, *new.tokens, *more[row]] for text, new, row in zip(said, first, rows, strict=True)]
        second, statistics = decode(model, method, longer, own, **options)
        return first, second, statistics.reused_tokens

    plain = [turns("naivegenerate", [row]) for row in range(3)]
    expected = [[each[turn][0] for each in plain] for turn in range(2)]
    reused = [each[2][0] for each in plain]
    assert sum(count > 0 for count in reused) >= 2, "one may have passed longrope's switch"
    together = turns("eagenerate", range(3))
    assert together[2] == reused
    for turn in range(2):
        assert_same(together[turn], expected[turn])
    for row in range(3):
        single = turns("eagenerate", [row])
        assert single[2] == reused[row : row + 1]
        for turn in range(2):
            assert_same(single[turn], expected[turn][row : row + 1])


# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree_bits(bench):
    return bench("lib.tree_bits")


def trees(tree_bits, batch, rng):
    """The longest chain, a star and random ones, of a number of nodes each, for every sequence of a batch."""
    yield [[*range(-1, MAX_DEPTH)]] * batch
    yield [[-1, *[0] * 59]] * batch
    for num_nodes in (2, 5, 17, 40, 64):
        yield [tree_bits.random_parents(num_nodes, rng) for _ in range(batch)]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nodes_have_the_logits_of_their_text_token_by_token(name, dtype, device, tree_bits):
    """Behind contexts at the edges of blocks, in the middle of neighbours with others."""
    check_nodes(half(name, dtype, device).target, tree_bits)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_nodes_of_packed_targets_have_the_logits_of_their_text(bits, dtype, device, tree_bits):
    check_nodes(packed(bits, dtype, device).target, tree_bits)


def check_nodes(target, tree_bits):
    rng = random.Random(3)
    for batch in (1, 5):
        contexts = tree_bits.MadeUpContexts(target, batch, max(CONTEXTS))
        for length in CONTEXTS:
            for parents in trees(tree_bits, batch, rng):
                lengths, row = [rng.choice(CONTEXTS) for _ in range(batch)], rng.randrange(batch)
                lengths[row] = length
                leaf = tree_bits.random_leaf(parents[row], rng)
                found = contexts.compare(lengths, parents, row, leaf, rng)
                assert found.differ == 0, (batch, length, len(parents[row]), found)


# -- what a fault looks like -------------------------------------------------------------------------------------------


def attention_in_parts(q, k, v, lengths, ancestors, *, scale, **_):
    """`tree_attention` of a layer without window or cap, adding up 16-bit parts, as many as there are rows: what each
    row gets depends on its neighbours."""
    (batch, heads, count, _), (_, kv_heads, rows, _) = q.shape, k.shape
    slots = torch.arange(rows, device=q.device) - lengths[:, None]
    most = 64 * ancestors.shape[2]
    words = ancestors.gather(2, (slots.clamp(0, most - 1) >> 6)[:, None].expand(-1, count, -1))
    seen = (words >> (slots.clamp(min=0) & 63)[:, None] & 1 == 1) & (slots < most)[:, None]
    visible = (seen | (slots < 0)[:, None])[:, None]
    k, v = (each.repeat_interleave(heads // kv_heads, 1).float().nan_to_num() for each in (k, v))
    scores = (q.float() @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    out = torch.zeros_like(q)
    parts = min(batch * count, 7)
    for part in range(parts):
        out += (scores.softmax(-1)[..., part::parts] @ v[:, :, part::parts]).to(q.dtype)
    return out.transpose(1, 2).contiguous()


def test_attention_that_depends_on_the_neighbours_is_found(device, tree_bits, monkeypatch):
    """By both comparisons: of texts, where logits tell it and tokens need not, and of trees behind contexts."""
    monkeypatch.setattr("eagle_fast.layers.attention.tree_attention", attention_in_parts)
    model, texts, rng = half("llama", torch.bfloat16, device), prompts([9, 30]), random.Random(3)
    expected = alone(model, texts)
    found, _ = decode(model, "eagenerate", texts, [0, 1])
    assert different_rows(found, expected) > 10
    contexts = tree_bits.MadeUpContexts(model.target, 2, 65)
    differ = 0
    for parents in trees(tree_bits, 2, rng):
        leaf = tree_bits.random_leaf(parents[0], rng)
        differ += contexts.compare([65, 63], parents, 0, leaf, rng).differ
    assert differ > 10
