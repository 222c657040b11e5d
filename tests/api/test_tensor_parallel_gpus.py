"""Every layer on two GPUs: the text of one GPU, a graph a rank, no copies, and usable after whatever goes wrong."""

import itertools

import pytest
import torch
from faults import Killed, check_a_killed_stage, check_a_rank_held_up, check_an_interrupted_launch
from often_right import write_random_head
from ranked import WIDE, both, graphs_of, prompts
from zoo import make

import eagle_fast.layers.peer_links as peer_links
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.round import Round
from eagle_fast.layers.attention import PrefillStep
from eagle_fast.layers.links import OutOfStepError
from eagle_fast.layers.peer_links import PeerLinks
from eagle_fast.loading_ranks import load_cut_target
from eagle_fast.target.rank_files import cut_of

NEW = 60
GPUS = [0, 1]
FUSED = ["llama", "llama3_rope", "qwen2", "qwen2_sliding", "qwen3", "mistral"]
pytestmark = [pytest.mark.multi_gpu, pytest.mark.usefixtures("graphs_only")]


def pair(name="llama", settings=None, **options):
    return both(make(name, **(settings or {})), GPUS, single="cuda:0", **options)


def check_same(single, ranked):
    for batch, options in itertools.product((1, 3), ({}, {"temperature": 1.0, "top_p": 0.95, "seed": 7})):
        options = {**prompts(batch, "cuda:0"), **options, "max_new_tokens": NEW}
        expected = single.naivegenerate(**options)
        assert torch.equal(ranked.eagenerate(**options), expected)
        assert torch.equal(ranked.naivegenerate(**options), expected)
    assert graphs_of(ranked)
    assert all(len(each) == 2 for each in graphs_of(ranked))


@pytest.mark.parametrize("name", FUSED)
def test_text_of_every_family(name):
    check_same(*pair(name))


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
    ],
)
def test_text_of_odd_cuts(settings):
    check_same(*pair("qwen3", settings, writer=write_random_head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_two_ranks_in_16_bits(dtype):
    """With the head and without, any tree, any batch: the same bits, and both ranks hold the same rows."""
    single, ranked = pair("llama", WIDE, writer=write_random_head, dtype=dtype)
    assert ranked.exactness == "bitwise", ranked.exactness.reason
    for batch, options in itertools.product((1, 3), ({}, {"temperature": 1.0, "seed": 7})):
        options = {**prompts(batch, "cuda:0"), **options, "max_new_tokens": NEW}
        assert torch.equal(ranked.eagenerate(**options), ranked.naivegenerate(**options))
    target = ranked.target
    cache = target.new_cache(1, 64)
    with target.turn.lock, target.turn(), torch.no_grad():
        sent = [each for (each,) in target.links.send("prompt", prompts(1, "cuda:0")["input_ids"])]
        positions = [torch.arange(19, device=rank.device)[None] for rank in target.ranks]
        steps = [PrefillStep(0, 19) for _ in target.ranks]
        with target.links.forward():
            normed, _ = target._run(sent, positions, steps, cache)
    assert torch.equal(normed[0].cpu(), normed[1].cpu())
    ids = prompts(1, "cuda:0")["input_ids"]
    logits = {model: model.eagenerate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True).logits[0]
              for model in (single, ranked)}  # fmt: skip
    far = (logits[single] - logits[ranked]).norm() / logits[single].norm()
    assert far < 0.05, "sums in another order, and no more"


@pytest.mark.parametrize("bits", [{"target_bits": 8}, {"target_bits": 4, "lm_head_bits": 8}], ids=str)
def test_bits_of_packed_weights(bits):
    with pytest.warns(UserWarning, match="packed weights"):
        _, ranked = pair("llama", WIDE, writer=write_random_head, dtype=torch.bfloat16, **bits)
    assert ranked.exactness == "bitwise", ranked.exactness.reason
    for batch, options in itertools.product((1, 3), ({}, {"temperature": 1.0, "seed": 7})):
        options = {**prompts(batch, "cuda:0"), **options, "max_new_tokens": NEW}
        assert torch.equal(ranked.eagenerate(**options), ranked.naivegenerate(**options))


def test_trees_may_change(monkeypatch):
    single, ranked = pair(adaptive=True)
    turns = itertools.count()
    monkeypatch.setattr(TreeChooser, "next", lambda self, context: self.trees[next(turns) // 5 % len(self.trees)])
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        options = {**prompts(3, "cuda:0"), **options, "max_new_tokens": 150}
        out = ranked.eagenerate(return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, single.naivegenerate(**options))
        assert len(out.statistics.trees) > 2


def test_long_prompts_in_chunks_and_pieces(monkeypatch):
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 700)
    monkeypatch.setattr(peer_links, "MOST_ROWS", 512)  # of a mailbox
    single, ranked = pair("mistral")
    ids = torch.randint(3, 130, (1, 900), generator=torch.Generator().manual_seed(5)).to("cuda:0")
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=20), single.eagenerate(ids, max_new_tokens=20))


