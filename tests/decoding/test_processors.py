"""Logits processors: the tree walk shows them exactly what transformers' own loop shows them."""

import threading

import pytest
import torch
from decoders import batch_of, decoder, prompt, stock
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)

from eagle_fast.decoding.processors import copies_for_rows, split_warpers

NEW = 16


class Recorder(LogitsProcessor):
    """Keeps every prefix that it sees, and moves the logits by the number of its calls."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores.roll(len(self.seen) % 3, -1)


class Grammar(LogitsProcessor):
    """Refuses to go on behind its last token."""

    def __init__(self, last):
        self.last = last

    def __call__(self, input_ids, scores):
        assert self.last not in input_ids[0, 11:]
        return scores


def only_even_after_odd(batch_id, ids):
    return list(range(batch_id, 131, 2)) if ids[-1] % 2 else list(range(131))


GREEDY = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.4},
    "bad_words": {"bad_words_ids": [[100], [98, 6], [13]]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 131, 3)), "begin_suppress_tokens": [4, 5, 7]},
    "forced_eos": {"forced_eos_token_id": 77},
    "sequence_bias": {"sequence_bias": [[[11], 9.0], [[12], -9.0]]},
    "allowed_tokens": {"prefix_allowed_tokens_fn": only_even_after_odd},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.5)},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_equals_stock_generate(name, device):
    model, ids = decoder("llama", device), prompt(11, device)
    options = {"max_new_tokens": NEW, "eos_token_id": 77, "pad_token_id": 0, **GREEDY[name]}
    expected = stock(model, ids, **options)
    assert not torch.equal(expected, stock(model, ids, max_new_tokens=NEW)), "this processor does nothing here"
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)


OF_BATCHES = {
    **GREEDY,
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram": {"encoder_no_repeat_ngram_size": 1},
    "negative prompts": {
        "guidance_scale": 1.5,
        "negative_prompt_ids": torch.tensor([[7, 8, 9], [90, 80, 70], [3, 4, 5]]),
    },
    "guidance without a cache": {"guidance_scale": 1.5, "use_cache": False},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=6.0)},
    "synth id": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4], ngram_len=3)},
}


@pytest.mark.parametrize("name", OF_BATCHES)
def test_processors_of_a_batch_hold_what_is_their_sequences(name, device):
    """Whatever transformers makes of a GenerationConfig may hold the prompts of all sequences, or count them."""
    model = decoder("llama", device)
    ids, mask = batch_of([11, 4, 9], device)
    options = {"max_new_tokens": NEW, "eos_token_id": 77, "pad_token_id": 0, "attention_mask": mask, **OF_BATCHES[name]}
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    assert torch.equal(model.generate(ids, do_sample=False, **options), stock(model, ids, **options))


def test_sequences_of_one_prompt_have_the_index_that_stock_gives_them(device):
    """Which is the prompt's, or in older releases the sequence's."""
    model, seen = decoder("llama", device), []
    ids = torch.cat([prompt(9, device, 1), prompt(9, device, 2)])

    def allowed(index, text):
        seen[-1].add((index, int(text[0])))
        return [index + 5]

    options = {"do_sample": True, "num_return_sequences": 3, "prefix_allowed_tokens_fn": allowed, "max_new_tokens": 3}
    texts = []
    for generate in (model.base_model.generate, model.generate):
        seen.append(set())
        texts.append(generate(ids, **options))
    assert torch.equal(*texts)
    assert seen[0] == seen[1]


def test_min_new_tokens_equals_stock_generate(device):
    """The text reaches a stop token early, and has to go around it, without and with padding before it."""
    model, ids = decoder("llama", device), prompt(11, device)
    stop = int(model.eagenerate(ids, max_new_tokens=3)[0, -1])
    options = {"eos_token_id": [stop, 5], "min_new_tokens": 9, "max_new_tokens": NEW, "pad_token_id": 0}
    expected = stock(model, ids, **options)
    assert expected.shape[1] >= 20
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
    ids, mask = batch_of([11, 3, 20], device)
    options |= {"attention_mask": mask, "repetition_penalty": 1.2, "forced_eos_token_id": 5}
    assert torch.equal(model.generate(ids, do_sample=False, **options), stock(model, ids, **options))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3_longrope"])
def test_other_families_equal_stock_generate(name, device):
    model, ids = decoder(name, device), prompt(55, device)
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    assert torch.equal(model.generate(ids, do_sample=False, **options), stock(model, ids, **options))


@pytest.mark.parametrize("lengths", [[11], [11, 3, 20]])
def test_a_stateful_processor_sees_what_stock_shows_it(lengths, device):
    model = decoder("llama", device)
    ids, mask = batch_of(lengths, device)
    ours, theirs = Recorder(), Recorder()
    options = {"attention_mask": mask, "max_new_tokens": NEW}
    expected = stock(model, ids, logits_processor=LogitsProcessorList([theirs]), **options)
    out = model.generate(ids, do_sample=False, logits_processor=LogitsProcessorList([ours]), **options)
    assert torch.equal(out, expected)
    assert ours.seen == [[step[0]] for step in theirs.seen]  # the object itself serves the first sequence


def test_nothing_is_called_behind_the_end(device):
    """A grammar that has ended must not be asked for more: not behind a stop token in the middle of a path."""
    model, ids = decoder("llama", device), prompt(11, device)
    text = model.eagenerate(ids, max_new_tokens=NEW)[0, 11:].tolist()
    for stop in text[:6]:
        grammar = Grammar(stop)
        out = model.eagenerate(ids, max_new_tokens=NEW, eos_token_id=stop, logits_processor=[grammar])
        assert out[0, 11:].tolist() == text[: text.index(stop) + 1]


def test_rows_of_a_batch_keep_states_of_their_own(device):
    model, lengths = decoder("mistral", device), [11, 1, 20]
    ids, mask = batch_of(lengths, device)
    out = model.eagenerate(ids, attention_mask=mask, max_new_tokens=NEW, logits_processor=[Recorder()])
    for row, length in enumerate(lengths):
        alone = prompt(length, device, row)
        expected = model.eagenerate(alone, max_new_tokens=NEW, logits_processor=[Recorder()])
        assert torch.equal(out[row, 20:], expected[0, length:])


def test_prefix_allowed_tokens_fn_knows_the_row(device):
    model = decoder("llama", device)
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "prefix_allowed_tokens_fn": only_even_after_odd}
    assert torch.equal(model.generate(ids, do_sample=False, **options), stock(model, ids, **options))


SAMPLED = {
    "repetition": [RepetitionPenaltyLogitsProcessor(1.5)],
    "typical": [TypicalLogitsWarper(0.7)],
    "plain function": [lambda ids, scores: scores.masked_fill(torch.arange(131, device=ids.device) % 5 == 0, -1e9)],
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_is_the_same_without_speculation(name, device):
    model = decoder("llama", device)
    ids, mask = batch_of([11, 3], device)
    options = {"temperature": 1.3, "top_p": 0.95, "seed": 4, "max_new_tokens": NEW, "attention_mask": mask}
    out = model.eagenerate(ids, logits_processor=SAMPLED[name], **options)
    assert torch.equal(out, model.naivegenerate(ids, logits_processor=SAMPLED[name], **options))
    assert not torch.equal(out, model.eagenerate(ids, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.05, "top_k": 30},
        {"top_h": 0.6},
        {"top_k": 12, "repetition_penalty": 1.4},
        {"top_p": 0.0},
    ],
    ids=str,
)
def test_warpers_of_generate_equal_warpers_on_the_host(options, device):
    """What generate(do_sample=True) does equals plain decoding with transformers' list, all of it on the host."""
    model, ids = decoder("llama", device), prompt(11, device)
    kept = []

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kept.append(logits_processor)
        return input_ids

    options = {"do_sample": True, "temperature": 1.4, **options}
    model.base_model.generate(ids, custom_generate=capture, max_new_tokens=NEW, **options)
    expected = model.naivegenerate(ids, temperature=1.0, seed=6, max_new_tokens=NEW, logits_processor=kept[0])
    assert torch.equal(model.generate(ids, seed=6, max_new_tokens=NEW, **options), expected)


