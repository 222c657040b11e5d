"""What is assigned between calls takes effect, or is refused: the tree, in our words and in SafeAILab/EAGLE's, the
head, the target."""

import copy

import pytest
import torch
from decoders import decoder, prompt, stock
from often_right import write_often_right_head, write_random_head

from eagle_fast import EaModel, TreeConfig
from eagle_fast.loading import load_head

NEW = 24


@pytest.fixture
def model(device):
    shared = decoder("llama", device)
    return EaModel(copy.deepcopy(shared.base_model), copy.deepcopy(shared.ea_layer), tree=shared.tree, adaptive=False)


def rounds_of(model, tree=None):
    """Rounds that a text takes; with `tree`, in a model that had it from the start. The text is always the target's."""
    ids = prompt(9, model.device)
    if tree is not None:
        model = EaModel(model.base_model, copy.deepcopy(model.ea_layer), tree=tree, adaptive=False)
    out = model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(out.sequences, stock(model, ids, max_new_tokens=NEW))
    return out.statistics.rounds


def test_a_tree_that_is_assigned_is_the_next_calls(model):
    before = rounds_of(model)
    model.tree = TreeConfig(2, 0, 1)
    assert rounds_of(model) == rounds_of(model, TreeConfig(2, 0, 1)) > before
    assert model.ea_layer.total_tokens == 1
    model.tree = TreeConfig(-1, 3, 4)
    rounds_of(model)
    assert 2 <= model.tree.total_token <= 53
    with pytest.raises(ValueError, match=r"tree='8': give a TreeConfig"):
        model.tree = "8"


def test_the_words_of_safeailab_for_it(model):
    head, before = model.ea_layer, rounds_of(model)
    assert (head.total_tokens, head.depth, head.top_k) == (15, 3, 4)
    head.depth, head.top_k = 0, 1
    assert head.depth == 0
    with pytest.raises(ValueError, match="total_token=16 is more than the 2 nodes"):
        rounds_of(model)
    head.total_tokens = 1
    assert rounds_of(model) == rounds_of(model, TreeConfig(2, 0, 1)) > before
    assert model.tree == TreeConfig(2, 0, 1)
    model.tree = TreeConfig(16, 3, 4)
    assert (head.total_tokens, head.depth, head.top_k) == (15, 3, 4)
    assert rounds_of(model) == before
    with pytest.raises(ValueError, match="depth='3': use an integer"):
        head.depth = "3"


def test_a_head_of_several_models_says_it_to_all(model):
    other = EaModel(model.base_model, model.ea_layer, tree=TreeConfig(8, 2, 3))
    model.ea_layer.depth = 4
    assert (model.tree, other.tree) == (TreeConfig(16, 4, 4), TreeConfig(8, 4, 3))
    third = EaModel(model.base_model, model.ea_layer, tree=TreeConfig(8, 2, 3))
    assert third.tree == TreeConfig(8, 2, 3)


def test_a_tree_wider_than_the_heads_vocabulary_is_refused(model, tmp_path):
    write_random_head(model.base_model, tmp_path, draft_vocab_size=3)
    small, ids = load_head(str(tmp_path), model.base_model), prompt(9, model.device)
    with pytest.raises(ValueError, match=r"top_k=4 is more than the 3 tokens that the head can propose"):
        EaModel(model.base_model, small, tree=TreeConfig(16, 3, 4))
    narrow = EaModel(model.base_model, small, tree=TreeConfig(16, 3, 3), adaptive=False)
    expected = stock(model, ids, max_new_tokens=NEW)
    assert torch.equal(narrow.eagenerate(ids, max_new_tokens=NEW), expected)
    with pytest.raises(ValueError, match="top_k=4 is more than the 3"):
        narrow.tree = TreeConfig(16, 3, 4)
    assert torch.equal(narrow.eagenerate(ids, max_new_tokens=NEW), expected)
    small.top_k = 4
    with pytest.raises(ValueError, match="top_k=4 is more than the 3"):
        narrow.eagenerate(ids, max_new_tokens=NEW)
    small.top_k = 3
    assert torch.equal(narrow.eagenerate(ids, max_new_tokens=NEW), expected)
    model.ea_layer = small
    with pytest.raises(ValueError, match="top_k=4 is more than the 3"):
        model.eagenerate(ids, max_new_tokens=NEW)


