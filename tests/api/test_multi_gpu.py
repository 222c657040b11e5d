"""On two GPUs or more: the text of one GPU, as one graph, with no copies but those meant, and through faults.

Where there are fewer GPUs than a placement names, the last one stands for those that are missing.
"""

import contextlib
import copy
import itertools
import subprocess
import sys
import tempfile
import warnings
from collections import Counter

import pytest
import torch
from decoders import TREE, batch_of, prompt
from often_right import write_often_right_head, write_random_head
from zoo import make

import eagle_fast.target.placement
from eagle_fast import EaModel
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.graph import GraphedStep

NEW = 60
# device of each of the six decoder layers; devices of what stands beside them; device of the head
PLACEMENTS = {
    "halves": ([0, 0, 0, 1, 1, 1], {}, None),
    "reversed": ([1, 1, 1, 0, 0, 0], {}, None),
    "repeated": ([0, 1, 1, 0, 1, 0], {}, None),
    "gaps": ([0, 0, 2, 2, 2, 2], {}, 1),
    "rest elsewhere": ([0, 0, 1, 1, 2, 3], {"model.embed_tokens": 1, "model.norm": 0, "lm_head": 1}, 0),
    "lm_head first": ([0, 0, 0, 1, 1, 1], {"lm_head": 0}, None),
    "all but the embedding": ([1, 1, 1, 1, 1, 1], {"model.embed_tokens": 0}, None),
}
FAMILIES = ["llama", "mixtral", "gemma3_text", "gpt_oss"]
HOME = torch.device("cuda:0")
pytestmark = [pytest.mark.multi_gpu, pytest.mark.filterwarnings("ignore:the model caps its attention scores")]


@pytest.fixture(autouse=True)
def graphs_only():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rounds run without a CUDA graph")
        yield


def device_map(placement):
    numbers, others, draft = PLACEMENTS[placement]
    names = {"model.embed_tokens": numbers[0], **{f"model.layers.{n}": number for n, number in enumerate(numbers)}}
    names |= {"model.norm": numbers[-1], "lm_head": numbers[-1], **others}
    last = torch.cuda.device_count() - 1
    return {name: min(number, last) for name, number in names.items()}, None if draft is None else min(draft, last)


