"""Trees that change in the middle of a text: the text stays the target's own, whichever trees come in which order.

A chooser that takes trees at random stands for all that times and acceptance could lead to. Rounds without drafts are
among them, so the head falls behind and catches up.
"""

import random

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, stock, with_head
from often_right import write_random_head
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from zoo import make

from eagle_fast import EaModel, SamplingParams, TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding import draft, generation
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.steps import RoundSteps

NEW = 60
CHAIN = TreeConfig(8, 7, 1)
TREES = (TreeConfig(16, 3, 4), CHAIN, TreeConfig(3, 0, 4), ROOT_ALONE)


@pytest.fixture(autouse=True)
def at_random(monkeypatch):
    """Every tree in turn, in orders at random: for up to 3 rounds each, the root alone for up to 12."""

    class AtRandom(TreeChooser):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.rng, self.turns = random.Random(self.batch), []

        def next(self, context):
            if not self.turns:
                for tree in self.rng.sample(self.trees, len(self.trees)):
                    self.turns += [tree] * self.rng.randint(1, 12 if tree == ROOT_ALONE else 3)
            self.tree = self.turns.pop(0)
            return self.tree

    monkeypatch.setattr("eagle_fast.calls.TreeChooser", AtRandom)
    monkeypatch.setattr(EaModel, "trees", lambda self, batch=1: TREES)


@pytest.fixture
def behind(monkeypatch):
    """Few rows may wait for the head, so it has to catch up in the middle of a rest too."""
    monkeypatch.setattr(draft, "MOST_WAITING", 5)
    monkeypatch.setattr("eagle_fast.decoding.round.MOST_WAITING", 5)
    monkeypatch.setattr("eagle_fast.decoding.steps.MOST_WAITING", 5)


def switched(statistics):
    return len(statistics.trees) == len(TREES)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "qwen3_moe", "phi3_longrope", "gpt2"])
@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
def test_greedy_text(name, device, behind):
    """Mistral has a window, Phi-3 passes longrope's switch."""
    model, ids = rebuilt(decoder(name, device)), prompt(19, device)
    out = model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(out.sequences, stock(model, ids, max_new_tokens=NEW))
    assert switched(out.statistics)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bits_of_plain_decoding(dtype, temperature, device, behind):
    """In 16 bits on a GPU, from graphs of all trees."""
    model = with_head(make("llama", dtype=dtype), device)
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "temperature": temperature, "seed": [5, 6, 7], "max_new_tokens": 200}
    out = model.eagenerate(ids, return_dict_in_generate=True, output_logprobs=True, **options)
    expected = model.naivegenerate(ids, return_dict_in_generate=True, output_logprobs=True, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert switched(out.statistics)
    (lease,) = [each for each in model.states.idle if each.speculative]
    assert len(lease.step.graphs) == len(TREES) + 1, "one for each tree, and one to catch up"


@pytest.mark.gpu
def test_graphs_share_their_memory(device):
    model = with_head(make("llama"), device)
    model.eagenerate(prompt(19, device), max_new_tokens=300, eos_token_id=[])
    (lease,) = model.states.idle
    sizes = sorted(step.num_bytes for step in lease.step.of_trees.values())
    assert len(sizes) == len(TREES)
    assert sum(sizes) <= 2 * sizes[-1], "what one has freed another takes"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ahead", [1, 2])
def test_batches_with_seeds(temperature, ahead, device, monkeypatch):
    """Sequences that end apart, by their budgets and by stops, also with a round under way when the tree changes."""
    monkeypatch.setattr(generation, "rounds_under_way", lambda request, device: ahead)
    model = rebuilt(decoder("llama", device))
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "temperature": temperature, "seed": [5, 6, 7], "max_length": 20 + NEW}
    plain = model.naivegenerate(ids, max_new_tokens=NEW, **options)
    stops = [int(plain[0, 20 + 30]), int(plain[2, 20 + 41])]
    for more in ({}, {"eos_token_id": stops}):
        expected = model.naivegenerate(ids, max_new_tokens=NEW, **options, **more)
        out = model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **options, **more)
        assert torch.equal(out.sequences, expected)
        assert len(out.statistics.trees) > 1


def test_streams_records_and_processors(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(19, device)
    flags = dict.fromkeys(["output_scores", "output_logits", "output_logprobs"], True)
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": NEW, "return_dict_in_generate": True, **flags}
    expected = model.naivegenerate(ids, **options)
    *_, last = model.ea_generate(ids, **options)
    assert switched(last.statistics)
    assert torch.equal(last.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(last, name), getattr(expected, name), rtol=0, atol=1e-4)
    torch.testing.assert_close(last.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    hooks = {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])}
    hooks["stopping_criteria"] = [lambda text, scores: text.shape[1] >= 70]
    out = model.eagenerate(ids, **options, **hooks)
    assert torch.equal(out.sequences, model.naivegenerate(ids, **options, **hooks).sequences)
    assert len(out.statistics.trees) > 1


