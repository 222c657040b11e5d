"""Bad input: an error that says what to do, before anything runs, and a model that still works afterwards."""

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, stock
from transformers import BatchEncoding, LlamaForCausalLM

from eagle_fast import NaNLogitsError
from eagle_fast.target.interface import CACHE_ARGUMENTS

INF, NAN = float("inf"), float("nan")
NAME = next(name for name in CACHE_ARGUMENTS if name in inspect.signature(LlamaForCausalLM.forward).parameters)


@functools.cache
def case(device):
    """What the tables below call: shorthands around one model."""
    model, ids = decoder("llama", device), prompt(11, device)
    padded, mask = batch_of([11, 4], device)

    def ea(input_ids=None, attention_mask=None, **options):
        given = ids if input_ids is None else input_ids
        return model.eagenerate(given, attention_mask=attention_mask, **{"max_new_tokens": 6, **options})

    return SimpleNamespace(
        model=model, ids=ids, padded=padded, mask=mask, device=device, ea=ea,
        generate=lambda **options: model.generate(ids, **{"max_new_tokens": 6, **options}),
        gpt2=lambda length, **options: decoder("gpt2", device).eagenerate(prompt(length, device), **options),
        custom=lambda **options: model.base_model.generate(
            ids, custom_generate=model.custom_generate, **{"max_new_tokens": 6, **options}
        ),
        processed=lambda value: ea(logits_processor=[lambda seen, scores: torch.full_like(scores, value)]),
    )  # fmt: skip


