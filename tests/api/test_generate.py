"""`EaModel.generate` and `hf_model.generate(custom_generate=...)` mean what transformers' generate means."""

import copy

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, stock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

NEW = 16


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.got.append(value.tolist())

    def end(self):
        self.ended += 1


class Until(StoppingCriteria):
    """Ends a sequence after `length` tokens; counts its calls."""

    def __init__(self, length):
        self.length, self.calls = length, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def tokenizer():
    """w0 ... w130, one word per token; w2 is "abcdef", which stop strings need to see how tokens are joined."""
    vocabulary = {"abcdef" if n == 2 else f"w{n}": n for n in range(131)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="abcdef"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="abcdef")


@pytest.fixture
def model(device):
    return decoder("llama", device)


LENGTHS = {
    "max_new_tokens": {"max_new_tokens": 7},
    "one token": {"max_new_tokens": 1},
    "max_length": {"max_length": 20},
    "max_length to its last token": {"max_length": 12},
    "both": {"max_new_tokens": 5, "max_length": 30},
    "default": {},
    "config": {"generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=0)},
    "config and argument": {"generation_config": GenerationConfig(max_new_tokens=9), "max_new_tokens": 4},
    "eos": {"max_new_tokens": NEW, "eos_token_id": 17},
    "several eos": {"max_new_tokens": NEW, "eos_token_id": [3, 104, 20], "pad_token_id": 9},
    "max_time": {"max_new_tokens": NEW, "max_time": 0.0},
    "n-grams of a config": {"generation_config": GenerationConfig(no_repeat_ngram_size=1, max_new_tokens=40)},
}


@pytest.mark.parametrize("name", LENGTHS)
def test_ends_where_stock_generate_ends(name, model, device):
    ids, options = prompt(11, device), LENGTHS[name]
    expected = stock(model, ids, **options)
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, do_sample=False, **options), expected)
    if "generation_config" not in options:
        out = model.base_model.generate(ids, do_sample=False, custom_generate=model.custom_generate, **options)
        assert torch.equal(out, expected)


def test_stop_ids_come_from_the_models_generation_config(model, device):
    ids = prompt(11, device)
    text = stock(model, ids, max_new_tokens=NEW)[0, 11:].tolist()
    changed = rebuilt(model, lambda base: base.generation_config.update(eos_token_id=[text[6], text[4]]))
    expected = stock(changed, ids, max_new_tokens=NEW)
    assert expected[0, 11:].tolist() == text[: text.index(text[4]) + 1]
    for method in (changed.generate, changed.eagenerate, changed.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=NEW), expected)
    assert changed.eagenerate(ids, max_new_tokens=NEW, eos_token_id=[])[0, 11:].tolist() == text


@pytest.mark.parametrize("length", [12, 15, 16, 23])
def test_stopping_criteria(length, model, device):
    ids, ours, theirs = prompt(11, device), Until(length), Until(length)
    expected = stock(model, ids, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([theirs]))
    assert expected.shape[1] == length
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([ours]))
    assert torch.equal(out, expected)
    assert ours.calls == theirs.calls == length - 11
    for method in (model.eagenerate, model.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=NEW, stopping_criteria=[Until(length)]), expected)


def test_users_own_length_and_eos_criteria(model, device):
    ids = prompt(11, device)
    for criterion in (MaxLengthCriteria(14), MaxLengthCriteria(5), EosTokenCriteria(17)):
        criteria = StoppingCriteriaList([criterion])
        expected = stock(model, ids, max_new_tokens=NEW, stopping_criteria=criteria, pad_token_id=0)
        assert expected.shape[1] < 11 + NEW
        out = model.generate(ids, do_sample=False, max_new_tokens=NEW, stopping_criteria=criteria)
        assert torch.equal(out, expected)


def test_criteria_of_a_batch_see_what_stock_shows_them(model, device):
    """The padding counts, and every sequence has a counter of its own."""
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "stopping_criteria": StoppingCriteriaList([Until(29)])}
    assert torch.equal(model.generate(ids, do_sample=False, **options), stock(model, ids, **options))


def test_stop_strings(model, device):
    ids, words = prompt(11, device), tokenizer()
    text = stock(model, ids, max_new_tokens=NEW)[0, 11:].tolist()
    stop = words.decode(text[3:5])
    options = {"max_new_tokens": NEW, "stop_strings": [stop, "never"], "tokenizer": words}
    expected = stock(model, ids, **options)
    assert expected.shape[1] < 11 + NEW
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
    config = GenerationConfig(max_new_tokens=NEW, stop_strings=stop)
    assert torch.equal(model.generate(ids, config, do_sample=False, tokenizer=words), expected)
    assert config.stop_strings == stop
    with pytest.raises(ValueError, match="tokenizer="):
        model.generate(ids, max_new_tokens=NEW, stop_strings="w1 w2")


def test_stop_strings_of_a_tokenizer_that_transformers_does_not_understand(model, device):
    words = tokenizer()
    words.convert_tokens_to_string = lambda tokens: ""
    with pytest.raises(ValueError, match=r"stop_strings=\['w9'\]: transformers cannot tell how .* leave stop_strings"):
        model.generate(prompt(11, device), max_new_tokens=NEW, stop_strings=["w9"], tokenizer=words)