def test_log_probabilities_alone_travel_with_reports(device, monkeypatch):
    monkeypatch.setattr(generation, "rounds_under_way", lambda request, device: 2)
    model = rebuilt(decoder("llama", device))
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logprobs": True}
    out, expected = model.eagenerate(ids, **options), model.naivegenerate(ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    assert switched(out.statistics)


def test_conversations_with_reuse(device, behind):
    """Turns end under any tree, the root alone among them: what waits for the head is not lost."""
    model, ids = rebuilt(decoder("llama", device)), prompt(19, device)
    for turn in range(5):
        new = 20 + turn
        out = model.eagenerate(ids, max_new_tokens=new, reuse_cache=True, return_dict_in_generate=True)
        mask = torch.ones_like(ids)
        assert torch.equal(out.sequences, stock(model, ids, max_new_tokens=new, attention_mask=mask))
        assert out.statistics.reused_tokens == [0 if turn == 0 else ids.shape[1] - 5 - 2]
        ids = torch.cat([out.sequences, prompt(5, device, 90 + turn)], 1)
    assert len(model.states.idle) == 1


def test_calls_torn_apart_in_the_middle_of_a_rest(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(19, device)
    expected = stock(model, ids, max_new_tokens=NEW)
    for steps in range(1, 12):
        stream = model.ea_generate(ids, max_new_tokens=NEW, reuse_cache=True)
        for _ in range(steps):
            next(stream)
        stream.close()
        assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW, reuse_cache=True), expected)


# -- the head --------------------------------------------------------------------------------------------------------


def begun(model, ids, ends, trees=TREES):
    state = Round(model.target, model.ea_layer, trees[0], len(ids), 96, others=trees[1:])
    state.sampling.load(SamplingParams(0.0, seed=3), shared_noise=True)
    state.begin(ids.tolist(), ends)
    return state


def grown(texts, state):
    """Texts with what the last round emitted."""
    rounds = zip(texts, state.emitted.tolist(), state.counts.tolist(), strict=True)
    return [[*text, *new[:count]] for text, new, count in rounds]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rounds", [1, 4, 5, 13])
def test_a_head_that_caught_up_drafts_as_if_it_had_absorbed_every_token(name, rounds, device, behind):
    """With one, some, as many as there is room for, and more rows waiting; one sequence of two ends meanwhile."""
    model = decoder(name, device)
    ids = torch.cat([prompt(11, device), prompt(11, device, 2)])
    late, prompt_end = begun(model, ids, [80, 10 + 4]), 10
    steps = RoundSteps(late)
    steps()  # a tree, then a rest
    before = late.lengths.clone()
    text = grown(ids.tolist(), late)
    for _ in range(rounds):
        steps(ROOT_ALONE)
        text = grown(text, late.under(ROOT_ALONE))
    assert late.waiting.rounds == (rounds - 1) % 5 + 1
    assert int(late.lengths[0] - before[0]) == rounds
    late.catch_up()
    assert late.waiting.rounds == 0
    for row, tokens in enumerate(text):
        fresh = begun(model, torch.tensor([tokens], device=device), [90])
        rows = int(late.lengths[row])
        assert rows == int(fresh.lengths)
        torch.testing.assert_close(late.drafter.hidden[row], fresh.drafter.hidden[0], rtol=0, atol=1e-4)
        for mine, other in zip(late.drafter.slabs, fresh.drafter.slabs, strict=True):
            torch.testing.assert_close(mine[:, row, :, :rows], other[:, 0, :, :rows], rtol=0, atol=1e-4)
    assert prompt_end < int(late.lengths[1]) <= 14, "it has ended"


def test_states_hold_what_the_largest_tree_needs_and_no_more(device):
    model = decoder("llama", device)
    alone = Round(model.target, model.ea_layer, TREES[0], 2, 100)
    several = Round(model.target, model.ea_layer, TREES[0], 2, 100, others=TREES[1:])
    assert several.cache.slab.capacity == 192 >= 100 + draft.MOST_WAITING
    for tree in TREES:
        view = several.under(tree)
        assert view is several.under(tree)
        assert view.cache is several.cache
        assert view.lengths is several.lengths
        assert view.report.shape == (2, 1 + tree.max_path)
        assert view.report.untyped_storage().data_ptr() == several.largest_report.untyped_storage().data_ptr()
    slab = several.cache.slab.slabs[0].nbytes + several.drafter.slabs[0].nbytes
    waiting = several.waiting.features.nbytes
    assert several.num_bytes < alone.num_bytes * 1.5 + slab / 2 + waiting


def test_a_random_head_loses_nothing_but_time(device, tmp_path):
    base = make("qwen3").to(device)
    write_random_head(make("qwen3"), tmp_path, draft_vocab_size=64)
    model = EaModel.from_pretrained(base_model_path=base, ea_model_path=tmp_path)
    ids = prompt(19, device)
    out = model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(out.sequences, stock(model, ids, max_new_tokens=NEW))
