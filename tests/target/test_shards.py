"""A model over several devices, each of them a numbered CPU: the same text, and no transfer but those meant."""

import contextlib
import copy
import itertools
import tempfile

import pytest
import torch
from accelerate import dispatch_model
from decoders import TREE, batch_of, prompt
from fake_devices import FakeDevices, layers_map, place, routes
from often_right import write_often_right_head, write_random_head
from trees import PARENTS, PROMPT, prefill, tree_step
from zoo import FAMILIES, make

import eagle_fast.layers.linear
import eagle_fast.target.fused
import eagle_fast.target.merged
from eagle_fast import EaModel
from eagle_fast.decoding.adapt import TreeChooser
from eagle_fast.decoding.round import Round
from eagle_fast.layers.embedding import PackedEmbedding, int8_rows
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.loading import load_head
from eagle_fast.target import Target
from eagle_fast.target.anatomy import placed_modules
from eagle_fast.target.shards import Shard

NEW = 16
# device of each of the six decoder layers; devices of what stands beside them; device of the head
PLACEMENTS = {
    "halves": ([0, 0, 0, 1, 1, 1], {}, None),
    "reversed": ([1, 1, 1, 0, 0, 0], {}, None),
    "gaps": ([0, 0, 0, 2, 2, 2], {}, 1),
    "repeated": ([0, 1, 1, 0, 2, 0], {}, None),
    "a device each": ([5, 3, 1, 0, 2, 4], {}, 5),
    "rest elsewhere": ([0, 0, 1, 1, 1, 1], {"embedding": 2, "norm": 3, "head": 4}, 0),
    "lm_head first": ([0, 0, 0, 1, 1, 1], {"head": 0}, None),
    "one shard": ([1] * 6, {"embedding": 0, "norm": 1, "head": 1}, 0),
}
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


@pytest.fixture(autouse=True)
def fused_layers_of_fake_weights(monkeypatch):
    """Numbered tensors are no plain tensors, which our layers ask for, and have no storage to be stacked in."""
    monkeypatch.setattr(eagle_fast.target.fused, "can_fuse", lambda *_: True)
    monkeypatch.setattr(eagle_fast.target.merged, "_stacked", lambda *_: None)
    monkeypatch.setattr(eagle_fast.layers.linear, "is_plain", lambda module: type(module) is torch.nn.Linear)


@contextlib.contextmanager
def spread(model, placement, writer=write_often_right_head):
    """(decoder over several devices, one on one device, devices) of copies of a CPU model."""
    numbers, others, draft = PLACEMENTS[placement]
    with tempfile.TemporaryDirectory() as folder:
        writer(copy.deepcopy(model), folder)
        single = EaModel.from_pretrained(base_model_path=copy.deepcopy(model), ea_model_path=folder, **TREE)
        placed = place(copy.deepcopy(model), layers_map(numbers, **others))
        with FakeDevices() as devices:
            device = None if draft is None else torch.device("cpu", draft)
            yield EaModel(placed, load_head(folder, placed, device=device), tree=single.tree), single, devices