def test_a_stream_under_way_goes_on_with_its_tree(model):
    ids = prompt(9, model.device)
    stream = model.ea_generate(ids, max_new_tokens=NEW)
    next(stream)
    model.tree = TreeConfig(2, 0, 1)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), stock(model, ids, max_new_tokens=NEW))
    assert torch.equal(list(stream)[-1], stock(model, ids, max_new_tokens=NEW))
    assert all(each.state.tree in (model.tree, TreeConfig(1, 0, 1)) for each in model.states.idle)


@pytest.mark.parametrize("name", ["total_token", "depth", "top_k"])
def test_options_of_loading_are_no_attributes(name, model):
    with pytest.raises(AttributeError, match=rf"{name}=3 would change nothing: assign model.tree"):
        setattr(model, name, 3)
    assert not hasattr(model, name)


@pytest.mark.parametrize("name", ["topK_genrate", "stable_kv", "sample", "repeat_kv"])
def test_hooks_that_would_never_be_called_are_refused(name, model):
    with pytest.raises(AttributeError, match=f"{name} would never be called"):
        setattr(model.ea_layer, name, lambda *args: None)
    assert not hasattr(model.ea_layer, name)
    model.ea_layer.reset_kv()
    model.ea_layer.init_tree()
    model.ea_layer.gen_count = 0  # a counter of a script's own
    rounds_of(model)


def test_another_head_and_another_target(model, device):
    before = rounds_of(model)
    head, worse = model.ea_layer, copy.deepcopy(model.ea_layer)
    for parameter in worse.parameters():
        parameter.data.normal_()
    model.ea_layer = worse
    assert rounds_of(model) > before
    model.ea_layer = head
    assert rounds_of(model) == before
    old, changed = model.base_model, copy.deepcopy(model.base_model)
    changed.lm_head.weight.data = changed.lm_head.weight.data.flip(0)
    model.base_model = changed
    rounds_of(model)
    assert model.config is changed.config
    assert not torch.equal(stock(model, prompt(9, device), max_new_tokens=NEW), old.generate(prompt(9, device)))
    model.ea_layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ea_layer is a Linear"):
        rounds_of(model)


def test_a_head_without_a_model_has_no_tree(model, tmp_path):
    write_often_right_head(copy.deepcopy(model.base_model).cpu(), tmp_path)
    head = load_head(str(tmp_path), model.base_model)
    with pytest.raises(ValueError, match="the tree is the model's"):
        head.depth = 2
    assert not hasattr(head, "depth")


def test_a_tokenizer_that_is_assigned_is_the_models(model):
    mine = object()
    model.tokenizer = mine
    assert model.get_tokenizer() is mine


def forward_of_mine(self, *args, **options):
    raise AssertionError("not called")


@pytest.mark.parametrize("name", ["", "fc", "layers.0.qkv"])
def test_what_is_put_on_the_head_is_refused(name, model):
    """Its modules are gone around, or replayed from a graph: a hook there would be called now and then, or never."""
    module, ids = model.ea_layer.get_submodule(name), prompt(5, model.device)
    what = "ea_layer" + f".{name}" * bool(name)
    handle = module.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=rf"put on {what}, and rounds go around"):
        model.eagenerate(ids, max_new_tokens=2)
    handle.remove()
    module.forward = forward_of_mine.__get__(module)
    with pytest.raises(ValueError, match=rf"put on {what}, and rounds go around"):
        model.naivegenerate(ids, max_new_tokens=2)
    del module.forward
    model.eagenerate(ids, max_new_tokens=2)


def test_what_is_put_on_the_model_itself_is_refused(model):
    """Its base_model is followed; but `accelerate.prepare`, which keeps the forward that it replaces, is no edit."""
    ids = prompt(5, model.device)
    handle = model.register_forward_pre_hook(lambda *args: None)
    with pytest.raises(ValueError, match="put on the EaModel, whose rounds do not call it"):
        model.eagenerate(ids, max_new_tokens=2)
    handle.remove()
    model.forward = forward_of_mine.__get__(model)
    with pytest.raises(ValueError, match="put on the EaModel"):
        model.eagenerate(ids, max_new_tokens=2)
    model._original_forward = model.forward
    model.eagenerate(ids, max_new_tokens=2)


@pytest.mark.parametrize("name", ["config", "device_map"])
def test_what_is_base_models_is_not_assigned_here(name, model):
    with pytest.raises(AttributeError):
        setattr(model, name, {})
    assert model.config is model.base_model.config
