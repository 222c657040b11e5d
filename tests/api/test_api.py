"""What `EaModel`'s own methods promise: where texts end, streaming, statistics, and a target that stays as it was."""

import inspect
import itertools
import threading

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, stock
from zoo import make

import eagle_fast.decoding.states
from eagle_fast import EaModel, Generation

NEW = 16


@pytest.fixture
def model(device):
    return decoder("llama", device)


@pytest.fixture
def ids(device):
    return prompt(11, device)


# -- where a text ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 9}], ids=["greedy", "sampled"])
def test_ends_at_the_first_stop_token_wherever_it_is(name, sampling, device, ids):
    """The successor of the prompt, the first, a middle and the last node of an accepted path."""
    model = decoder(name, device)
    result = model.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **sampling)
    text = result.sequences[0, 11:].tolist()
    assert result.statistics.tau > 2, "no stop token in the middle of a path"
    for place in (0, 1, 2, 3, 6, 11):
        for stops in (text[place], [130, text[place], text[-1]]):
            end = min(text.index(stop) for stop in {text[place], text[-1] if isinstance(stops, list) else text[place]})
            out = model.eagenerate(ids, max_new_tokens=NEW, eos_token_id=stops, **sampling)
            assert out[0, 11:].tolist() == text[: end + 1]


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate", "generate"])
def test_never_past_max_new_tokens(method, model, ids):
    text = stock(model, ids, max_new_tokens=NEW)
    for new in (1, 2, 3, 4, 7):
        assert torch.equal(getattr(model, method)(ids, max_new_tokens=new), text[:, : 11 + new])


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_max_length_is_usable_to_its_last_token(name, device):
    model, ids = decoder(name, device), prompt(61, device)
    text = stock(model, ids, max_new_tokens=NEW)
    for length in (62, 64, 65, 66, 77):
        for method in (model.eagenerate, model.naivegenerate):
            assert torch.equal(method(ids, max_length=length), text[:, :length])


def test_learned_positions_are_usable_to_the_last(device):
    """1024 positions: the last token of 1025 needs none. A longer text ends there."""
    model, ids = decoder("gpt2", device), prompt(1017, device)
    expected = stock(model, ids, max_new_tokens=8)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=8), expected)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=500), expected)
    assert torch.equal(model.naivegenerate(expected[:, :1024], max_new_tokens=500), expected)


def test_caches_grow_and_are_kept(device, ids):
    """1020 tokens and 12 new ones leave the first kilotoken, 1030 the first chunk of a prefill."""
    model = rebuilt(decoder("llama", device))
    expected = {n: stock(model, prompt(n, device), max_new_tokens=12) for n in (11, 1020, 1030)}
    for length in (11, 1020, 1030, 11, 1020):
        assert torch.equal(model.eagenerate(prompt(length, device), max_new_tokens=12), expected[length])
    assert len(model.states.idle) == 1
    stop = int(expected[11][0, 14])
    out = model.eagenerate(ids, max_new_tokens=5000, max_length=6000, eos_token_id=stop)
    assert torch.equal(out, expected[11][:, : out.shape[1]])
    assert [state.max_length for state, _, _ in model.states.idle] == [5120]


def test_states_can_be_let_go(device, ids):
    model = rebuilt(decoder("llama", device))
    expected = model.eagenerate(ids, max_new_tokens=4)
    model.naivegenerate(ids, max_new_tokens=4)
    steps = [step for _, step, _ in model.states.idle]
    assert len(steps) == 2
    model.states.clear()
    assert model.states.idle == []
    assert not any(step.graphs or step.of_trees for step in steps)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=4), expected)


def test_idle_states_make_room_when_memory_runs_out(monkeypatch, device, ids):
    model = rebuilt(decoder("llama", device))
    expected = model.eagenerate(ids.repeat(2, 1), max_new_tokens=4)
    made = []

    class Tight(eagle_fast.decoding.states.Round):
        def __init__(self, *args):
            made.append(len(model.states.idle))
            if len(made) == 1:
                raise torch.OutOfMemoryError("no room")
            super().__init__(*args)

    monkeypatch.setattr(eagle_fast.decoding.states, "Round", Tight)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=4), expected[:1])
    assert made == [1, 0]