def test_records_processors_and_conversations():
    single, ranked = pair()
    options = {**prompts(3, "cuda:0"), "max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
    out, expected = ranked.eagenerate(**options), single.eagenerate(**options)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(out.logits, expected.logits, strict=True))
    ids = prompts(1, "cuda:0")["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}
    assert torch.equal(ranked.generate(ids, **options), single.generate(ids, **options))
    for _ in range(3):
        out = ranked.eagenerate(ids, max_new_tokens=8, reuse_cache=True)
        assert torch.equal(out, single.naivegenerate(ids, max_new_tokens=8))
        ids = torch.cat([out, prompts(1, "cuda:0")["input_ids"]], 1)


def test_a_replayed_round_copies_nothing_between_gpus():
    _, ranked = pair()
    ranked.eagenerate(**prompts(1, "cuda:0"), max_new_tokens=NEW)
    ((_, step, _),) = ranked.states.idle
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
    assert not [event.name for event in profile.events() if "PtoP" in event.name]


def test_no_gpu_holds_more_than_its_share(tmp_path):
    """While it loads: half of the layers and one whole one on each at most."""
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    model = make("llama", **settings, num_key_value_heads=4, head_dim=64)
    model.save_pretrained(tmp_path)
    layer = sum(each.nbytes for each in model.model.layers[0].parameters())
    before = [torch.cuda.memory_allocated(gpu) for gpu in GPUS]
    for gpu in GPUS:
        torch.cuda.reset_peak_memory_stats(gpu)
    cut = cut_of(load_cut_target(str(tmp_path), [torch.device("cuda", gpu) for gpu in GPUS], {}, {}))
    for gpu, rank, held in zip(GPUS, cut.ranks, before, strict=True):
        assert rank.num_bytes < 0.6 * sum(each.nbytes for each in model.parameters())
        assert torch.cuda.max_memory_allocated(gpu) - held < rank.num_bytes + layer


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])  # eagerly, and in the capture
@pytest.mark.parametrize("stage", ["draft", "verify", "accept", "compact", "absorb"])
def test_a_round_killed_at_a_stage(stage, call, error, monkeypatch):
    check_a_killed_stage(pair(), Round, stage, call, error, monkeypatch)


# launches of one rank's side: between ranks, between sums; in a prompt, in a round, in the capture of one
@pytest.mark.parametrize(
    ("where", "call"),
    [*(("exchange_add_rms_norm", call) for call in (1, 2, 7, 25, 3 * 24 + 3)),
     *((where, call) for where in ("push", "await_pushes") for call in (1, 2, 3, 4, 9))],
)  # fmt: skip
def test_an_interrupt_between_the_ranks_launches(where, call, monkeypatch):
    check_an_interrupted_launch(pair(), where, call, monkeypatch)


class Interrupted:
    """A graph that an interrupt keeps from being launched."""

    def __init__(self, graph):
        self.graph = graph

    def replay(self):
        raise KeyboardInterrupt


def test_an_interrupt_between_the_ranks_graphs():
    single, ranked = pair()
    ids = prompts(1, "cuda:0")["input_ids"]
    expected = single.eagenerate(ids, max_new_tokens=NEW)
    ranked.target.links.looks = 100_000
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=NEW), expected)
    ((_, steps, _),) = ranked.states.idle
    (step,) = steps.of_trees.values()
    kept, step.others = step.others, [Interrupted(each) for each in step.others]
    with pytest.raises(KeyboardInterrupt):
        ranked.eagenerate(ids, max_new_tokens=NEW)
    step.others = kept
    for _ in range(2):
        assert torch.equal(ranked.eagenerate(ids, max_new_tokens=NEW), expected)


def test_a_rank_that_is_held_up_is_named_within_seconds():
    check_a_rank_held_up(pair())


def test_a_fault_outside_of_a_call_is_over_at_the_next(monkeypatch):
    """One rank's side alone, as if the process had been stopped there: the others fall through after the first."""
    single, ranked = pair()
    ids = prompts(1, "cuda:0")["input_ids"]
    expected = single.eagenerate(ids, max_new_tokens=NEW)
    links = ranked.target.links
    assert isinstance(links, PeerLinks)
    links.looks = 100_000
    rows = torch.zeros(1, ranked.target.anatomy.hidden_size, device="cuda:0")
    for _ in range(100):
        peer_links.exchange_add_rms_norm(
            rows,
            rows,
            rows[0].clone(),
            1e-5,
            links.mailboxes[0],
            0,
            (rows.clone(), rows.clone()),
            looks=links.looks,
        )
    torch.cuda.synchronize(0)
    with pytest.raises(OutOfStepError):
        links.check()
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=NEW), expected)


def test_out_of_memory_on_one_gpu_leaves_the_model_usable():
    single, ranked = pair()
    ids = prompts(1, "cuda:0")["input_ids"]
    expected = single.eagenerate(ids, max_new_tokens=NEW)
    assert torch.equal(ranked.eagenerate(ids, max_new_tokens=NEW), expected)
    held = torch.cuda.memory_reserved(1) + 200 * 2**20
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(1).total_memory, 1)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ranked.eagenerate(ids, max_new_tokens=400_000, max_length=500_000)
        assert torch.equal(ranked.eagenerate(ids, max_new_tokens=NEW), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 1)


def test_calls_take_turns():
    _, ranked = pair()
    texts = [prompts(3, "cuda:0")["input_ids"][row : row + 1] for row in range(3)]
    expected = [ranked.eagenerate(each, max_new_tokens=NEW) for each in texts]
    running, found = [ranked.ea_generate(each, max_new_tokens=NEW) for each in texts], [None] * 3
    for _ in range(NEW):
        for place, each in enumerate(running):
            found[place] = next(each, found[place])
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
