"""The draft head cut over two GPUs: the text of one GPU, the same trees on both, usable after whatever goes wrong."""

import itertools

import pytest
import torch
from faults import Killed, check_a_killed_stage, check_a_rank_held_up, check_an_interrupted_launch
from often_right import write_often_right_head, write_random_head
from ranked import WIDE, both, graphs_of, prompts
from zoo import make

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.ranked_round import RankedRound

NEW = 60
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
pytestmark = [pytest.mark.multi_gpu, pytest.mark.usefixtures("graphs_only")]


def pair(name="llama", settings=None, kind="eagle3", writer=write_often_right_head, head=None, **options):
    """A target and head on one GPU, and over two with the head cut. head: settings of its config."""
    write = lambda model, folder: writer(model, folder, kind, **(head or {}))  # noqa: E731
    found = both(make(name, **(settings or {})), [0, 1], single="cuda:0", writer=write, **options)
    found.ranked.states.head_cut = True
    return found


def check_same(single, ranked):
    """Text and trees: what rounds accept is what they accept on one GPU, but for what rounding decides."""
    for batch, options in itertools.product((1, 3), ({}, SAMPLED)):
        options = {**prompts(batch, "cuda:0"), **options, "max_new_tokens": NEW, "return_dict_in_generate": True}
        found, expected = ranked.eagenerate(**options), single.eagenerate(**options)
        assert torch.equal(found.sequences, expected.sequences)
        assert abs(found.statistics.tau - expected.statistics.tau) < 0.2
        assert isinstance(ranked.states.idle[-1].state, RankedRound)
    assert graphs_of(ranked)
    assert all(len(each) == 2 for each in graphs_of(ranked))


def same_on_both(model):
    """Both ranks hold the same hidden states, and grow the same tree, to the bit."""
    for state, _, speculative in model.states.idle:
        if speculative:
            with model.target.turn.lock, model.target.turn(), torch.no_grad():
                trees = state.draft().everywhere
                first, second = state.drafter.drafters
            for name in ("hidden", "states"):
                assert torch.equal(getattr(first, name).cpu(), getattr(second, name).cpu())
            assert all(torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(*trees, strict=True))


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_text_of_heads_that_are_often_right(kind):
    single, ranked = pair(kind=kind)
    check_same(single, ranked)
    same_on_both(ranked)


@pytest.mark.parametrize(
    "head",
    [
        {"draft_vocab_size": 90},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_text_of_odd_cuts(head):
    single, ranked = pair("qwen3", writer=write_random_head, head=head)
    check_same(single, ranked)
    same_on_both(ranked)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_in_16_bits(dtype, int8):
    """With the head and without, any tree, any batch: the same bits, and the same trees on both ranks."""
    _, ranked = pair("llama", WIDE, writer=write_random_head, dtype=dtype, draft_int8=int8)
    assert ranked.exactness == "bitwise", ranked.exactness.reason
    for batch, options in itertools.product((1, 3), ({}, SAMPLED)):
        options = {**prompts(batch, "cuda:0"), **options, "max_new_tokens": NEW}
        assert torch.equal(ranked.eagenerate(**options), ranked.naivegenerate(**options))
    assert ranked.states.heads is not None
    assert [part.device.index for part in ranked.states.heads] == [0, 1]
    same_on_both(ranked)


def test_trees_may_change(monkeypatch):
    single, ranked = pair(adaptive=True)
    turns = itertools.count()
    monkeypatch.setattr(TreeChooser, "next", lambda self, context: self.trees[next(turns) // 5 % len(self.trees)])
    for options in ({}, SAMPLED):
        options = {**prompts(3, "cuda:0"), **options, "max_new_tokens": 150}
        out = ranked.eagenerate(return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, single.naivegenerate(**options))
        assert len(out.statistics.trees) > 2
    same_on_both(ranked)


def test_long_prompts_and_wide_batches(monkeypatch):
    """More rows than a mailbox has, of prompts and of beams."""
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 700)
    monkeypatch.setattr(peer_links, "MOST_ROWS", 512)
    single, ranked = pair("mistral")
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 130, (1, 900), generator=generator).to("cuda:0")
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=20), single.eagenerate(ids, max_new_tokens=20))
    ids = torch.randint(3, 130, (140, 9), generator=generator).to("cuda:0")  # beams of 4 rows each
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=20), single.eagenerate(ids, max_new_tokens=20))
    same_on_both(ranked)


def test_conversations_processors_and_other_heads():
    single, ranked = pair()
    ids = prompts(1, "cuda:0")["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}
    assert torch.equal(ranked.generate(ids, **options), single.generate(ids, **options))
    for _ in range(3):
        out = ranked.eagenerate(ids, max_new_tokens=8, reuse_cache=True)
        assert torch.equal(out, single.naivegenerate(ids, max_new_tokens=8))
        ids = torch.cat([out, prompts(1, "cuda:0")["input_ids"]], 1)
    before = ranked.states.heads
    ranked.states.head_cut = False
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=8), single.naivegenerate(ids, max_new_tokens=8))
    assert ranked.states.heads is None
    ranked.states.head_cut = True
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=8), single.naivegenerate(ids, max_new_tokens=8))
    assert ranked.states.heads is not before


def test_a_prompt_and_a_replayed_round_copy_nothing_between_gpus():
    _, ranked = pair()
    ranked.eagenerate(**prompts(1, "cuda:0"), max_new_tokens=NEW)
    ((state, step, _),) = ranked.states.idle
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        state.begin([[5, 6, 7, 8]], [40])
        step()
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
    assert not [event.name for event in profile.events() if "PtoP" in event.name]


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])  # eagerly, and in the capture
@pytest.mark.parametrize("stage", ["draft", "verify", "accept", "compact", "absorb"])
def test_a_round_killed_at_a_stage(stage, call, error, monkeypatch):
    found = pair()
    check_a_killed_stage(found, RankedRound, stage, call, error, monkeypatch)
    same_on_both(found.ranked)


# launches of one rank's side: between ranks, between levels of a tree; in a round, in the next, in the capture of one
@pytest.mark.parametrize(
    ("where", "call"),
    [*(("exchange_best", call) for call in (1, 2, 3, 8, 9, 16, 17, 24)),
     *((where, call) for where in ("push", "await_pushes") for call in (1, 2, 3, 4, 9))],
)  # fmt: skip
def test_an_interrupt_between_the_ranks_launches(where, call, monkeypatch):
    check_an_interrupted_launch(pair(), where, call, monkeypatch)


def test_a_rank_that_is_held_up_is_named_within_seconds():
    check_a_rank_held_up(pair())
