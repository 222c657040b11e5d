"""Checkpoints of several modalities, by path: text as of the model itself; and checkpoints that are no decoders."""

import pytest
import torch
import transformers
from decoders import TREE, prompt
from often_right import write_random_head
from transformers import AutoConfig
from wrappers import WRAPPERS, write_wrapper

from eagle_fast import EaModel
from eagle_fast.target import UnsupportedModel
from eagle_fast.target.anatomy import placed_modules
from eagle_fast.target.placement import skeleton

NEW = 12
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "paligemma"])
def test_text_of_a_wrapper_by_path(name, tmp_path):
    model = write_wrapper(name, tmp_path / "base")
    head = write_random_head(model, tmp_path / "head")
    decoder = EaModel.from_pretrained(base_model_path=tmp_path / "base", ea_model_path=head, **TREE)
    assert type(decoder.base_model) is type(model)
    ids = prompt(11, CPU)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("name", WRAPPERS)
def test_placement_of_a_wrapper(name, tmp_path):
    """Its skeleton is of the class that is loaded, and the layers that are placed one by one are those of its text."""
    model = write_wrapper(name, tmp_path)
    empty = skeleton(AutoConfig.from_pretrained(tmp_path))
    assert type(empty) is type(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    names = list(placed_modules(empty))
    assert names == list(placed_modules(model))
    layers = {id(layer) for layer in empty.get_decoder().layers}
    assert {id(empty.get_submodule(each)) for each in names} >= layers
    placed = {id(parameter) for each in names for parameter in empty.get_submodule(each).parameters()}
    assert placed == {id(parameter) for parameter in empty.parameters()}


def test_a_prompt_read_in_both_directions_is_refused(tmp_path):
    model = write_wrapper("paligemma", tmp_path / "base")
    head = write_random_head(model, tmp_path / "head")
    with pytest.raises(UnsupportedModel, match="in both directions"):
        EaModel.from_pretrained(base_model_path=tmp_path / "base", ea_model_path=head, **TREE)


def test_a_wrapper_on_a_map(tmp_path):
    model = write_wrapper("llava", tmp_path / "base")
    head = write_random_head(model, tmp_path / "head")
    names = dict.fromkeys(placed_modules(model), "cpu")
    decoder = EaModel.from_pretrained(base_model_path=tmp_path / "base", ea_model_path=head, device_map=names, **TREE)
    ids = prompt(11, CPU)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)


_SMALL = dict(vocab_size=131, d_model=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, d_ff=32, d_kv=16)
NO_DECODERS = {
    "T5ForConditionalGeneration": (dict(model_type="t5", **_SMALL), "'t5' .*an encoder-decoder"),
    "BartForConditionalGeneration": (dict(model_type="bart", **_SMALL), "'bart' .*an encoder-decoder"),
    "WhisperForConditionalGeneration": (dict(model_type="whisper", **_SMALL), "'whisper' .*an encoder-decoder"),
    "BertForMaskedLM": (dict(model_type="bert", **_SMALL), "'bert' .*an encoder"),
    "Wav2Vec2ForCTC": (dict(model_type="wav2vec2"), "'wav2vec2' .*no causal language model"),
    "CLIPModel": (dict(model_type="clip"), "'clip' .*no causal language model"),
    "ViTForImageClassification": (dict(model_type="vit"), "'vit' .*no causal language model"),
}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_checkpoints_that_are_no_decoders(name, tmp_path):
    """Refused before weights are looked for, in a sentence or two, by type and class."""
    settings, message = NO_DECODERS[name]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=rf"base_model_path='.*' is of type {message}") as caught:
        EaModel.from_pretrained(base_model_path=tmp_path, ea_model_path=tmp_path)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500


def test_objects_that_are_no_decoders(tmp_path):
    head = write_random_head(write_wrapper("llava", tmp_path / "base"), tmp_path / "head")
    t5 = transformers.T5Config(vocab_size=131, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="'t5', an encoder-decoder"):
        EaModel.from_pretrained(base_model_path=transformers.T5ForConditionalGeneration(t5), ea_model_path=head)
