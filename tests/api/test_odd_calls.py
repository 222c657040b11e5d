"""Odd calls that `tests/fuzz` cannot judge: numbers of NumPy, memory, unknown names, errors of users' code, settings of
torch."""

import contextlib
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from decoders import decoder, prompt, stock
from transformers import DynamicCache, GenerationConfig, TextStreamer

from eagle_fast import SamplingParams, TreeConfig, run_multi_gpu_inference
from eagle_fast.decoding import memory

NEW = 6


@pytest.fixture
def model(device):
    return decoder("llama", device)


@pytest.fixture
def ids(device):
    return prompt(11, device)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_tensors_are_numbers(model, ids):
    plain = model.eagenerate(ids, temperature=0.5, top_p=0.75, top_k=20, min_p=0.125, seed=5, max_new_tokens=NEW)
    for real in (np.float32, np.float64, np.float16, np.longdouble, torch.tensor, np.array, Fraction):
        whole = int if real is Fraction else np.int64 if real is np.float32 else torch.tensor
        out = model.eagenerate(
            ids, temperature=real(0.5), top_p=real(0.75), top_k=whole(20), min_p=real(0.125), seed=whole(5),
            max_new_tokens=whole(NEW), max_length=whole(100),
        )  # fmt: skip
        assert torch.equal(out, plain), real
    for seeds in ([5], (np.int64(5),), np.array([5]), torch.tensor([5]), range(5, 6)):
        assert SamplingParams(1.0, seed=seeds).seed == (5,)
    assert TreeConfig(np.int64(8), torch.tensor(2), np.uint8(4)) == TreeConfig(8, 2, 4)
    assert model.eagenerate(ids, max_new_tokens=NEW, eos_token_id=np.array([7, 9])).shape == (1, 11 + NEW)


@pytest.mark.parametrize("limits", [{"top_k": 2**63}, {"top_k": 10**400}, {"top_k": 1e300}, {"min_p": 1e-300}])
def test_limits_without_effect_are_none(limits, model, ids):
    options = {"temperature": 0.9, "seed": 3, "max_new_tokens": NEW}
    assert torch.equal(model.eagenerate(ids, **options, **limits), model.eagenerate(ids, **options))


def test_the_least_top_p_keeps_the_best_token(model, ids):
    out = model.eagenerate(ids, temperature=0.9, seed=3, top_p=1e-300, max_new_tokens=NEW)
    assert torch.equal(out, stock(model, ids, max_new_tokens=NEW))


NO_TEMPERATURES = [1e39, 10**400, 10**5000, np.bool_(True), torch.tensor([1.0]), np.timedelta64(1, "D")]


@pytest.mark.parametrize("value", NO_TEMPERATURES, ids=lambda each: type(each).__name__)
def test_no_temperatures(value, model, ids):
    with pytest.raises(ValueError, match=r"^temperature=.*: (use a finite number|all tokens would be equally likely)"):
        model.eagenerate(ids, temperature=value)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**31, 2**63, 10**400, 10**5000], ids=["31", "63", "big", "bigger"])
def test_texts_that_cannot_fit_are_refused_before_anything_is_allocated(length, model, ids):
    figures = (
        r"max_new_tokens=.*1 sequence of .* GiB, which are allocated at once, and .* has .* GiB free.*lower max_new"
    )
    for method in (model.eagenerate, model.naivegenerate, model.ea_generate):
        with pytest.raises(ValueError, match=figures):
            method(ids, max_new_tokens=length, max_length=length)
    if length < 2**63:
        with pytest.raises(ValueError, match=figures):
            model.generate(ids, max_new_tokens=length)
    with pytest.raises(ValueError, match=r"batch=.*max_length=.* GiB free"):
        model.warmup(batch=length)
    assert model.eagenerate(ids, max_new_tokens=length, max_length=14).shape == (1, 14)