@contextlib.contextmanager
def saved(model, writer=write_often_right_head):
    """Folders of a model and its head, as keywords of from_pretrained."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/target")
        writer(copy.deepcopy(model), f"{folder}/head")
        yield {"base_model_path": f"{folder}/target", "ea_model_path": f"{folder}/head", **TREE}


def spread(folders, placement="halves", adaptive=False):
    placed, draft = device_map(placement)
    return EaModel.from_pretrained(**{**folders, "adaptive": adaptive}, device_map=placed, draft_device=draft)


def check_lossless(model, placement, writer=write_often_right_head):
    with saved(model, writer) as folders:
        single, decoder = EaModel.from_pretrained(**folders, device_map=0), spread(folders, placement)
    placed, draft = device_map(placement)
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        placed["model.embed_tokens"] = placed["lm_head"]
    assert {name: decoder.device_map[name].index for name in placed} == placed
    assert decoder.ea_layer.device.index == (placed["lm_head"] if draft is None else draft)
    ids = prompt(19, HOME)
    expected = single.base_model.generate(ids, do_sample=False, max_new_tokens=NEW)
    first = next(iter(decoder.device_map.values()))
    for given in (ids.to(first), ids.cpu()):
        out = decoder.eagenerate(given, max_new_tokens=NEW, return_dict_in_generate=True)
        assert out.sequences.device == given.device
        assert torch.equal(out.sequences.cpu(), expected.cpu())
    assert torch.equal(decoder.naivegenerate(ids, max_new_tokens=20), expected[:, : 19 + 20])
    assert torch.equal(decoder.base_model.generate(ids, do_sample=False, max_new_tokens=20), expected[:, : 19 + 20])
    ids, mask = batch_of([5, 19, 1], HOME)
    for options in ({}, {"temperature": 1.0, "top_p": 0.95, "seed": 7}):
        options = {"attention_mask": mask, "max_new_tokens": NEW, **options}
        assert torch.equal(decoder.eagenerate(ids, **options), single.naivegenerate(ids, **options))
    assert all(step.graphs for _, step, _ in decoder.states.idle)
    return out.statistics.tau


@pytest.mark.parametrize("placement", ["halves", "gaps", "rest elsewhere"])
def test_trees_may_change_over_several_gpus(placement, monkeypatch):
    """The head on another device than the logits too; every tree of a state in turn, the root alone among them."""
    with saved(make("llama")) as folders:
        single, decoder = EaModel.from_pretrained(**folders, device_map=0), spread(folders, placement, adaptive=True)
    turns = itertools.count()
    monkeypatch.setattr(TreeChooser, "next", lambda self, context: self.trees[next(turns) // 5 % len(self.trees)])
    ids, mask = batch_of([5, 19, 1], HOME)
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        options = {"attention_mask": mask, "max_new_tokens": 150, **options}
        out = decoder.eagenerate(ids, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, single.naivegenerate(ids, **options))
        assert len(out.statistics.trees) > 2


@pytest.mark.parametrize("placement", ["halves", "rest elsewhere"])
def test_records_are_those_of_one_gpu(placement):
    with saved(make("llama")) as folders:
        single, decoder = EaModel.from_pretrained(**folders, device_map=0), spread(folders, placement)
    ids, mask = batch_of([5, 19, 1], HOME)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.95, "seed": 7}
    options |= dict.fromkeys(["return_dict_in_generate", "output_scores", "output_logits", "output_logprobs"], True)
    out, expected = decoder.eagenerate(ids, **options), single.eagenerate(ids, **options)
    assert torch.equal(out.logprobs, expected.logprobs)
    for mine, other in zip((*out.scores, *out.logits), (*expected.scores, *expected.logits), strict=True):
        assert mine.device == HOME
        assert torch.equal(mine, other)
    assert all(step.graphs for _, step, _ in decoder.states.idle)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_lossless(name, placement):
    assert check_lossless(make(name), placement) > 3


@pytest.mark.parametrize("placement", ["lm_head first", "halves", "reversed"])
@pytest.mark.filterwarnings("ignore:model.embed_tokens and lm_head are one tied weight")
def test_lossless_with_tied_embeddings(placement):
    check_lossless(make("qwen3", tie_word_embeddings=True), placement, write_random_head)


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
def test_strategies(strategy):
    """Memory for no more than two thirds of the model on each GPU. balanced_low_0 gives accelerate no such choice."""
    model = make("llama", num_hidden_layers=12)
    limit = eagle_fast.target.placement.model_bytes(model) * 2 // 3
    with saved(model) as folders:
        single = EaModel.from_pretrained(**folders, device_map=0)
        limits = dict.fromkeys(range(torch.cuda.device_count()), limit)
        decoder = EaModel.from_pretrained(**folders, device_map=strategy, max_memory=limits)
        low = EaModel.from_pretrained(**folders, device_map="balanced_low_0")
    assert len(set(decoder.device_map.values())) >= 2
    ids = prompt(19, HOME)
    expected = single.eagenerate(ids, max_new_tokens=NEW)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(low.eagenerate(ids, max_new_tokens=NEW), expected)


def test_auto_takes_one_gpu_and_says_so():
    with saved(make("llama")) as folders:
        with pytest.warns(UserWarning, match=r"fits on one GPU and is on cuda:\d alone; 'balanced' spreads it"):
            decoder = EaModel.from_pretrained(**folders, device_map="auto")
        assert len(decoder.device_map) == 1
        assert len(set(EaModel.from_pretrained(**folders, device_map="balanced").device_map.values())) > 1


def test_weights_on_the_cpu():
    """accelerate's hooks stay; nothing is captured, with one warning at load."""
    with saved(make("llama")) as folders:
        single = EaModel.from_pretrained(**folders, device_map=0)
        placed = {**device_map("halves")[0], "model.layers.5": "cpu"}
        with pytest.warns(UserWarning, match="some of the weights lie on the CPU"):
            decoder = EaModel.from_pretrained(**folders, device_map=placed)
    ids = prompt(19, HOME)
    assert decoder.device_map["model.layers.5"] == torch.device("cpu")
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=20), single.eagenerate(ids, max_new_tokens=20))