def put(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


CALLS = {
    # input_ids
    "id too large": (
        lambda c: c.ea(put(c.ids, (0, 4), 131)),
        ValueError,
        r"input_ids\[0, 4\] = 131 .* 131: .*tokenizer",
    ),
    "id negative": (lambda c: c.ea(put(c.ids, (0, 10), -1)), ValueError, r"input_ids\[0, 10\] = -1"),
    "id in row 1": (lambda c: c.ea(put(c.padded, (1, 9), 999), c.mask), ValueError, r"input_ids\[1, 9\] = 999"),
    "float ids": (lambda c: c.ea(c.ids.float()), ValueError, r"float32: token ids are integers"),
    "bool ids": (lambda c: c.ea(c.ids > 3), ValueError, r"torch.bool: token ids are integers"),
    "one dimension": (lambda c: c.ea(c.ids[0]), ValueError, r"shape \[11\]: pass \[B, L\].*input_ids\[None\]"),
    "no dimension": (lambda c: c.ea(c.ids[0, 0]), ValueError, r"shape \[\]: pass \[B, L\]"),
    "three dimensions": (lambda c: c.ea(c.ids[None]), ValueError, r"shape \[1, 1, 11\]"),
    "empty prompt": (lambda c: c.ea(c.ids[:, :0]), ValueError, r"shape \[1, 0\]: there is no token"),
    "empty batch": (lambda c: c.ea(c.ids[:0]), ValueError, r"shape \[0, 11\]"),
    "list": (lambda c: c.ea(c.ids.tolist()), ValueError, r"is a list: pass a LongTensor of shape \[B, L\]"),
    "array": (lambda c: c.ea(np.ones((1, 3), dtype=int)), ValueError, r"is a ndarray: pass a LongTensor"),
    "string": (lambda c: c.ea("Hello"), ValueError, r"is a str: pass a LongTensor"),
    "encoding": (lambda c: c.ea(BatchEncoding({"input_ids": c.ids})), ValueError, r'pass encoding\["input_ids"\]'),
    "dictionary": (lambda c: c.ea({"input_ids": c.ids}), ValueError, r'is a dict: pass encoding\["input_ids"\]'),
    "meta ids": (lambda c: c.ea(c.ids.to("meta")), ValueError, r"meta device, which holds no values"),
    # attention_mask
    "mask too short": (lambda c: c.ea(c.padded, c.mask[:, 1:]), ValueError, r"\[2, 10\], input_ids \[2, 11\]"),
    "mask of one row": (lambda c: c.ea(c.padded, c.mask[0]), ValueError, r"is \[11\], input_ids \[2, 11\]"),
    "mask list": (lambda c: c.ea(c.ids, [[1] * 11]), ValueError, r"attention_mask is a list: pass a tensor"),
    "hole": (lambda c: c.ea(c.padded, put(c.mask, (1, 9), 0)), ValueError, r"hole in row 1"),
    "hole of padding": (lambda c: c.ea(c.ids, put(torch.ones_like(c.ids), (0, slice(3, 5)), 0)), ValueError, r"row 0"),
    "all zero": (lambda c: c.ea(c.padded, put(c.mask, 1, 0)), ValueError, r"hides all of row 1"),
    "mask of twos": (lambda c: c.ea(c.padded, c.mask * 2), ValueError, r"other than 0 and 1: pass 1 for tokens"),
    "additive mask": (lambda c: c.ea(c.padded, (1 - c.mask) * -1e9), ValueError, r"other than 0 and 1"),
    "mask with nan": (lambda c: c.ea(c.padded, c.mask * NAN), ValueError, r"other than 0 and 1"),
    # sampling
    "temperature -1": (lambda c: c.ea(temperature=-1.0), ValueError, r"temperature=-1.0: use 0 for greedy"),
    "temperature tiny": (lambda c: c.ea(temperature=2e-5), ValueError, r"2e-05: too small to divide by; use 0"),
    "temperature nan": (lambda c: c.ea(temperature=NAN), ValueError, r"temperature=nan: use a finite number"),
    "temperature inf": (lambda c: c.ea(temperature=INF), ValueError, r"temperature=inf: use a finite number"),
    "temperature None": (lambda c: c.ea(temperature=None), ValueError, r"temperature=None: use a finite number"),
    "temperature text": (lambda c: c.ea(temperature="1"), ValueError, r"temperature='1'"),
    "top_p 1.5": (lambda c: c.ea(temperature=1.0, top_p=1.5), ValueError, r"top_p=1.5: use a probability from 0 to 1"),
    "top_p -0.1": (lambda c: c.ea(temperature=1.0, top_p=-0.1), ValueError, r"top_p=-0.1"),
    "top_p nan": (lambda c: c.ea(temperature=1.0, top_p=NAN), ValueError, r"top_p=nan"),
    "top_k -1": (lambda c: c.ea(temperature=1.0, top_k=-1), ValueError, r"top_k=-1: use a whole number.*0 for no"),
    "top_k 2.5": (lambda c: c.ea(temperature=1.0, top_k=2.5), ValueError, r"top_k=2.5: use a whole number"),
    "top_k inf": (lambda c: c.ea(temperature=1.0, top_k=INF), ValueError, r"top_k=inf"),
    "min_p 2": (lambda c: c.ea(temperature=1.0, min_p=2), ValueError, r"min_p=2: use a probability"),
    "seed -1": (lambda c: c.ea(temperature=1.0, seed=-1), ValueError, r"seed=-1: use an integer from 0 to 2\*\*63 - 1"),
    "seed 2**63": (lambda c: c.ea(temperature=1.0, seed=2**63), ValueError, r"seed=9223372036854775808"),
    "seed 1.5": (lambda c: c.ea(temperature=1.0, seed=1.5), ValueError, r"seed=1.5"),
    "seed True": (lambda c: c.ea(temperature=1.0, seed=True), ValueError, r"seed=True"),
    "two seeds": (lambda c: c.ea(temperature=1.0, seed=[1, 2]), ValueError, r"2 seeds for 1 sequences"),
    "no seeds": (lambda c: c.ea(temperature=1.0, seed=()), ValueError, r"0 seeds for 1 sequences"),
    "one of two seeds": (lambda c: c.ea(c.padded, c.mask, seed=[1, "2"]), ValueError, r"seed='2'"),
    # lengths
    "no new tokens": (lambda c: c.ea(max_new_tokens=0), ValueError, r"max_new_tokens=0: use a positive integer"),
    "max_new_tokens -5": (lambda c: c.ea(max_new_tokens=-5), ValueError, r"max_new_tokens=-5"),
    "max_new_tokens 7.0": (lambda c: c.ea(max_new_tokens=7.0), ValueError, r"max_new_tokens=7.0: use a positive"),
    "max_new_tokens None": (lambda c: c.ea(max_new_tokens=None), ValueError, r"max_new_tokens=None"),
    "max_length 0": (lambda c: c.ea(max_length=0), ValueError, r"max_length=0: use a positive integer"),
    "prompt of max_length": (lambda c: c.ea(max_length=11), ValueError, r"has 11 tokens, max_length=11 .*: raise max"),
    "one row too long": (lambda c: c.ea(c.padded, c.mask, max_length=6), ValueError, r"11 tokens, max_length=6"),
    "default max_length": (lambda c: c.ea(c.ids.repeat(1, 200)), ValueError, r"2200 tokens, max_length=2048"),
    "learned positions": (lambda c: c.gpt2(1025), ValueError, r"1025 tokens, the model has positions for 1024: short"),
    "warmup of nothing": (lambda c: c.model.warmup(batch=0), ValueError, r"batch=0: use a positive integer"),
    # stop ids, hooks, names
    "negative stop": (lambda c: c.ea(eos_token_id=[3, -1]), ValueError, r"\[-1, 3\]: a token id cannot be negative"),
    "stop string": (lambda c: c.ea(eos_token_id="</s>"), ValueError, r"'</s>': pass token ids, as in eos_token_id"),
    "float stop": (lambda c: c.ea(eos_token_id=[2.0]), ValueError, r"stop token 2.0"),
    "processor alone": (
        lambda c: c.ea(logits_processor=len),
        ValueError,
        r"logits_processor is a builtin.*pass a list",
    ),
    "processor name": (lambda c: c.ea(logits_processor=["a"]), ValueError, r"holds a str, which cannot be called"),
    "criterion alone": (lambda c: c.ea(stopping_criteria=len), ValueError, r"stopping_criteria is a .* pass a list"),
    "unknown name": (lambda c: c.ea(max_tokens=3), TypeError, r"'max_tokens'"),
    "beams": (lambda c: c.ea(num_beams=4), TypeError, r"'num_beams'"),
    "unknown name, stream": (lambda c: c.model.ea_generate(c.ids, stop=3), TypeError, r"'stop'"),
    "is_llama3": (lambda c: c.ea(is_llama3=True), ValueError, r"without a name: load its tokenizer"),
    # processors that leave nothing to choose
    "all -inf": (
        lambda c: c.processed(-INF),
        NaNLogitsError,
        r"sequence 0: .* position 11 .* leave at least one token",
    ),
    "all nan": (lambda c: c.processed(NAN), NaNLogitsError, r"sequence 0: .* position 11"),
    "+inf": (lambda c: c.processed(INF), NaNLogitsError, r"sequence 0: .* position 11 .*finite score"),
    "scores of two rows": (
        lambda c: c.ea(logits_processor=[lambda seen, scores: scores.repeat(2, 1)]),
        ValueError,
        r"\[2, 131\] from \[1, 131\]: they see one sequence at a time",
    ),
    # generate
    "generate, list": (lambda c: c.model.generate(c.ids.tolist()), ValueError, r"is a list: pass a LongTensor"),
    "generate, id": (lambda c: c.model.generate(put(c.ids, (0, 2), 500)), ValueError, r"input_ids\[0, 2\] = 500"),
    "generate, beams": (lambda c: c.generate(num_beams=3), ValueError, r"num_beams=3.*call base_model.generate"),
    "generate, sampled beams": (lambda c: c.generate(num_beams=3, do_sample=True), ValueError, r"num_beams=3"),
    "generate, contrastive": (lambda c: c.generate(penalty_alpha=0.6, top_k=4), ValueError, r"contrastive_search"),
    "generate, lookup": (lambda c: c.generate(prompt_lookup_num_tokens=3), ValueError, r"assisted_generation"),
    "generate, assistant": (lambda c: c.generate(assistant_model=c.model.base_model), ValueError, r"assistant_model"),
    "generate, dola": (lambda c: c.generate(dola_layers="low"), ValueError, r"dola_generation"),
    "generate, scores": (
        lambda c: c.generate(output_scores=True),
        ValueError,
        r"output_scores: pass return_dict_in_generate=True",
    ),
    "generate, attentions": (
        lambda c: c.generate(output_attentions=True, return_dict_in_generate=True),
        ValueError,
        r"output_attentions: not recorded.*base_model on the finished text",
    ),
    "logprobs without a dictionary": (
        lambda c: c.ea(output_logprobs=True, output_scores=True),
        ValueError,
        r"output_scores, output_logprobs: pass return_dict_in_generate=True",
    ),
    "logits without a dictionary, stream": (
        lambda c: c.model.naive_generate(c.ids, output_logits=True),
        ValueError,
        r"output_logits: pass return_dict_in_generate=True",
    ),
    "hidden states": (
        lambda c: c.ea(output_hidden_states=True, return_dict_in_generate=True),
        ValueError,
        r"output_hidden_states: not recorded",
    ),
    "scores of a number": (
        lambda c: c.ea(output_scores=2, return_dict_in_generate=True),
        ValueError,
        r"output_scores=2: use True or False",
    ),
    "generate, paged": (lambda c: c.generate(cache_implementation="paged"), ValueError, r"'paged' would bypass"),
    "generate, embeddings": (
        lambda c: c.model.generate(inputs_embeds=c.ids[..., None] * 1.0),
        ValueError,
        r"inputs_em",
    ),
    "generate, positions": (lambda c: c.generate(position_ids=c.ids), ValueError, r"position_ids: positions count"),
    "generate, unknown name": (lambda c: c.generate(max_tokens=3), ValueError, r"'max_tokens'"),
    "generate, no new tokens": (
        lambda c: c.generate(max_new_tokens=0),
        ValueError,
        r"must be greater than 0, but is 0",
    ),
    "generate, max_length": (
        lambda c: c.generate(max_length=5, max_new_tokens=None),
        ValueError,
        r"is 11, but `max_length` is set to 5",
    ),
    "generate, streamer": (lambda c: c.generate(streamer=print), ValueError, r"put\(\) and end\(\)"),
    "generate, seeds": (lambda c: c.generate(do_sample=True, seed=[1, 2]), ValueError, r"2 seeds for 1 sequences"),
    "custom_generate, cache": (
        lambda c: c.custom(**{NAME: cache(c)}),
        ValueError,
        rf"{NAME}: caches are kept within",
    ),
    "custom_generate, positions": (
        lambda c: c.custom(position_ids=c.ids),
        ValueError,
        r"position_ids: positions count",
    ),
    "custom_generate, beams": (lambda c: c.custom(num_beams=2), ValueError, r"num_beams=2"),
    "custom_generate, mask": (
        lambda c: c.custom(attention_mask=put(torch.ones_like(c.ids), (0, 3), 0)),
        ValueError,
        r"hole in row 0",
    ),
}


def cache(c):
    with torch.no_grad():
        return c.model.base_model(c.ids[:, :5])[NAME]


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name, device):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call(case(device))
    assert_still_right(device)