def check_lossless(model, placement, new=NEW, **options):
    with spread(model, placement, **options) as (decoder, single, _):
        ids = prompt(11, torch.device("cpu"))
        expected = single.base_model.generate(ids, do_sample=False, max_new_tokens=new)
        out = decoder.eagenerate(ids, max_new_tokens=new, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert torch.equal(decoder.naivegenerate(ids, max_new_tokens=3), expected[:, : 11 + 3])
        ids, mask = batch_of([5, 11, 1], torch.device("cpu"))
        options = {"attention_mask": mask, "temperature": 1.0, "top_p": 0.95, "seed": 7, "max_new_tokens": 8}
        assert torch.equal(decoder.eagenerate(ids, **options), single.naivegenerate(ids, **options))
        return out.statistics.tau


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_text_of_a_spread_model(placement):
    assert check_lossless(make("llama"), placement) > 3


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text", "gpt_oss", "phi3_longrope"])
def test_text_of_other_families(name):
    assert check_lossless(make(name), "rest elsewhere") > 3


@pytest.mark.parametrize("placement", ["lm_head first", "repeated"])
def test_text_with_tied_embeddings(placement):
    check_lossless(make("qwen3", tie_word_embeddings=True), placement, new=5, writer=write_random_head)


def test_text_of_an_eagle1_head():
    def write(model, folder):
        write_often_right_head(model, folder, "eagle")

    assert check_lossless(make("llama"), "rest elsewhere", writer=write) > 3


def test_processors_see_a_spread_model():
    with spread(make("llama"), "gaps") as (decoder, single, _):
        ids = prompt(11, torch.device("cpu"))
        options = {"max_new_tokens": 12, "repetition_penalty": 1.3, "do_sample": False}
        assert torch.equal(decoder.generate(ids, **options).cpu(), single.base_model.generate(ids, **options))


def test_conversations_of_a_spread_model(monkeypatch):
    """Rows are reused where they lie, and copied there to a longer state."""
    monkeypatch.setattr("eagle_fast.decoding.states.LENGTH_STEP", 32)
    with spread(make("llama"), "gaps") as (decoder, single, _):
        ids, held = prompt(20, torch.device("cpu")), 0
        for _ in range(3):
            out = decoder.eagenerate(ids, max_new_tokens=8, reuse_cache=True, return_dict_in_generate=True)
            assert torch.equal(out.sequences.cpu(), single.naivegenerate(ids, max_new_tokens=8))
            assert out.statistics.reused_tokens == [held]
            held = out.sequences.shape[1] - 2
            ids = torch.cat([out.sequences.cpu(), prompt(6, torch.device("cpu"))], 1)
        assert [lease.state.max_length for lease in decoder.states.idle] == [64]


# Copies per round by (source, destination). Hidden rows cross every boundary once; the tree and the accepted path go
# once to every device that needs them; features (inputs of layers 2, 3 and 3 of these models) go straight to the head,
# with the hidden rows where those go there anyway.
EXPECTED = {
    "halves": {(1, 0): 2, (0, 1): 2},
    # tree, path; hidden; features 2, 3: the logits, and the head, are on 0
    "reversed": {(0, 1): 2, (1, 0): 2},
    # roots; tree back, path; tree and path to layers on 0; hidden of the boundary; features to 1
    "gaps": {(2, 1): 2, (1, 2): 1, (2, 0): 2, (0, 2): 1, (0, 1): 2},
    "repeated": {(0, 1): 3, (0, 2): 3, (1, 0): 2, (2, 0): 1},
    "lm_head first": {(0, 1): 3, (1, 0): 1},
    # tree to the embedding's device, roots and path to the head's, tree back; hidden; features
    "one shard": {(1, 0): 5, (0, 1): 2},
}


@pytest.mark.parametrize("placement", EXPECTED)
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])  # fused and stock layers
def test_copies_of_a_round(name, placement):
    with spread(make(name), placement) as (decoder, _, devices):
        decoder.eagenerate(prompt(11, torch.device("cpu")), max_new_tokens=4)
        state, step, _ = decoder.states.idle[0]
        devices.between_devices()
        step()
        copies = devices.between_devices()
        assert dict(routes(copies)) == EXPECTED[placement], "\n".join(map(str, copies))
        hidden = [each for each in copies if each.dtype.is_floating_point]
        assert {each.shape for each in hidden} == {(1, state.num_nodes, 64)}
        shards = decoder.target.shards
        boundaries = sum(before.device != after.device for before, after in itertools.pairwise(shards))
        assert len(hidden) <= boundaries + 2 + len(decoder.target.features.order)


def test_copies_of_a_prompt_chunk(monkeypatch):
    """A chunk's hidden rows cross each boundary once, its features go to the head, and nothing else moves."""
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 8)
    with spread(make("llama"), "halves") as (decoder, single, devices):
        ids = prompt(25, torch.device("cpu"))
        state = Round(decoder.target, decoder.ea_layer, decoder.tree, 1, 64)
        devices.between_devices()
        state.begin(ids.tolist(), [40])
        copies = devices.between_devices()
        # per chunk: tokens to the embedding, hidden rows with feature 3, feature 2
        assert dict(routes(copies)) == {(1, 0): 3, (0, 1): 6}
        assert torch.equal(decoder.eagenerate(ids, max_new_tokens=8), single.eagenerate(ids, max_new_tokens=8))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_transfer_hides_inside_a_layer(name):
    """Every family, layers on [0, 0, 1, 2, 2, 0], the rest on 3, lm_head on 4: same numbers, one copy a boundary."""
    model = make(name)
    single = Target(copy.deepcopy(model), (2, 3, 5))
    head = next(name for name, each in model.named_modules() if each is model.get_output_embeddings())
    layers = [name for name in placed_modules(model) if name.rpartition(".")[2].isdigit()]
    placed = place(copy.deepcopy(model), {"": 3, head: 4, **dict(zip(layers, [0, 0, 1, 2, 2, 0], strict=True))})
    tokens = torch.randint(3, 130, (2, PROMPT + len(PARENTS)), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([PROMPT, PROMPT - 6])

    def run(target, device):
        cache, there = target.new_cache(2, 64), tokens.to(device)
        prefill(target, there[:, :PROMPT], cache)
        return lambda: target.verify(there[:, PROMPT:], tree_step(lengths.to(device), device), cache)

    expected = run(single, torch.device("cpu"))()
    with FakeDevices() as devices:
        target = Target(placed, (2, 3, 5), torch.device("cpu", 1))
        assert [shard.layers for shard in target.shards] == [range(2), range(2, 3), range(3, 5), range(5, 6)]
        assert target.shards[1] == Shard(torch.device("cpu", 1), range(2, 3))
        verify = run(target, target.device)
        devices.between_devices()
        found = verify()
        copies = devices.between_devices()
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), other)
    tree = [(4, 3), (4, 0), (4, 1), (4, 2)]
    hidden = [(3, 0), (0, 1), (1, 2), (2, 0), (0, 3), (3, 4)]
    features = [(2, 1)]  # layer 2's input is on its way there, layer 3's is there
    assert sorted(routes(copies).elements()) == sorted([*tree, *hidden, *features]), "\n".join(map(str, copies))