@pytest.mark.parametrize("placement", ["halves", "rest elsewhere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_spread_round_gives_the_bits_of_one_gpu(placement, dtype):
    """The same kernels on the same rows: what crosses devices is copied, not computed. Wide enough for products in
    many parts."""
    with saved(make("llama", hidden_size=512, intermediate_size=1536, head_dim=16), write_random_head) as folders:
        found = []
        for options in (
            {"device_map": 0},
            dict(zip(("device_map", "draft_device"), device_map(placement), strict=True)),
        ):
            decoder = EaModel.from_pretrained(**folders, dtype=dtype, **options)
            decoder.eagenerate(prompt(19, HOME), max_new_tokens=NEW)
            state, _, _ = decoder.states.idle[0]
            logits, features = state.verify(state.draft())
            found.append((logits.cpu(), features.cpu()))
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


def copies_between_gpus(work):
    """Number of copies between GPUs that `work` makes, from a profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    names = Counter(event.name for event in profile.events())
    return sum(count for name, count in names.items() if "PtoP" in name), names


@pytest.mark.parametrize(
    # tree and accepted path to the other device, hidden rows over each boundary, features (2, 3, 3) not there yet
    ("placement", "expected"),
    [("halves", 2 + 1 + 1), ("reversed", 2 + 1 + 1), ("lm_head first", 2 + 2), ("all but the embedding", 1 + 1)],
)
def test_copies_of_a_replayed_round(placement, expected):
    with saved(make("llama")) as folders:
        decoder = spread(folders, placement)
    ids = prompt(19, HOME)
    decoder.eagenerate(ids, max_new_tokens=NEW)
    ((_, step, _),) = decoder.states.idle
    step()
    rounds = 3
    count, names = copies_between_gpus(lambda: [step() for _ in range(rounds)])
    assert count == rounds * expected, names


def test_no_host_read_inside_a_round():
    with saved(make("llama")) as folders:
        decoder = spread(folders)
    ids = prompt(19, HOME)
    expected = decoder.eagenerate(ids, max_new_tokens=NEW)
    ((state, steps, _),) = decoder.states.idle
    step = steps.of(state.tree)
    eager = step.step

    def forbidding():
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step.step, step.eager, step.graph = forbidding, True, None
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)


def test_calls_take_turns_without_waiting():
    """Prompts are prefilled on all devices while a graph of another call may still run there."""
    with saved(make("llama")) as folders:
        decoder = spread(folders, "repeated")
    ids = [prompt(length, HOME, length) for length in (19, 7, 30)]
    expected = [decoder.eagenerate(each, max_new_tokens=NEW) for each in ids]
    running = [decoder.ea_generate(each, max_new_tokens=NEW) for each in ids]
    texts = [None] * 3
    for _ in range(NEW):
        for place, each in enumerate(running):
            texts[place] = next(each, texts[place])
    assert all(torch.equal(*pair) for pair in zip(texts, expected, strict=True))


# -- faults ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_between_rounds_leaves_the_model_usable():
    with saved(make("llama")) as folders:
        decoder = spread(folders)
    ids = prompt(19, HOME)
    expected = decoder.eagenerate(ids, max_new_tokens=NEW)

    def interrupt(ids, scores):
        if ids.shape[1] > 30:
            raise KeyboardInterrupt
        return False

    for rounds in range(1, 5):
        running = decoder.ea_generate(ids, max_new_tokens=NEW)
        for _ in range(rounds):
            next(running)
        running.close()
        with pytest.raises(KeyboardInterrupt):
            decoder.eagenerate(ids, max_new_tokens=NEW, stopping_criteria=[interrupt])
        assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)


def test_out_of_memory_leaves_the_model_usable(monkeypatch):
    """The last GPU may hold 200 MiB more than it does: too little for the cache of a long text, and, where that fits,
    for a prompt of 100,000 tokens at once."""
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 100_000)
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    with saved(make("llama")) as folders:
        numbers = {f"model.layers.{n}": other for n in (3, 4, 5)}
        decoder = EaModel.from_pretrained(**folders, device_map={"": 0, **numbers})
    ids = prompt(19, HOME)
    expected = decoder.eagenerate(ids, max_new_tokens=NEW)
    held = torch.cuda.memory_reserved(other) + 200 * 2**20
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(other).total_memory, other)
    try:
        for length, new in ((19, 300_000), (100_000, 100)):
            with pytest.raises(torch.OutOfMemoryError):
                decoder.eagenerate(prompt(length, HOME), max_new_tokens=new, max_length=400_000)
            assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, other)


FAILED_CAPTURE = """
import gc, torch, warnings
from eagle_fast.decoding.graph import GraphedStep
gc.set_threshold(1)  # garbage, the failed step's pools among it, is collected as soon as it may be
devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
x = torch.zeros(8, device=devices[0])

def good():
    y = x.to(devices[1], non_blocking=True) + 1
    x.copy_(y, non_blocking=True)

def bad():
    good()
    x.sum().item()

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    step = GraphedStep(bad, devices)
    for _ in range(5):
        step()
assert [str(each.message)[:37] for each in seen] == ["rounds run without a CUDA graph, whic"], seen
assert step.eager and x.tolist() == [5.0] * 8, x
for order in (devices, devices[::-1]):  # pools on either device come and go
    step = GraphedStep(good, order)
    for _ in range(5):
        step()
    assert step.graph is not None
    with torch.cuda.device(order[0]):
        torch.cuda._sleep(100_000_000)  # some 50 ms
    step()
    del step  # while it waits to run
assert x.tolist() == [17.0] * 8, x
print("done")
"""


def test_a_failed_capture_runs_eagerly_and_leaves_torch_sound():
    done = subprocess.run([sys.executable, "-c", FAILED_CAPTURE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_memory_of_a_graph_is_its_own():
    """What a captured step allocates on either device is not handed out again while the graph lives."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    x, total = torch.ones(1000, device=HOME), torch.zeros(1000, device=HOME)

    def work():
        y = x
        for device in [*devices[1:], devices[0]]:
            y = y.to(device, non_blocking=True)
            y = (y + 1) * 2 - y
        total.add_(y)

    step = GraphedStep(work, devices)
    for calls in range(1, 8):
        step()
        junk = [torch.full((2**20,), float("nan"), device=device) for device in devices]
        del junk
        assert torch.equal(total, torch.full_like(total, calls * (1 + 2 * len(devices))))
    assert step.graph is not None
