"""Names that loading takes, and those that it does not: a TypeError of the method that was called, before weights."""

import inspect
import re

import pytest
import torch
from decoders import TREE
from often_right import write_random_head
from transformers import PreTrainedModel
from zoo import make

import eagle_fast.loading_target
from eagle_fast import EaModel
from eagle_fast.loading_options import OURS, transformers_options
from eagle_fast.multi_gpu import run_multi_gpu_inference, setup_multi_gpu_inference


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("pair"), make("llama", num_hidden_layers=2)
    model.save_pretrained(root / "target")
    write_random_head(model, root / "head")
    return root / "target", root / "head", model


UNKNOWN = {
    "foo": r"'foo'\. It takes ",
    "attn_implementaton": "attn_implementation perhaps",
    "totl_token": "total_token perhaps",
    "feature_layer": "feature_layers perhaps",
    "rope_parameter": "rope_parameters perhaps",
    "output_loading_info": "takes no",
    "to_dict": "takes no",
    "_from_auto": "takes no",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_refused_before_weights(pair, name, monkeypatch):
    target, head, _ = pair
    monkeypatch.setattr(eagle_fast.loading_target, "_load", None)
    rest = r"threshold.*norm_output.*goes to AutoModelForCausalLM.from_pretrained of .*fields of LlamaConfig"
    for call, method in (
        (lambda **o: EaModel.from_pretrained(None, target, head, **TREE, **o), "EaModel.from_pretrained"),
        (lambda **o: setup_multi_gpu_inference(target, "cpu", None, head, **o), "setup_multi_gpu_inference"),
        (lambda **o: run_multi_gpu_inference(target, head, "text", **o), "run_multi_gpu_inference"),
    ):
        with pytest.raises(TypeError, match=rf"^{method}\(\) takes no '{name}'.*{rest}") as caught:
            call(**{name: 1})
        assert re.search(UNKNOWN[name], str(caught.value)), caught.value


def test_names_of_a_loaded_model_and_of_the_class(pair):
    target, head, model = pair
    with pytest.raises(TypeError, match=r"^EaModel.from_pretrained\(\) takes no 'foo'.*loaded already"):
        EaModel.from_pretrained(None, model, head, foo=1)
    with pytest.raises(ValueError, match=r"\['pad_token_id'\] cannot change a model that is loaded already"):
        EaModel.from_pretrained(None, model, head, pad_token_id=1)
    with pytest.raises(TypeError, match=r"^EaModel\(\) takes no 'treee', tree perhaps\. .*base_model, ea_layer, tree"):
        EaModel(model, None, treee=None)
    with pytest.raises(TypeError, match=r"takes no 'pad_token_id'\. .*takes no fields of LlamaConfig beside config="):
        EaModel.from_pretrained(None, target, head, config=model.config, pad_token_id=1)


def test_fields_of_the_config_are_taken(pair):
    target, head, _ = pair
    options = dict(pad_token_id=3, attn_implementation="eager", low_cpu_mem_usage=True, max_position_embeddings=512)
    model = EaModel.from_pretrained(None, target, head, **TREE, **options)
    assert model.config.pad_token_id == 3
    assert model.config.max_position_embeddings == 512
    assert model.eagenerate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


def test_what_transformers_takes_is_known():
    """Every option that from_pretrained of this release takes by keyword."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    obsolete = re.search(r'for name in \[([^]]*"mirror"[^]]*)\]', source)[1]
    found = {*re.findall(r'kwargs\.pop\("(\w+)"', source), *re.findall(r'"(\w+)"', obsolete)}
    assert len(found) > 25
    assert {name for name in found if name[0] != "_"} - set(OURS) <= transformers_options()