T, K, P, M = TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)
R = RepetitionPenaltyLogitsProcessor(1.2)


@pytest.mark.parametrize(
    ("given", "host", "settings"),
    [
        ([T, K, P, M], 0, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}),
        ([R, T, P], 1, {"temperature": 0.7, "top_p": 0.9}),
        ([R], 1, {"temperature": 1.0}),
        ([], 0, {"temperature": 1.0}),
        ([P, T], 2, {"temperature": 1.0}),
        ([T, K, R, P], 4, {"temperature": 1.0}),
        ([T, TypicalLogitsWarper(0.9)], 2, {"temperature": 1.0}),
        ([T, TopPLogitsWarper(0.5, min_tokens_to_keep=3)], 2, {"temperature": 1.0}),
        ([T, TopKLogitsWarper(5, filter_value=-1e4)], 2, {"temperature": 1.0}),
        ([TopPLogitsWarper(0.0)], 1, {"temperature": 1.0}),
    ],
)
def test_only_what_the_sampler_does_leaves_the_host(given, host, settings):
    kept, found = split_warpers(LogitsProcessorList(given))
    assert list(kept) == given[:host]
    assert found == settings


def test_copies_share_models_and_name_what_cannot_be_copied(device):
    model = decoder("llama", device).base_model
    holder = Recorder()
    holder.model = model
    first, second = copies_for_rows(LogitsProcessorList([holder]), 2)
    assert first[0] is holder
    assert second[0] is not holder
    assert second[0].model is model
    holder.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"for each of 2 sequences .* one by one"):
        copies_for_rows(LogitsProcessorList([holder]), 2)


def test_a_processor_may_decode_with_the_same_model(device):
    model, ids = decoder("llama", device), prompt(11, device)

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            ahead = model.eagenerate(input_ids, max_new_tokens=2)[0, -1]
            return scores.index_fill(-1, ahead[None], -1e9)

    expected = stock(model, ids, max_new_tokens=6, logits_processor=LogitsProcessorList([Nested()]))
    assert torch.equal(model.eagenerate(ids, max_new_tokens=6, logits_processor=[Nested()]), expected)


def test_interrupted_inside_a_processor(device):
    model, ids = decoder("llama", device), prompt(11, device)
    expected = model.eagenerate(ids, max_new_tokens=NEW)

    class Interrupt(Recorder):
        def __call__(self, input_ids, scores):
            if len(self.seen) == 5:
                raise KeyboardInterrupt
            return super().__call__(input_ids, scores)

    idle = len(model.states.idle)
    with pytest.raises(KeyboardInterrupt):
        model.eagenerate(ids, max_new_tokens=NEW, logits_processor=[Interrupt()])
    assert len(model.states.idle) == idle, "the decoding state was lost or doubled"
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