# -- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ea_generate", "naive_generate"])
@pytest.mark.parametrize("batch", [1, 3])
def test_streams_growing_prefixes(method, batch, model, device):
    ids, mask = batch_of([11, 3, 20][:batch], device)
    expected = model.eagenerate(ids, attention_mask=mask, max_new_tokens=NEW)
    seen = list(getattr(model, method)(ids, attention_mask=mask, max_new_tokens=NEW))
    lengths = [out.shape[1] for out in seen]
    assert lengths == sorted(lengths)  # of a batch, the longest may wait for the others
    assert len(seen) == NEW if method == "naive_generate" else len(seen) < NEW
    assert torch.equal(seen[-1], expected)
    for out in seen:
        whole = expected[:, : out.shape[1]]
        assert ((out == whole) | (out == 0)).all()
        assert torch.equal(out[:, : ids.shape[1]], ids)


def test_streams_may_be_closed_early(model, ids):
    expected = model.eagenerate(ids, max_new_tokens=NEW)
    idle = len(model.states.idle)
    stream = model.ea_generate(ids, max_new_tokens=NEW)
    next(stream)
    stream.close()
    with pytest.raises(ZeroDivisionError):
        _fail_on_reading(model.ea_generate(ids, max_new_tokens=NEW))
    stream = model.naive_generate(ids, max_new_tokens=NEW)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    model.ea_generate(ids, max_new_tokens=NEW)  # never started
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(model.naivegenerate(ids, max_new_tokens=NEW), expected)
    assert len(model.states.idle) <= idle + 1


def _fail_on_reading(stream):
    for _ in stream:
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_interleaved_streams(name, device):
    model, prompts = decoder(name, device), [prompt(length, device) for length in (58, 9, 63)]
    options = [{"temperature": 0.9, "seed": 1}, {}, {"temperature": 0.9, "seed": 2}]
    calls = list(zip(prompts, options, strict=True))
    expected = [model.naivegenerate(each, max_new_tokens=NEW, **more) for each, more in calls]
    streams = [model.ea_generate(each, max_new_tokens=NEW, **more) for each, more in calls]
    last = [None] * 3
    for outs in itertools.zip_longest(*streams):
        last = [old if new is None else new for old, new in zip(last, outs, strict=True)]
    for out, text in zip(last, expected, strict=True):
        assert torch.equal(out, text)