def test_an_idle_state_is_room_enough(model, ids, monkeypatch):
    monkeypatch.setattr(memory, "FOR_SURE", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    model.states.clear()
    with pytest.raises(ValueError, match=r"0\.0 GiB free"):
        model.eagenerate(ids)
    monkeypatch.undo()
    model.eagenerate(ids)
    monkeypatch.setattr(memory, "FOR_SURE", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    model.eagenerate(ids)


def test_bytes_of_a_token_are_those_of_the_caches(model):
    model.states.clear()
    model.warmup(1, 1024)
    state = next(lease.state for lease in model.states.idle if lease.speculative)
    slabs = [*state.cache.slab.slabs, *state.drafter.slabs]
    table = 16 * model.ea_layer.config.head_dim
    assert sum(memory.token_bytes(model.states, True).values()) - table == sum(
        slab.nbytes // slab.shape[3] for slab in slabs
    )


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate", "ea_generate", "naive_generate"])
def test_unknown_options_name_the_method_and_what_it_takes(method, model, ids):
    call = getattr(model, method)
    with pytest.raises(TypeError, match=rf"^{method}\(\) takes no 'max_tokens', max_new_tokens perhaps.*min_p, seed"):
        call(ids, max_tokens=3)
    with pytest.raises(TypeError, match=rf"^{method}\(\) takes no 'streamer'; generate\(\) takes it"):
        call(ids, streamer=None)
    with pytest.raises(TypeError, match=rf"'do_sample'; generate\(\) .*or {method}\(..., temperature=1.0\)"):
        call(ids, do_sample=True)
    for own in ("speculative", "target", "show_padding"):
        with pytest.raises(TypeError, match=rf"{method}\(\) takes no '{own}'"):
            call(ids, **{own: 1})


# -- code of the user --------------------------------------------------------------------------------------------------


class Own(Exception):
    pass


@pytest.mark.parametrize("error", [Own("mine"), StopIteration("mine"), KeyError("mine"), GeneratorExit("mine")])
@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
def test_what_hooks_raise_comes_out_as_it_is(name, error, model, ids):
    def hook(seen, scores):
        raise error

    for method in (model.eagenerate, model.naivegenerate, model.generate):
        with pytest.raises(type(error)) as caught:
            method(ids, max_new_tokens=NEW, **{name: [hook]})
        assert caught.value is error
    if isinstance(error, StopIteration):  # which would end the caller's loop, as if the text were complete
        with pytest.raises(ValueError, match=r"hook raised StopIteration.*let it raise another"):
            list(model.ea_generate(ids, max_new_tokens=NEW, **{name: [hook]}))


def test_hooks_that_return_something_else_are_named(model, ids):
    with pytest.raises(ValueError, match=r"logits processor .*<lambda> returned None in place of scores: return the s"):
        model.eagenerate(ids, logits_processor=[lambda seen, scores: None, lambda seen, scores: scores + 1])
    with pytest.raises(ValueError, match=r"stopping criterion .*<lambda> returned 'yes': return True or False"):
        model.generate(ids, stopping_criteria=[lambda seen, scores: "yes"])
    with pytest.raises(ValueError, match=r"logits_processor: <lambda>\(seen\) is called with \(input_ids, scores\)"):
        model.eagenerate(ids, logits_processor=[lambda seen: seen])


# -- generate ----------------------------------------------------------------------------------------------------------

GENERATE = {
    "config": ({"generation_config": {}}, r"generation_config is a dict: pass a GenerationConfig"),
    "config class": ({"generation_config": GenerationConfig}, r"generation_config is a type"),
    "streamer class": ({"streamer": TextStreamer}, r"streamer is the class TextStreamer: pass an object"),
    "penalty": ({"repetition_penalty": "x"}, r"generate cannot use .*repetition_penalty='x'.*: ValueError"),
    "raw": ({"max_new_tokens": [3]}, r"transformers' generate cannot use max_new_tokens=\[3\].*: TypeError"),
    "guidance": ({"guidance_scale": "x"}, r"GuidanceLogitsProcessor cannot work with guidance_scale='x'.*TypeErr"),
    "n-gram": ({"no_repeat_ngram_size": 2**62}, r"no_repeat_ngram_size=4611686018427387904: no text repeats"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, r"contrastive_search \(penalty_alpha=0.6\)"),
    "allowed": ({"prefix_allowed_tokens_fn": 5}, r"prefix_allowed_tokens_fn is 5: pass a function"),
    "allowed a class": ({"prefix_allowed_tokens_fn": int}, r"is <class 'int'>: pass a function"),
    "allowed None": ({"prefix_allowed_tokens_fn": lambda row, ids: None}, r"fn\(0, ids\) returned None: return a list"),
    "allowed 999": ({"prefix_allowed_tokens_fn": lambda row, ids: [999]}, r"returned \[999\].*below 131"),
    "stop strings": ({"stop_strings": 5}, r"stop_strings=5: pass a text or a list of texts"),
    "tokenizer": ({"stop_strings": "a", "tokenizer": "gpt2"}, r"tokenizer is 'gpt2': pass the target's tokenizer"),
    "negative prompts": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(2, 3, dtype=torch.long)},
        r"made for 2 prompts, and 1 sequences are decoded",
    ),
    "mask": ({"attention_mask": torch.ones(1, 11, device="meta")}, r"attention_mask is on the meta device"),
    "cache": ({"past_key_values": (), "cache": 5}, r"cache"),
    "seed": ({"do_sample": True, "seed": "x"}, r"seed='x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATE)
def test_generate_says_what_it_cannot_use(name, model, ids):
    options, message = GENERATE[name]
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **{"max_new_tokens": NEW, **options})


def test_custom_generate_is_not_for_users(model, ids):
    with pytest.raises(ValueError, match=r"transformers calls custom_generate itself, as in base_model.generate\("):
        model.custom_generate(model.base_model, ids, [], [], None)


# -- the rest ----------------------------------------------------------------------------------------------------------

FORWARD = {
    "a mask of integers in four dimensions": (
        {"attention_mask": torch.ones(1, 1, 11, 11, dtype=torch.long)},
        r"attention_mask is \[1, 1, 11, 11\] of torch.int64",
    ),
    "ids": ({"input_ids": None}, "input_ids is a NoneType"),
    "cache": ({"past_key_values": ((1,),)}, "past_key_values is a tuple: pass a Cache"),
    "mask": ({"attention_mask": torch.ones(1, 4)}, r"attention_mask is \[1, 4\]: pass \[1, 11\]"),
    "positions": ({"position_ids": torch.ones(3)}, r"position_ids is \[3\] of torch.float32: pass \[1, 11\]"),
    "negative": ({"position_ids": torch.full((1, 11), -1)}, "position_ids go from -1 to -1"),
    "flag": ({"output_orig": "x"}, "output_orig='x': use True or False"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_says_what_it_cannot_use(name, model, ids):
    options, message = FORWARD[name]
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ids, **options})


def test_forward_takes_what_stock_takes(model, ids, device):
    hidden = model(ids)[1]
    assert torch.equal(model(ids.int())[1], hidden)
    assert torch.equal(model(ids, past_key_values=DynamicCache())[1], hidden)
    assert torch.equal(model(ids, position_ids=torch.arange(11, device=device)[None])[1], hidden)
    with pytest.raises(ValueError, match="has 1025 tokens, the model has positions for 1024"):
        decoder("gpt2", device)(prompt(1025, device))


def test_a_script_is_refused_before_it_loads():
    for options, message in (
        ({"input_text": ""}, "input_text is empty"), ({"temperature": -1}, "temperature=-1"),
        ({"input_text": "\udcff"}, "input_text is no UTF-8"), ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run_multi_gpu_inference("no such folder", "none", **{"input_text": "w3", **options})


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
    "device": lambda: torch.device("meta"),  # what is made without a device has no values
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_change_nothing(name, model, ids):
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    greedy, sampled = stock(model, ids, max_new_tokens=12), model.naivegenerate(ids, **options)
    model.states.clear()
    with SETTINGS[name](), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model.eagenerate(ids, max_new_tokens=12), greedy)
        assert torch.equal(model.eagenerate(ids, **options), sampled)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), greedy)
        hooks = {"logits_processor": [lambda seen, scores: scores], "stopping_criteria": [lambda seen, scores: False]}
        assert torch.equal(model.eagenerate(ids, max_new_tokens=12, **hooks), greedy)
    model.states.clear()
