"""A head cut over ranks, all on the CPU: the trees and the text of the head on one device, however its rounds run."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from decoders import TREE
from fake_devices import FakeDevices
from machine import linked
from often_right import write_often_right_head, write_random_head
from ranked import both, folders, prompts
from zoo import make

import eagle_fast.layers.peer_links as peer_links
from eagle_fast import EaModel, SamplingParams, TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.ranked_round import RankedRound, parts_for
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.steps import RoundSteps
from eagle_fast.layers.links import OutOfStepError
from eagle_fast.loading import load_head
from eagle_fast.loading_ranks import load_cut_target
from eagle_fast.target.packing import Bits

NEW = 30
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 7}


def cut_pair(name="qwen3", ranks=2, kind="eagle3", writer=write_often_right_head, int8=False, **settings):
    """The same target and head on one device and over ranks, where the head is cut."""
    options = {key: settings.pop(key) for key in ("adaptive", "total_token") if key in settings}
    pair = both(make(name), ["cpu"] * ranks, writer=lambda *at: writer(*at, kind, **settings), **options)
    for model in pair:
        if int8:
            model.ea_layer.quantize()
    pair.ranked.states.head_cut = True
    return pair


def check_same(pair, new=NEW):
    """Text and trees: what rounds accept is what they accept on one device."""
    for batch, options in itertools.product((1, 3), ({}, SAMPLED)):
        options = {**prompts(batch), **options, "max_new_tokens": new, "return_dict_in_generate": True}
        found, expected = pair.ranked.eagenerate(**options), pair.single.eagenerate(**options)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.statistics.tau == expected.statistics.tau
        assert isinstance(pair.ranked.states.idle[-1].state, RankedRound)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_text_of_heads_that_are_often_right(kind, int8):
    check_same(cut_pair(kind=kind, int8=int8))


@pytest.mark.parametrize(
    ("kind", "ranks", "settings"),
    [
        ("eagle3", 2, {"draft_vocab_size": 90}),
        ("eagle3", 2, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
        ("eagle3", 2, {"num_key_value_heads": 1}),
        ("eagle3", 3, {"num_attention_heads": 8, "head_dim": 8}),
        ("eagle", 2, {"qkv_bias": True}),
        ("eagle", 4, {"num_key_value_heads": 4}),
    ],
)
def test_text_of_odd_cuts(kind, ranks, settings):
    check_same(cut_pair("llama", ranks, kind, write_random_head, **settings), new=15)


def test_prompts_in_chunks_and_a_prompt_of_one_token(monkeypatch):
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 8)
    pair = cut_pair()
    check_same(pair, new=12)
    ids = torch.tensor([[7]])
    assert torch.equal(pair.ranked.eagenerate(ids, max_new_tokens=NEW), pair.single.eagenerate(ids, max_new_tokens=NEW))


def test_conversations_and_prompts_that_are_alike(monkeypatch):
    """Rows are reused where they lie, copied to a longer state, and from one sequence to the next."""
    monkeypatch.setattr("eagle_fast.decoding.states.LENGTH_STEP", 32)
    pair = cut_pair()
    ids, taus = prompts(1)["input_ids"], []
    for _ in range(3):
        outs = [
            model.eagenerate(ids, max_new_tokens=8, reuse_cache=True, return_dict_in_generate=True)
            for model in (pair.ranked, pair.single)
        ]
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        taus.append([out.statistics.tau for out in outs])
        ids = torch.cat([outs[0].sequences, prompts(1)["input_ids"]], 1)
    assert all(mine == other for mine, other in taus)
    ids = prompts(1)["input_ids"].repeat(3, 1)
    outs = [
        model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True) for model in (pair.ranked, pair.single)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].statistics.tau == outs[1].statistics.tau


def test_processors_and_records():
    pair = cut_pair()
    ids = prompts(1)["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}
    assert torch.equal(pair.ranked.generate(ids, **options), pair.single.generate(ids, **options))
    options = {**prompts(3), "max_new_tokens": 15, "return_dict_in_generate": True, "output_logits": True}
    out, expected = pair.ranked.eagenerate(**options), pair.single.eagenerate(**options)
    assert torch.equal(out.sequences, expected.sequences)
    for mine, theirs in zip(out.logits, expected.logits, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)


def test_trees_may_change(monkeypatch):
    """Among them the root alone: what such rounds accept waits on every rank."""
    pair = cut_pair(adaptive=True)
    turns = itertools.count()
    monkeypatch.setattr(TreeChooser, "next", lambda self, context: self.trees[next(turns) // 5 % len(self.trees)])
    for options in ({}, SAMPLED):
        options = {**prompts(3), **options, "max_new_tokens": 80}
        out = pair.ranked.eagenerate(return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, pair.single.naivegenerate(**options))
        assert len(out.statistics.trees) > 2
        assert ROOT_ALONE in out.statistics.trees


# -- rounds by hand ----------------------------------------------------------------------------------------------------


TREES = TreeConfig(16, 3, 4), ROOT_ALONE, TreeConfig(6, 2, 3)


def states_of(pair, ids, temperature=0.0, seeds=3, most=96):
    """(cut, single)"""
    target, head = pair.ranked.target, pair.ranked.ea_layer
    cut = RankedRound(target, parts_for(head, target), TREES[0], len(ids), most, others=TREES[1:])
    single = Round(pair.single.target, pair.single.ea_layer, TREES[0], len(ids), most, others=TREES[1:])
    for state in (cut, single):
        state.sampling.load(SamplingParams(temperature, seed=seeds), shared_noise=True)
        state.begin(ids.tolist(), [most - 2] * len(ids))
    return cut, single


def random_ids(batch, length, seed=1):
    return torch.randint(3, 130, (batch, length), generator=torch.Generator().manual_seed(seed))


def same_drafters(cut, single):
    """Every rank's hidden state is the one of one device, and its cache rows are those of its heads."""
    for part in cut.drafter.drafters:
        torch.testing.assert_close(part.hidden, single.drafter.hidden, rtol=0, atol=1e-4)
        assert torch.equal(part.hidden, cut.drafter.drafters[0].hidden)
    keys = torch.cat([part.slab.keys[0] for part in cut.drafter.drafters], 1)
    for row, length in enumerate(single.lengths.tolist()):
        torch.testing.assert_close(
            keys[row, :, :length], single.drafter.slab.keys[0][row, :, :length], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_rank_grows_the_tree_of_one_device(temperature):
    cut, single = states_of(cut_pair(), random_ids(2, 11), temperature)
    for _ in range(4):
        trees, expected = cut.draft(), single.draft()
        for tree in trees.everywhere:
            assert all(torch.equal(mine, other) for mine, other in zip(tree, expected, strict=True))
        for state in (cut, single):
            state.step()
        assert torch.equal(cut.report, single.report)
        same_drafters(cut, single)


def test_rounds_without_a_draft_wait_on_every_rank():
    cut, single = states_of(cut_pair(), random_ids(2, 11))
    steps = [RoundSteps(cut), RoundSteps(single)]
    for tree in (TREES[0], *[ROOT_ALONE] * 5, TREES[2], ROOT_ALONE, TREES[0], TREES[2]):
        for step in steps:
            step(tree)
        assert torch.equal(cut.under(tree).report, single.under(tree).report)
    for state in (cut, single):
        state.catch_up()
    same_drafters(cut, single)
    assert cut.num_bytes < single.num_bytes * 1.5


def test_sequences_are_adopted_with_their_settings():
    pair = cut_pair()
    states = states_of(pair, random_ids(4, 9), 1.0, (10, 11, 12, 13))
    entries = states_of(pair, random_ids(3, 14, 2), 1.0, (14, 15, 16))
    for state, entry in zip(states, entries, strict=True):
        state.step()
        entry.step()
        state.adopt(torch.tensor([3, 1]), entry)
    for _ in range(4):
        for state in states:
            state.step()
        assert torch.equal(states[0].report, states[1].report)
    same_drafters(*states)


# -- the head between calls --------------------------------------------------------------------------------------------


def test_a_head_that_was_changed_is_cut_anew():
    pair = cut_pair()
    options = {**prompts(1), "max_new_tokens": NEW, "return_dict_in_generate": True}
    pair.ranked.eagenerate(**options)
    states, before = pair.ranked.states, pair.ranked.states.heads
    pair.ranked.eagenerate(**options)
    assert states.heads is before
    for model in pair:
        model.ea_layer.quantize()
    found, expected = pair.ranked.eagenerate(**options), pair.single.eagenerate(**options)
    assert found.statistics.tau == expected.statistics.tau
    assert states.heads is not before
    assert {id(lease.state.heads) for lease in states.idle} == {id(states.heads)}
    with torch.no_grad():
        pair.ranked.ea_layer.lm_head_scale.neg_()
    assert pair.ranked.eagenerate(**options).statistics.tau < expected.statistics.tau
    before = states.heads
    states.follow(pair.ranked.target)  # parts share what the ranks of a target have
    pair.ranked.eagenerate(**options)
    assert states.heads is not before
    states.head_cut = False
    pair.ranked.eagenerate(**options)
    assert states.heads is None
    assert [type(lease.state) for lease in states.idle] == [Round]


def test_a_head_is_cut_by_itself_where_that_pays(monkeypatch):
    pair, options = cut_pair(), {**prompts(1), "max_new_tokens": NEW}
    pair.ranked.states.head_cut = None
    for num_bytes, kind in ((10**9, Round), (0, RankedRound)):
        monkeypatch.setattr("eagle_fast.head.cut.BYTES_OF_AN_EXCHANGE", num_bytes)
        assert torch.equal(pair.ranked.eagenerate(**options), pair.single.eagenerate(**options))
        assert [type(lease.state) for lease in pair.ranked.states.idle] == [kind]


def test_a_head_that_cannot_be_cut_stays_whole(monkeypatch):
    pair = cut_pair(hidden_size=96)  # the ranks' mailboxes are as wide as the target
    options = {**prompts(1), "max_new_tokens": NEW}
    assert torch.equal(pair.ranked.eagenerate(**options), pair.single.eagenerate(**options))
    assert pair.ranked.states.heads is None
    target = pair.ranked.target
    gpus = [torch.device("cuda", index) for index in range(2)]
    names = {gpus[0]: "one", gpus[1]: "other"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)
    assert (
        parts_for(
            cut_pair().ranked.ea_layer, SimpleNamespace(links=SimpleNamespace(devices=gpus), anatomy=target.anatomy)
        )
        is None
    )


# -- as GPUs exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_text_through_peer_links(ranks, monkeypatch):
    """No rank waits for what the host has yet to launch; once all is loaded, nothing waits for a device."""
    machine = linked(monkeypatch)
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 8)
    pair = cut_pair("llama", ranks, writer=write_random_head, num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    for options in ({}, SAMPLED):
        options = {**prompts(3), **options, "max_new_tokens": 12}
        assert torch.equal(pair.ranked.eagenerate(**options), pair.single.eagenerate(**options))
    assert not machine.waiting
    before = machine.synchronized
    pair.ranked.eagenerate(**options)
    assert machine.synchronized == before


def test_rounds_over_devices_that_do_not_mix(monkeypatch, tmp_path):
    """In a call, between devices goes what kernels of exchanges push, and nothing else."""
    linked(monkeypatch)
    paths, fakes = folders(make("qwen3"), tmp_path), [torch.device("cpu", index) for index in range(2)]
    single = EaModel.from_pretrained(**paths, **TREE)
    with FakeDevices() as devices:
        base = load_cut_target(paths["base_model_path"], fakes, {}, {}, Bits(None))
        ranked = EaModel(base, load_head(paths["ea_model_path"], base), tree=single.tree)
        ranked.states.head_cut = True
        for options in ({}, SAMPLED):
            options = {**prompts(3), **options, "max_new_tokens": 12}
            devices.between_devices()
            assert torch.equal(ranked.eagenerate(**options), single.eagenerate(**options))
            ways = {copy.where for copy in devices.between_devices()}
        assert [str(part.device) for part in ranked.states.heads] == ["cpu:0", "cpu:1"]
        assert ways == {"send", "gather", "_launch"}


@pytest.mark.parametrize(
    ("where", "call"),
    [(where, call) for where in ("exchange_best", "push", "await_pushes") for call in (1, 2, 3, 5, 8)],
)
def test_an_interrupt_between_the_ranks_launches(where, call, monkeypatch):
    machine, pair = linked(monkeypatch), cut_pair()
    options = {**prompts(1), "max_new_tokens": NEW}
    expected = pair.ranked.eagenerate(**options)
    calls, function = itertools.count(1), getattr(peer_links, where)

    def killed(*args, **given):
        out = function(*args, **given)
        if next(calls) == call:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch:
        patch.setattr(peer_links, where, killed)
        with pytest.raises(KeyboardInterrupt):
            pair.ranked.eagenerate(**options)
    machine.runs_out = True  # waits are bounded
    pair.ranked.target.links.settle()
    machine.runs_out = False
    for _ in range(2):
        assert torch.equal(pair.ranked.eagenerate(**options), expected)


def test_a_wait_that_ran_out_ends_the_call_and_no_other(monkeypatch):
    machine, pair = linked(monkeypatch), cut_pair()
    options = {**prompts(1), "max_new_tokens": NEW}
    expected = pair.ranked.eagenerate(**options)
    running = pair.ranked.ea_generate(**options)
    next(running)
    machine.boxes[1].told.fill_(1 + 256)
    with pytest.raises(OutOfStepError, match=r"rank 1 .* waited in vain for rank 0"):
        next(running)
    assert torch.equal(pair.ranked.eagenerate(**options), expected)