@functools.cache
def right_text(device):
    return stock(decoder("llama", device), prompt(11, device), max_new_tokens=4)


def assert_still_right(device):
    out = decoder("llama", device).eagenerate(prompt(11, device), max_new_tokens=4)
    assert torch.equal(out, right_text(device))


# -- logits that are no numbers --------------------------------------------------------------------------------------


def poison(token, value):
    def change(base):
        base.get_input_embeddings().weight[token, 0] = value

    return change


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_logits_are_named(value, device):
    """Behind one token everything is NaN: in the text, in the prompt of one row, and where it is only drafted."""
    sound, ids = decoder("llama", device), prompt(11, device)
    text = sound.eagenerate(ids, max_new_tokens=20)[0].tolist()
    model = rebuilt(sound, poison(text[15], value))
    for method in (model.eagenerate, model.naivegenerate):
        assert method(ids, max_new_tokens=5)[0].tolist() == text[:16], "the tokens before are sound"
        assert method(ids, max_new_tokens=20, eos_token_id=text[15])[0].tolist() == text[:16]
        with pytest.raises(
            NaNLogitsError, match=r"sequence 0: .* position 16 are NaN or infinite.* dtype=torch.bfloat16"
        ):
            method(ids, max_new_tokens=6)
        with pytest.raises(NaNLogitsError, match="position 16"):
            method(ids, max_new_tokens=6, temperature=1e-3, seed=1)
    padded, mask = batch_of([11, 4], device)
    padded[1, 8] = text[15]
    with pytest.raises(NaNLogitsError, match=r"sequence 1: .* position 4 "):
        model.eagenerate(padded, attention_mask=mask, max_new_tokens=1)
    assert model.eagenerate(ids, max_new_tokens=5)[0].tolist() == text[:16]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_of_one_value(value, device):
    def spoil(base):
        base.lm_head.register_forward_hook(lambda module, args, logits: logits * 0 + value)

    model = rebuilt(decoder("llama", device), spoil)
    for method in (model.eagenerate, model.naivegenerate, model.generate):
        with pytest.raises(NaNLogitsError, match=r"sequence 0: .* position 11 are NaN or infinite"):
            method(prompt(11, device), max_new_tokens=3)
