"""Prompts over ranks by graphs: the rows that they have without, where they belong, whatever ran before them."""

import pytest
import torch
from decoders import prompt
from ranked import both
from zoo import make

import eagle_fast.decoding.ranked_prompts as ranked_prompts
from eagle_fast.decoding.graph import WARMUP_STEPS, SideStreams
from eagle_fast.decoding.ranked_prompts import NARROWEST, RankedPrompts
from eagle_fast.decoding.round import Round

CAPACITY = 256
GPUS = pytest.param(["cuda:0", "cuda:1"], marks=pytest.mark.multi_gpu)
pytestmark = pytest.mark.usefixtures("graphs_only")


@pytest.fixture(scope="module", params=[["cpu", "cpu"], GPUS], ids=["cpu", "gpus"])
def model(request):
    """With three features, and windows narrower than its prompts."""
    return both(make("mistral"), request.param, single=request.param[0]).ranked


@pytest.fixture
def target(model):
    with model.target.turn.lock, model.target.turn(), torch.no_grad():
        yield model.target


@pytest.fixture
def prompts(target):
    made = RankedPrompts(target, SideStreams())
    yield made
    made.close()


def rows_of(cache, count):
    return [slab[..., :count, :] for slab in cache.slab.slabs]


def check(target, prompts, count, seed, row=0):
    """A prompt has the rows and features that it has alone, on every rank, and touches nothing else."""
    tokens = prompt(count, target.device, seed)
    alone, caches = (target.new_cache(batch, CAPACITY) for batch in (1, 3))
    for slab in caches.slab.slabs:
        slab.fill_(7)
    expected = target.prefill_everywhere(tokens, 0, alone)
    features = prompts(tokens, 0, caches.row(row))
    for mine, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(rows_of(caches.row(row), count), rows_of(alone, count), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        mine.fill_(7)
    assert all((slab == 7).all() for slab in caches.slab.slabs)


def test_rows_are_those_without_a_graph(target, prompts):
    """Of prompts of several lengths and widths by turns, before their graphs are captured and after."""
    for seed in range(2 * WARMUP_STEPS):
        for count, row in ((50, 0), (64, 1), (1, 2), (100, 1), (3, 0)):
            check(target, prompts, count, seed, row)
    assert sorted(prompts.of_widths) == [64, 128]
    on_gpus = target.device.type == "cuda"
    assert all((each.graphs.graph is not None) == on_gpus for each in prompts.of_widths.values())
    target.check()


def test_bits_are_the_same_with_the_graph_and_before(target, prompts):
    tokens, found = prompt(70, target.device), []
    for seed in range(2 * WARMUP_STEPS):
        cache = target.new_cache(1, CAPACITY)
        features = [each.clone() for each in prompts(tokens, 0, cache)]
        found.append([*features, *rows_of(cache, 70)])
        prompts(prompt(128, target.device, seed), 0, target.new_cache(1, CAPACITY))  # leaves something behind
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_long_prompts_and_ends_of_texts_are_run_as_they_are(target, prompts, monkeypatch):
    monkeypatch.setattr(ranked_prompts, "WIDEST", NARROWEST)
    check(target, prompts, NARROWEST + 1, seed=1)
    cache, alone = target.new_cache(1, CAPACITY), target.new_cache(1, CAPACITY)
    tokens = prompt(40, target.device)
    target.prefill_everywhere(tokens, 0, alone)
    target.prefill_everywhere(tokens[:, :30], 0, cache)
    prompts(tokens[:, 30:], 30, cache)
    for mine, theirs in zip(rows_of(cache, 40), rows_of(alone, 40), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert not prompts.of_widths


def test_states_of_all_kinds_run_prompts_by_the_same_graphs(model, monkeypatch):
    monkeypatch.setattr(model.states, "prompts", RankedPrompts(model.target, model.states.streams))
    ids, ran = prompt(20, model.target.device).repeat(2, 1), []
    ids[1, 0] = 2
    monkeypatch.setattr(Round, "begin_row", noting(Round.begin_row, ran))
    for head_cut in (False, True):
        model.states.head_cut = head_cut
        model.states.idle.clear()
        assert torch.equal(model.eagenerate(ids, max_new_tokens=20), model.naivegenerate(ids, max_new_tokens=20))
    assert ran == [model.states.prompts] * 8
    assert list(model.states.prompts.of_widths) == [NARROWEST]
    model.states.clear()
    assert not model.states.prompts.of_widths


def test_a_state_that_does_not_fit_gets_the_memory_of_prompts(model, monkeypatch):
    states, new_round, seen = model.states, model.states._round, []
    monkeypatch.setattr(states, "prompts", RankedPrompts(model.target, states.streams))

    def short_of_memory(*arguments):
        seen.append(sorted(states.prompts.of_widths))
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return new_round(*arguments)

    states.clear()
    states.prompts.of(100)
    monkeypatch.setattr(states, "_round", short_of_memory)
    model.eagenerate(prompt(20, model.target.device), max_new_tokens=4)
    assert seen == [[128], []]


def noting(begin_row, ran):
    def noted(self, *args, **options):
        ran.append(self.prompts)
        return begin_row(self, *args, **options)

    return noted