def test_healed_prompts_are_made_by_their_own_method(model, device):
    ids, words = prompt(11, device), tokenizer()
    with pytest.raises(ValueError, match=r"token_healing: .*heal_tokens"):
        model.generate(ids, max_new_tokens=NEW, token_healing=True, tokenizer=words)
    with pytest.raises(ValueError, match=r"token_healing: .*heal_tokens"):
        model.generate(ids, GenerationConfig(token_healing=True, max_new_tokens=NEW), tokenizer=words)
    changed = rebuilt(model, lambda base: base.generation_config.update(token_healing=True))
    with pytest.raises(ValueError, match=r"token_healing: .*heal_tokens"):
        changed.generate(ids, max_new_tokens=NEW)
    expected = stock(model, ids, max_new_tokens=NEW)
    assert torch.equal(changed.generate(ids, do_sample=False, max_new_tokens=NEW, token_healing=False), expected)


@pytest.mark.parametrize("entry", ["generate", "custom_generate", "custom_generate in a function"])
@pytest.mark.parametrize("batch", [1, 3])
def test_streamer_gets_what_stock_gives_it(entry, batch, model, device):
    ids, mask = batch_of([11, 3, 20][:batch], device)
    text = stock(model, ids, attention_mask=mask, max_new_tokens=NEW)
    stops = [int(text[row, -1 - 4 * row]) for row in range(batch)]
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": stops, "pad_token_id": 0}
    theirs, ours = Recorder(), Recorder()
    expected = stock(model, ids, streamer=theirs, **options)
    if entry == "generate":
        out = model.generate(ids, do_sample=False, streamer=ours, **options)
    else:
        loop = model.custom_generate
        if entry != "custom_generate":

            def loop(*args, **kwargs):
                return model.custom_generate(*args, **kwargs)

        out = model.base_model.generate(ids, do_sample=False, streamer=ours, custom_generate=loop, **options)
    assert torch.equal(out, expected)
    assert ours.got == theirs.got
    assert len(ours.got) == 1 + expected.shape[1] - ids.shape[1]
    assert ours.ended == 1


def test_text_streamers(model, device):
    ids, words = prompt(11, device), tokenizer()
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW, streamer=streamer)
    assert "".join(streamer) == words.decode(out[0, 11:])
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(ids.repeat(2, 1), max_new_tokens=NEW, streamer=TextIteratorStreamer(words))


SETTINGS = {
    "temperature": {"temperature": 1.5},
    "top_k": {"temperature": 1.5, "top_k": 4},
    "top_p": {"temperature": 1.5, "top_p": 0.7},
    "min_p": {"min_p": 0.1, "temperature": 2.0},
    "all": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_settings_are_those_of_eagenerate(name, model, device):
    """transformers limits sampling to the best 50 tokens unless told otherwise, and so does generate."""
    ids, options = prompt(11, device), {"max_new_tokens": NEW, "seed": 3, "top_k": 0, **SETTINGS[name]}
    expected = model.naivegenerate(ids, **options)
    assert not torch.equal(expected, model.naivegenerate(ids, max_new_tokens=NEW))
    assert torch.equal(model.generate(ids, do_sample=True, **options), expected)
    loop = model.custom_generate
    assert torch.equal(model.base_model.generate(ids, do_sample=True, custom_generate=loop, **options), expected)
    config = GenerationConfig(do_sample=True, **{key: value for key, value in options.items() if key != "seed"})
    assert torch.equal(model.generate(ids, config, seed=3), expected)


def test_no_seed_follows_torch(model, device):
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(model.generate(prompt(11, device), do_sample=True, temperature=1.5, max_new_tokens=NEW))
    torch.manual_seed(5)
    assert torch.equal(texts[0], model.naivegenerate(prompt(11, device), 1.5, top_k=50, max_new_tokens=NEW))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_num_return_sequences(model, device):
    ids, mask = batch_of([11, 3], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "temperature": 1.5, "top_k": 0}
    out = model.generate(ids, do_sample=True, num_return_sequences=3, seed=1, **options)
    assert out.shape == (6, 11 + NEW)
    assert torch.equal(out[:, :11], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out[:, 11:]}) == 6
    seeds = [4, 5, 6, 7, 8, 9]
    out = model.generate(ids, do_sample=True, num_return_sequences=3, seed=seeds, **options)
    for row, seed in enumerate(seeds):
        alone = model.eagenerate(ids[row // 3][mask[row // 3].bool()][None], 1.5, max_new_tokens=NEW, seed=[seed])
        assert torch.equal(out[row, 11:], alone[0, -NEW:])


def test_return_dict(model, device):
    ids = prompt(11, device)
    result = model.generate(ids, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
    expected = stock(model, ids, max_new_tokens=NEW, return_dict_in_generate=True).sequences
    for sequences in (result.sequences, result["sequences"], result[0]):
        assert torch.equal(sequences, expected)
    assert result.statistics.new_tokens == [NEW]
    assert 1 < result.statistics.tau <= 5


def test_left_padded_batches(model, device):
    ids, mask = batch_of([11, 1, 20], device)
    expected = stock(model, ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW), expected)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=NEW), expected), "the mask of pad tokens"
    inputs = {"input_ids": ids.cpu(), "attention_mask": mask.cpu()}  # as a tokenizer gives them
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=NEW), expected)


def test_only_for_its_own_model(model, device):
    other = copy.deepcopy(model.base_model)
    with pytest.raises(ValueError, match="its own base_model"):
        other.generate(prompt(11, device), custom_generate=model.custom_generate, max_new_tokens=2)
