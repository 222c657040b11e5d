"""`EaModel` where others expect a `PreTrainedModel`: what they ask of it, pipelines, forwards as lm-eval calls them."""

import copy

import pytest
import torch
from chatty import END, make_tokenizer
from decoders import batch_of, decoder, prompt, rebuilt
from transformers import GenerationConfig, StoppingCriteria, TextStreamer, pipeline

NEW = 12


@pytest.fixture
def model(device):
    return rebuilt(decoder("llama", device))


def test_what_tools_ask(model):
    base = model.base_model
    assert (model.device, model.dtype, model.name_or_path) == (base.device, base.dtype, base.name_or_path)
    assert model.can_generate()
    assert model.generation_config is base.generation_config
    assert model.device == base.get_input_embeddings().weight.device
    before = base.get_output_embeddings().weight.clone()
    model.tie_weights()
    assert torch.equal(base.get_output_embeddings().weight, before)
    assert not hasattr(model, "hf_device_map")
    with pytest.raises(AttributeError, match="no_such_name"):
        model.no_such_name  # noqa: B018


def test_what_scripts_of_safeailab_ask(model):
    assert model.vocab_size == model.base_model.get_output_embeddings().weight.shape[0]
    assert model.hidden_size == model.base_model.config.hidden_size
    assert model.base_model_name_or_path == model.name_or_path
    assert model.use_eagle3 is (model.ea_layer.config.kind == "eagle3")


def test_a_generation_config_that_is_assigned_holds(model):
    ids = prompt(9, model.device)
    first = int(model.generate(ids, max_new_tokens=3)[0, 9])
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = first
    model.generation_config = config
    assert model.generate(ids, max_new_tokens=3).shape[1] == 10
    assert model.eagenerate(ids, max_new_tokens=3).shape[1] == 10
    assert model.base_model.generation_config is config
    with pytest.raises(ValueError, match="assign a GenerationConfig"):
        model.generation_config = {"eos_token_id": first}


@pytest.mark.filterwarnings("ignore")  # of transformers, about max_length
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_a_pipeline_of_it_speculates_and_gives_the_base_models_text(sample, model, capsys):
    tokenizer = make_tokenizer()
    settings = GenerationConfig(eos_token_id=END, pad_token_id=0, max_new_tokens=NEW, do_sample=False)
    rounds = []
    inner = model._rounds
    model._rounds = lambda *args: (rounds.append(1) or each for each in inner(*args))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if sample:
        options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "seed": 3}
        found = pipe("w5 w17 w40", return_tensors=True, **options)[0]["generated_token_ids"]
        ids = torch.tensor([[5, 17, 40]], device=model.device)
        assert found == model.generate(ids, **options)[0].tolist()
        assert rounds
        return
    stock = pipeline("text-generation", model=model.base_model, tokenizer=tokenizer)
    for texts in ("w5 w17 w40", ["w5 w17 w40", "w9"], [{"role": "user", "content": "w9 w30"}]):
        expected = stock(texts, generation_config=settings, batch_size=2)
        assert not rounds
        assert pipe(texts, generation_config=settings, batch_size=2) == expected
        assert rounds
        rounds.clear()
    pipe("w5 w17", generation_config=settings, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.startswith("w5 w17 ")


class ForSoManyRows(StoppingCriteria):
    """As lm-eval's: counts the rows itself, and says True when all of them have seen the token."""

    def __init__(self, token, batch, start):
        self.token, self.done, self.start = token, [False] * batch, start

    def __call__(self, input_ids, scores, **kwargs):
        texts = input_ids[:, self.start :].tolist()
        for row in range(len(self.done)):
            self.done[row] = self.done[row] or self.token in texts[row]
        return all(self.done)


def test_criteria_that_were_made_for_a_whole_batch(model):
    ids, mask = batch_of([5, 9, 7], model.device)
    texts = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)[:, 9:]
    token = int(texts[1, 4])
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, stopping_criteria=[ForSoManyRows(token, 3, 9)]
    )[:, 9:]
    for row, text in enumerate(texts.tolist()):
        length = text.index(token) + 1 if token in text else NEW
        assert found[row, :length].tolist() == text[:length]
        assert set(found[row, length:].tolist()) <= {0}
    with pytest.raises(IndexError):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, stopping_criteria=[ForSoManyRows(token, 4, 9)])


def test_forward_has_logits_and_a_loss_beside_the_pair(model):
    ids = prompt(9, model.device)
    with torch.inference_mode():
        expected = model.base_model(ids, labels=ids, output_hidden_states=True)
    found = model(ids, labels=ids, output_hidden_states=True, return_dict=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert len(found.hidden_states) == len(expected.hidden_states)
    _, hidden = found
    assert torch.equal(hidden, expected.hidden_states[-1])
    further = model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values)
    torch.testing.assert_close(further.logits[:, -1], expected.logits[:, -1])
    with pytest.raises(TypeError, match=r"forward\(\) takes no 'inputs_embeds'"):
        model(ids, inputs_embeds=None)
    with pytest.raises(AttributeError, match="no_such_name"):
        found.no_such_name  # noqa: B018