def test_threads_take_turns(model, device):
    prompts = [prompt(length, device) for length in (9, 20, 31, 4)]
    expected = [model.eagenerate(each, max_new_tokens=NEW) for each in prompts]
    got = [None] * len(prompts)

    def decode(place):
        got[place] = model.eagenerate(prompts[place], max_new_tokens=NEW)

    threads = [threading.Thread(target=decode, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, text in zip(got, expected, strict=True):
        assert torch.equal(out, text)


# -- what comes back -------------------------------------------------------------------------------------------------


def test_log_counts_tokens_and_rounds(model, ids, device):
    rounds = len(list(model.ea_generate(ids, max_new_tokens=NEW)))
    out, new_tokens, index = model.eagenerate(ids, max_new_tokens=NEW, log=True)
    assert (new_tokens, index) == (NEW, rounds - 1)
    assert out.shape == (1, 11 + NEW)
    assert model.naivegenerate(ids, max_new_tokens=NEW, log=True)[1:] == (NEW, NEW - 1)
    batch, mask = batch_of([11, 3], device)
    assert model.eagenerate(batch, attention_mask=mask, max_new_tokens=NEW, log=True)[1] == 2 * NEW


@pytest.mark.parametrize("stop", [False, True])
def test_statistics_agree_with_the_text(stop, model, device):
    ids, mask = batch_of([11, 3], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW}
    if stop:
        options["eos_token_id"] = int(model.eagenerate(ids, **options)[0, 11 + 6])
    result = model.eagenerate(ids, return_dict_in_generate=True, **options)
    assert isinstance(result, Generation)
    statistics = result.statistics
    lengths = [len(text) for text in texts_of(result.sequences[:, 11:], options.get("eos_token_id"))]
    assert statistics.new_tokens == lengths
    assert sum((drafted + 1) * count for drafted, count in enumerate(statistics.accepted)) == sum(lengths)
    assert len(statistics.accepted) == 5  # depth 3: up to 4 drafted tokens and one of the target
    assert statistics.rounds <= sum(statistics.accepted) <= 2 * statistics.rounds
    assert statistics.tau == pytest.approx(sum(lengths) / sum(statistics.accepted))
    assert statistics.prefill_seconds > 0
    assert statistics.tokens_per_second == pytest.approx(sum(lengths) / statistics.decode_seconds)


def texts_of(rows, stop):
    texts = rows.tolist()
    return [text[: text.index(stop) + 1] if stop in text else text for text in texts]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_forward_is_the_stock_model(name, device):
    model = decoder(name, device)
    ids, mask = batch_of([11, 3], device)
    with torch.no_grad():
        expected = model.base_model(ids, attention_mask=mask, output_hidden_states=True)
    outputs, logits, hidden = model(ids, attention_mask=mask, output_orig=True)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(hidden, expected.hidden_states[-1])
    assert torch.equal(outputs[0], hidden)
    outputs, hidden = model.forward(ids, attention_mask=mask)
    assert torch.equal(hidden, expected.hidden_states[-1])
    _, logits, _ = model(ids[:1, :1], past_key_values=None, output_orig=True, position_ids=ids.new_tensor([[3]]))
    assert logits.shape == (1, 1, 131)


def test_signatures_begin_like_those_of_eagle():
    call = ["self", "input_ids", "temperature", "top_p", "top_k", "max_new_tokens", "max_length", "log", "is_llama3"]
    for method in (EaModel.eagenerate, EaModel.naivegenerate, EaModel.ea_generate, EaModel.naive_generate):
        parameters = list(inspect.signature(method).parameters.values())[:9]
        assert [each.name for each in parameters] == call
        assert [each.default for each in parameters[2:]] == [0.0, 0.0, 0.0, 512, 2048, False, False]
    load = ["use_eagle3", "base_model_path", "ea_model_path", "total_token", "depth", "top_k", "threshold"]
    parameters = list(inspect.signature(EaModel.from_pretrained).parameters.values())[:7]
    assert [each.name for each in parameters] == load
    assert [each.default for each in parameters[3:]] == [60, 7, 10, 1.0]


# -- nothing else changes --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
def test_the_base_model_keeps_its_own_text(device, ids):
    base = make("gemma2").to(device)
    before = base.generate(ids, do_sample=False, max_new_tokens=NEW)
    model = EaModel(base, decoder("gemma2", device).ea_layer, tree=decoder("gemma2", device).tree)
    stream = model.ea_generate(ids, max_new_tokens=NEW)
    for _ in range(3):
        next(stream)
        assert torch.equal(base.generate(ids, do_sample=False, max_new_tokens=NEW), before)
    for out in stream:
        assert torch.equal(out, before[:, : out.shape[1]])
    assert torch.equal(base.generate(ids, do_sample=False, max_new_tokens=NEW), before)


def test_dropout_of_a_model_in_training_mode_stays_out(device, ids):
    expected = decoder("gpt2", device).eagenerate(ids, max_new_tokens=NEW)
    model = rebuilt(decoder("gpt2", device), lambda base: base.train())
    assert not torch.equal(model.base_model(ids).logits, model.base_model(ids).logits)
    for out in (model.eagenerate(ids, max_new_tokens=NEW), model.naivegenerate(ids, max_new_tokens=NEW)):
        assert torch.equal(out, expected)
    assert all(module.training for module in model.base_model.modules())
    model.train()
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
    assert not model.eval().base_model.training


def test_grad_and_inference_mode_are_the_callers(model, ids):
    fresh = rebuilt(model, lambda base: base.requires_grad_(True))
    expected = model.eagenerate(ids, max_new_tokens=NEW)
    with torch.inference_mode():  # first: buffers made here must serve later calls too
        assert torch.equal(fresh.eagenerate(ids, max_new_tokens=NEW), expected)
        fresh.warmup(batch=2, max_length=64)
    with torch.enable_grad():
        for out in fresh.ea_generate(ids, max_new_tokens=NEW):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert torch.equal(out, expected[:, : out.shape[1]])
        assert torch.equal(fresh.eagenerate(ids.repeat(2, 1), max_new_tokens=NEW)[1:], expected)
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(fresh.eagenerate(ids, max_new_tokens=NEW), expected)


def test_conversions_that_change_nothing_pass(model, ids, device):
    expected = model.eagenerate(ids, max_new_tokens=4)
    assert model.to(device).eval() is model
    assert torch.equal(model.float().eagenerate(ids, max_new_tokens=4), expected)
    for convert in (model.half, model.double, lambda: model.to("meta"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="dtype= and device_map="):
            convert()
    assert torch.equal(model.eagenerate(ids, max_new_tokens=4), expected)
