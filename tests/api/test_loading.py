"""`EaModel.from_pretrained`: from folders as users have them, and from models in memory."""

import copy
import warnings

import pytest
import torch
from decoders import TREE, decoder, prompt, stock
from often_right import write_often_right_head
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from zoo import make

import eagle_fast.target.placement
from eagle_fast import EaModel, TreeConfig

NEW = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(target with tokenizer, head), saved as from the hub; token 77 is <|eot_id|>."""
    root = tmp_path_factory.mktemp("pair")
    model = make("llama")
    model.save_pretrained(root / "target")
    vocabulary = {"<|eot_id|>" if n == 77 else f"w{n}": n for n in range(131)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return root / "target", root / "head"


def load(folders, device, **options):
    target, head = folders
    return EaModel.from_pretrained(
        base_model_path=str(target), ea_model_path=str(head), **{"device_map": str(device), **TREE, **options}
    )


def test_positional_call_of_eagle(folders, device):
    target, head = folders
    ids = prompt(11, device)
    model = EaModel.from_pretrained(
        True, str(target), str(head), 16, 3, 4, 1.0, torch_dtype=torch.float32, low_cpu_mem_usage=True,
        device_map="auto",
    )  # fmt: skip
    model.eval()
    assert model.tree == TreeConfig(16, 3, 4)
    assert torch.equal(model.eagenerate(ids, 0.0, 0.0, 0.0, 16, 64), stock(model, ids, max_new_tokens=NEW))
    out, new_tokens, _ = model.eagenerate(ids, 0.0, 0.0, 0.0, 16, 64, True, False)
    assert new_tokens == out.shape[1] - 11 == NEW


def test_paths_may_be_path_objects(folders, device):
    model = EaModel.from_pretrained(base_model_path=folders[0], ea_model_path=folders[1], device_map=device, **TREE)
    assert len(model.get_tokenizer()) == 131


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_device_maps(device_map, folders):
    model = load(folders, None, device_map=device_map)
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert model.base_model.device.type == model.ea_layer.device.type == expected
    assert model.device_map == {"": model.base_model.device}
    ids = prompt(11, model.base_model.device)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=4), stock(model, ids, max_new_tokens=4))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "float32"])
def test_dtypes(name, dtype, folders, device):
    model = load(folders, device, **{name: dtype})
    expected = torch.float32 if dtype == "float32" else dtype
    assert model.base_model.dtype == model.ea_layer.dtype == expected
    out = model.eagenerate(prompt(11, device), max_new_tokens=NEW)
    assert out.shape == (1, 11 + NEW)
    assert torch.equal(out, load(folders, device, **{name: dtype}).eagenerate(prompt(11, device), max_new_tokens=NEW))


def test_tokenizer_comes_from_the_target(folders, device):
    model = load(folders, device)
    tokenizer = model.get_tokenizer()
    assert tokenizer.convert_tokens_to_ids("w12") == 12
    assert model.tokenizer is tokenizer
    ids = prompt(11, device)
    text = model.eagenerate(ids, max_new_tokens=NEW)[0, 11:].tolist()
    assert 77 not in text
    bias = [lambda ids, scores: scores + 50.0 * (torch.arange(131, device=ids.device) == 77) * (ids.shape[1] == 16)]
    out = model.eagenerate(ids, max_new_tokens=NEW, is_llama3=True, logits_processor=bias)
    assert out[0, 11:].tolist() == [*text[:5], 77]
    assert model.naivegenerate(ids, max_new_tokens=NEW, logits_processor=bias).shape[1] == 11 + NEW


def test_a_loaded_model_is_taken_as_it_is(folders, device):
    base = make("llama").to(device).train()
    model = EaModel.from_pretrained(base_model_path=base, ea_model_path=str(folders[1]), **TREE)
    assert model.base_model is base
    assert base.training
    ids = prompt(11, device)
    expected = load(folders, device).eagenerate(ids, max_new_tokens=NEW)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)


@pytest.mark.parametrize(("depth", "top_k"), [(2, 3), (1, 1)])
def test_total_token_from_measured_times(depth, top_k, folders, device):
    model = load(folders, device, total_token=-1, depth=depth, top_k=top_k, adaptive=None)
    assert model.adaptive
    assert 2 <= model.tree.total_token <= 1 + top_k + depth * top_k**2
    ids = prompt(11, device)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), stock(model, ids, max_new_tokens=NEW))


def test_warmup_leaves_states_that_calls_use(folders, device):
    model = load(folders, device)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model.warmup(batch=2, max_length=1500)
    assert torch.equal(torch.get_rng_state(), before)
    states = [id(state) for state, _, _ in model.states.idle]
    assert [state.max_length for state, _, _ in model.states.idle] == [2048, 2048]
    ids = prompt(11, device).repeat(2, 1)
    expected = stock(model, ids, max_new_tokens=NEW)
    for method in (model.eagenerate, model.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=NEW), expected)
    assert sorted(id(state) for state, _, _ in model.states.idle) == sorted(states)


@pytest.mark.parametrize(
    ("dtype", "size", "warned"), [("bfloat16", 1000, 1), ("bfloat16", 10**9, 0), ("float32", 1000, 0)]
)
def test_half_precision_on_the_cpu_warns_once(dtype, size, warned, folders, monkeypatch):
    monkeypatch.setattr(eagle_fast.target.placement, "SLOW_CPU_PARAMETERS", size)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = load(folders, "cpu", dtype=dtype)
        model.eagenerate(prompt(3, torch.device("cpu")), max_new_tokens=2)
    assert len([each for each in seen if "on the CPU is slow: pass dtype=torch.float32" in str(each.message)]) == warned


def test_sampling_settings_without_effect_are_named(device):
    model = decoder("llama", device)
    with pytest.warns(UserWarning, match="change nothing at temperature=0"):
        out = model.eagenerate(prompt(11, device), top_p=0.9, max_new_tokens=4)
    assert torch.equal(out, stock(model, prompt(11, device), max_new_tokens=4))


def test_head_and_target_of_one_process(folders, device):
    """A head made in memory, beside a model that other code holds as well."""
    base = make("llama").to(device)
    held = copy.deepcopy(base.state_dict())
    model = EaModel(base, load(folders, device).ea_layer, tree=TreeConfig(16, 3, 4))
    model.eagenerate(prompt(11, device), max_new_tokens=4)
    assert base.state_dict().keys() == held.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in base.state_dict().items())
    with pytest.raises(ValueError, match="tokenizer"):
        model.get_tokenizer()