def test_a_fault_inside_a_shard_leaves_the_model_usable():
    """Out of memory in the fifth layer: once in a prompt, once in a round."""

    def failing_after(passes):
        left = iter(range(passes))

        def fail(module, args):
            if next(left, None) is None:
                raise torch.OutOfMemoryError("no memory for the fifth layer")

        return fail

    with spread(make("llama"), "halves") as (decoder, single, _):
        ids = prompt(11, torch.device("cpu"))
        expected = single.eagenerate(ids, max_new_tokens=8)
        for passes in (0, 1):
            failing = decoder.target.decoder_layers[4].register_forward_pre_hook(failing_after(passes))
            with pytest.raises(torch.OutOfMemoryError, match="fifth layer"):
                decoder.eagenerate(ids, max_new_tokens=8)
            failing.remove()
            assert not decoder.target.transfers._sent
            assert torch.equal(decoder.eagenerate(ids, max_new_tokens=8), expected)


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
@pytest.mark.parametrize("placement", ["rest elsewhere", "lm_head first", "gaps"])
def test_packed_ends_on_other_devices(placement, kind):
    """The head has rows of its own, where it lies elsewhere."""
    plain, model = make("llama"), make("llama")
    model.lm_head = PackedLinear.of(int8_rows(plain.lm_head.weight))
    model.model.embed_tokens = PackedEmbedding(PackedLinear.of(int8_rows(plain.model.embed_tokens.weight)))
    assert check_lossless(model, placement, writer=lambda _, folder: write_often_right_head(plain, folder, kind)) > 2


def test_hooks_of_accelerate_stay_on_the_users_model():
    """As from_pretrained leaves a model over several devices: its own `generate` goes on working, the twin has none."""
    model = make("llama")
    places = layers_map([0, 0, 1, 1, 2, 0], embedding=1, norm=2, head=1)
    ids = prompt(11, torch.device("cpu"))
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    with tempfile.TemporaryDirectory() as folder, FakeDevices():
        write_often_right_head(copy.deepcopy(model), folder)
        place(model, places)
        dispatch_model(model, {name: f"cpu:{number}" for name, number in places.items() if name}, force_hooks=True)
        decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=folder, **TREE)
        assert torch.equal(decoder.eagenerate(ids, max_new_tokens=8), expected)
        assert torch.equal(model.generate(ids.to("cpu:1"), do_sample=False, max_new_tokens=8).cpu(), expected)
    assert decoder.device_map == {name: torch.device("cpu", number) for name, number in places.items() if name}
    assert next(iter(decoder.device_map)) == "model.embed_tokens"
    assert all(hasattr(module, "_hf_hook") for module in model.modules() if list(module.parameters(recurse=False)))
    left = [
        each for each in decoder.target.model.modules() if {"_hf_hook", "_old_forward", "forward"} & set(vars(each))
    ]
    assert not left


@pytest.mark.parametrize("placement", ["halves", "gaps", "a device each", "rest elsewhere"])
def test_trees_may_change_over_several_devices(placement, monkeypatch):
    """The head on another device than the logits too; every tree of a state in turn, the root alone among them."""
    with spread(make("llama"), placement) as (decoder, single, _):
        decoder = EaModel(decoder.base_model, decoder.ea_layer, tree=decoder.tree, adaptive=True)
        turns, trees = itertools.count(), decoder.trees(3)
        monkeypatch.setattr(TreeChooser, "next", lambda self, context: trees[next(turns) // 4 % len(trees)])
        monkeypatch.setattr("eagle_fast.decoding.steps.MOST_WAITING", 3)
        ids, mask = batch_of([5, 11, 1], torch.device("cpu"))
        options = {"attention_mask": mask, "temperature": 1.0, "seed": 7, "max_new_tokens": 60}
        out = decoder.eagenerate(ids, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, single.naivegenerate(ids, **options))
        assert set(out.statistics.trees) == set(trees)


def test_a_layer_on_two_devices_is_refused():
    model = place(make("llama"), {"": 0, "model.layers.4.mlp": 1})
    with FakeDevices(), pytest.raises(ValueError, match="decoder layer 4 lies on cpu:0, cpu:1: give every layer one"):
        Target(model)


def test_the_fake_devices_see_a_hidden_transfer():
    """What these tests rest on: mixing devices is an error, explicit copies are counted."""
    with FakeDevices() as devices:
        a, b = torch.ones(2, device="cpu:0"), torch.ones(2, device="cpu:1")
        for mixed in (lambda: a + b, lambda: a + torch.ones(2), lambda: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        assert torch.equal((a + b.to("cpu:0") * 2 + torch.tensor(1.0)).cpu(), torch.full((2,), 4.0))
        assert routes(devices.between_devices()) == {(1, 0): 1}
        a.copy_(b)
        assert routes(devices.between_devices()) == {(1, 0): 1}
