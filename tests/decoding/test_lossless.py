"""The headline: decoding with a head gives the target's own text, token for token, on every family."""

import copy
import itertools

import pytest
import torch
from often_right import write_often_right_head, write_random_head
from zoo import FAMILIES, make

from eagle_fast import EaModel

SMALL_TREE = {"total_token": 16, "depth": 3, "top_k": 4}
NEW_TOKENS = 200
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


def prompt(length=19, batch=1, seed=1, device="cpu"):
    return torch.randint(3, 130, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def stock_greedy(model, ids, **options):
    """The model's own text. Stock `generate` (5.17) drops the whole prefix where longrope switches its frequencies,
    unless it runs without a cache."""
    if "longrope" in str(getattr(model.config, "rope_parameters", "")):
        options["use_cache"] = False
    return model.generate(ids, do_sample=False, **options)


def ea_model(model, folder, writer=write_often_right_head, kind="eagle3", tree=None, **options):
    writer(copy.deepcopy(model).cpu(), folder, kind, **options)
    # without a tree of the test's own, rounds have the default one throughout: what they bring is looked at
    return EaModel.from_pretrained(base_model_path=model, ea_model_path=str(folder), **(tree or {"adaptive": False}))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_stock_generate(name, device, tmp_path, accepted_lengths):
    model = make(name).to(device)
    ids = prompt(device=device)
    expected = stock_greedy(model, ids, max_new_tokens=NEW_TOKENS)
    right = ea_model(model, tmp_path / "right").eagenerate(ids, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert torch.equal(right.sequences, expected)
    accepted_lengths(right.statistics.tau)
    assert right.statistics.tau > 3
    random = ea_model(model, tmp_path / "random", write_random_head, draft_vocab_size=64, tree=SMALL_TREE)
    assert torch.equal(random.eagenerate(ids, max_new_tokens=NEW_TOKENS), expected)
    assert torch.equal(stock_greedy(model, ids, max_new_tokens=20), expected[:, : 19 + 20]), "the model was changed"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere2", "gpt2", "mixtral"])
def test_greedy_with_an_eagle1_head(name, device, tmp_path, accepted_lengths):
    model = make(name).to(device)
    ids = prompt(device=device)
    expected = stock_greedy(model, ids, max_new_tokens=NEW_TOKENS)
    right = ea_model(model, tmp_path / "right", kind="eagle")
    out = right.eagenerate(ids, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    accepted_lengths(out.statistics.tau)
    assert out.statistics.tau > 3
    random = ea_model(model, tmp_path / "random", write_random_head, "eagle", SMALL_TREE)
    assert torch.equal(random.eagenerate(ids, max_new_tokens=60), expected[:, : 19 + 60])


# (total_token, depth, top_k): one node per level, no beam steps, one word of the mask just full, more than one, only
# the last level's children past one, the most
TREES = [(2, 1, 1), (9, 7, 1), (5, 0, 10), (64, 5, 6), (65, 7, 10), (20, 7, 9), (256, 9, 6), (60, 16, 3)]


@pytest.mark.parametrize("tree", TREES)
def test_greedy_whatever_the_tree(tree, device, tmp_path):
    model = make("qwen3").to(device)
    ids = prompt(device=device)
    sizes = dict(zip(("total_token", "depth", "top_k"), tree, strict=True))
    out = ea_model(model, tmp_path, tree=sizes).eagenerate(ids, max_new_tokens=80)
    assert torch.equal(out, stock_greedy(model, ids, max_new_tokens=80))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
def test_prompt_lengths_around_the_longrope_switch(length, device, tmp_path):
    """64 tokens is where this model's frequencies change; a single token leaves the head nothing to read."""
    model = make("phi3_longrope").to(device)
    ids = prompt(length, device=device)
    model_with_head = ea_model(model, tmp_path)
    expected = stock_greedy(model, ids, max_new_tokens=70)
    assert torch.equal(model_with_head.eagenerate(ids, max_new_tokens=70), expected)
    assert torch.equal(model_with_head.naivegenerate(ids, max_new_tokens=70), expected)


@pytest.mark.parametrize("name", ["qwen2_sliding", "gpt_oss", "llama4_text", "phi3_longrope"])
def test_prompt_longer_than_a_prefill_chunk(name, device, tmp_path, monkeypatch):
    """Chunks of 8 tokens: shorter than, or no multiple of, every window and chunk of these models."""
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 8)
    model = make(name).to(device)
    ids = prompt(45, device=device)
    out = ea_model(model, tmp_path).eagenerate(ids, max_new_tokens=60, return_dict_in_generate=True)
    assert torch.equal(out.sequences, stock_greedy(model, ids, max_new_tokens=60))
    assert out.statistics.tau > 3


WARPERS = {
    "none": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
}


@pytest.mark.parametrize("warpers", WARPERS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_seeded_sampling_equals_sampling_without_speculation(temperature, warpers, device, tmp_path):
    model = make("llama").to(device)
    decoder = ea_model(model, tmp_path, tree=SMALL_TREE)
    options = {"temperature": temperature, "seed": 7, "max_new_tokens": 80, **WARPERS[warpers]}
    ids = prompt(device=device)
    expected = decoder.naivegenerate(ids, **options)
    assert torch.equal(decoder.eagenerate(ids, **options), expected)
    assert torch.equal(decoder.eagenerate(ids, shared_noise=False, **options), expected)
    assert not torch.equal(decoder.eagenerate(ids, **{**options, "seed": 8}), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "phi3_longrope", "qwen3_moe", "gpt2"])
def test_seeded_sampling_on_other_families(name, device, tmp_path):
    model = make(name).to(device)
    decoder = ea_model(model, tmp_path)
    options = {"temperature": 1.0, "seed": 11, "max_new_tokens": 100, "top_p": 0.95}
    ids = prompt(device=device)
    assert torch.equal(decoder.eagenerate(ids, **options), decoder.naivegenerate(ids, **options))


def test_shared_noise_raises_acceptance(device, tmp_path):
    model = make("llama").to(device)
    decoder = ea_model(model, tmp_path)
    tau = {}
    for shared in (True, False):
        out = decoder.eagenerate(
            prompt(device=device), temperature=1.5, seed=3, max_new_tokens=300, shared_noise=shared,
            return_dict_in_generate=True,
        )  # fmt: skip
        tau[shared] = out.statistics.tau
    assert tau[True] > 1.1 * tau[False]


def test_no_seed_follows_torch(device, tmp_path):
    decoder = ea_model(make("llama").to(device), tmp_path, tree=SMALL_TREE)
    ids, texts = prompt(device=device), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(decoder.eagenerate(ids, temperature=1.0, max_new_tokens=30))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_sampled_text_has_the_distribution_of_the_target(device, tmp_path):
    """Chi-square of 20,000 continuations of 3 tokens against their exact probabilities, V = 8."""
    draws, batch, vocab, temperature = 20_000, 1000, 8, 3.0
    model = make("llama", sharp=False, vocab_size=vocab).to(device)
    decoder = ea_model(model, tmp_path, write_random_head, tree={"total_token": 8, "depth": 2, "top_k": 2})
    ids = torch.tensor([[3, 5, 1, 6]], device=device)
    continuations = torch.tensor(list(itertools.product(range(vocab), repeat=3)), device=device)
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(len(continuations), -1), continuations], 1)).logits[:, 3:6].double()
    steps = (logits / temperature).log_softmax(-1).gather(-1, continuations[..., None])[..., 0]
    expected = steps.sum(-1).exp() * draws
    counts = torch.zeros(vocab**3, device=device, dtype=torch.double)
    place = torch.tensor([vocab**2, vocab, 1], device=device)
    for call in range(draws // batch):
        out = decoder.eagenerate(ids.expand(batch, -1), temperature=temperature, seed=call, max_new_tokens=3)
        counts += torch.bincount((out[:, 4:] * place).sum(-1), minlength=vocab**3)
    frequent = expected >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    assert freedom > 50
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
