"""Running ahead: a round is launched before the one before it is read. Here on a CPU too, so that it is tested there.

Texts and statistics are those of reading every round at once; what was launched past an end leaves no trace.
"""

import itertools
import threading

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt
from transformers import MaxLengthCriteria

from eagle_fast import NaNLogitsError
from eagle_fast.decoding import generation
from eagle_fast.decoding.reports import ReportRing

NEW = 24
METHODS = ("eagenerate", "naivegenerate")
GPU = torch.device("cuda")
rounds_under_way = generation.rounds_under_way


@pytest.fixture(autouse=True)
def run_ahead(monkeypatch):
    """Decide as on a GPU."""
    monkeypatch.setattr(generation, "rounds_under_way", lambda request, device: rounds_under_way(request, GPU))


@pytest.fixture
def wait(monkeypatch):
    """Call to read every round before the next is launched, from then on."""
    return lambda: monkeypatch.setattr(generation, "rounds_under_way", lambda request, device: 1)


@pytest.fixture
def under_way(monkeypatch):
    """How many rounds were under way at each read, the one that was read included."""
    counts, read = [], ReportRing.read

    def counting(ring):
        counts.append(len(ring))
        return read(ring)

    monkeypatch.setattr(ReportRing, "read", counting)
    return counts


@pytest.fixture
def model(device):
    return decoder("llama", device)


def run(model, ids, method="eagenerate", **options):
    result = getattr(model, method)(ids, return_dict_in_generate=True, **{"max_new_tokens": NEW, **options})
    return result.sequences.tolist(), result.statistics


# -- how far ahead ---------------------------------------------------------------------------------------------------


def test_plain_decoding_runs_ahead_and_launches_no_more_than_it_needs(model, under_way, device):
    run(model, prompt(11, device), "naivegenerate")
    assert under_way == [2] * (NEW - 1) + [1]


def test_logprobs_travel_with_the_reports_and_rows_are_taken_at_once(model, under_way, wait, device):
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logprobs": True}
    text = model.eagenerate(ids, **options).sequences
    options["eos_token_id"] = [int(text[row, 20 + place]) for row, place in enumerate((4, 11, 8))]
    under_way.clear()
    ahead = model.eagenerate(ids, **options)
    assert max(under_way) == 2
    assert under_way[::2] == under_way[1::2]
    under_way.clear()
    rows = model.eagenerate(ids, output_logits=True, **options)
    assert max(under_way) == 1
    wait()
    for other in (rows, model.eagenerate(ids, **options)):
        assert torch.equal(ahead.sequences, other.sequences)
        torch.testing.assert_close(ahead.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_a_round_is_launched_before_the_one_before_is_read(model, under_way, device):
    _, statistics = run(model, prompt(11, device), max_new_tokens=60)
    assert len(under_way) == statistics.rounds
    assert under_way[:-1] == [2] * (len(under_way) - 1)


def test_one_round_more_is_under_way_when_a_text_ends(model, under_way, device):
    text = run(model, prompt(11, device), "naivegenerate")[0][0]
    under_way.clear()
    stopped, statistics = run(model, prompt(11, device), "naivegenerate", eos_token_id=text[11 + 5])
    assert stopped == [text[: 11 + 6]]
    assert under_way == [2] * 6
    assert statistics.rounds == 6


def test_hooks_in_python_see_every_round_at_once(model, under_way, device):
    for method in METHODS:
        run(model, prompt(11, device), method, stopping_criteria=[MaxLengthCriteria(30)])
    assert set(under_way) == {1}
    under_way.clear()
    run(model, prompt(11, device), logits_processor=[lambda ids, scores: scores])
    assert not under_way  # its tokens are chosen on the host


def test_a_cpu_does_not_run_ahead(model, device):
    request = generation.Request([[5]], [1])
    assert rounds_under_way(request, torch.device("cpu")) == 1
    assert rounds_under_way(request, GPU) == 2


# -- the same text and statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": [4, 5, 6]}], ids=["T=0", "T=1.2"])
def test_text_and_statistics_do_not_change(method, sampling, model, wait, device):
    """Rows with budgets of their own, without stops and with stops that end them apart."""
    ids, mask = batch_of([11, 3, 20], device)
    options = {"attention_mask": mask, "max_length": 38, **sampling}
    texts, _ = run(model, ids, method, **options)
    stops = [texts[0][20 + 4], texts[1][20 + 9]]
    requests = [options, {**options, "eos_token_id": stops}]
    ahead = [run(model, ids, method, **each) for each in requests]
    wait()
    at_once = [run(model, ids, method, **each) for each in requests]
    for (text, statistics), (expected, counted) in zip(ahead, at_once, strict=True):
        assert text == expected
        for name in ("rounds", "accepted", "new_tokens", "tau"):
            assert getattr(statistics, name) == getattr(counted, name)
    assert ahead[1][1].rounds <= ahead[0][1].rounds


@pytest.mark.parametrize("method", METHODS)
def test_longrope_switches_while_other_sequences_run_ahead(method, device):
    """Sequences come to the switch at 64 tokens in different rounds, one starts behind it, one never gets there."""
    model, lengths = decoder("phi3_longrope", device), [55, 3, 58, 64, 65, 20]
    ids, mask = batch_of(lengths, device)
    texts, statistics = run(model, ids, method, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone, _ = run(model, prompt(length, device, row), "naivegenerate")
        assert texts[row][65:] == alone[0][length:]
    assert statistics.new_tokens == [NEW] * 6
    stops = [texts[0][65 + 9], texts[2][65 + 6]]  # the last token before the switch, and the token behind it
    stopped, _ = run(model, ids, method, attention_mask=mask, eos_token_id=stops)
    for row, text in enumerate(texts):
        ends = [text[65:].index(stop) for stop in stops if stop in text[65:]]
        assert stopped[row][65:][: min(ends, default=NEW) + 1] == text[65:][: min(ends, default=NEW) + 1]


def test_every_step_of_a_stream_grows(device):
    model = decoder("phi3_longrope", device)
    ids, mask = batch_of([55, 3, 58], device)
    seen = list(model.ea_generate(ids, attention_mask=mask, max_new_tokens=NEW))
    assert torch.equal(seen[-1], model.naivegenerate(ids, attention_mask=mask, max_new_tokens=NEW))
    filled = [int((out != 0).sum()) for out in seen]
    assert all(before < after for before, after in itertools.pairwise(filled))


# -- interrupted -----------------------------------------------------------------------------------------------------


def test_nan_logits_in_the_round_under_way(device):
    """The token with NaN logits behind it is the last one that a text gets, then one that it would go on from."""
    sound, ids = decoder("llama", device), prompt(11, device)
    text = run(sound, ids)[0][0]

    def poison(base):
        base.get_input_embeddings().weight[text[15], 0] = torch.nan

    model = rebuilt(sound, poison)
    for method in METHODS:
        assert run(model, ids, method, eos_token_id=text[15])[0] == [text[:16]]
        with pytest.raises(NaNLogitsError, match=r"sequence 0: .* position 16 "):
            run(model, ids, method)
        assert run(model, ids, method, max_new_tokens=5)[0] == [text[:16]], "the state was left unusable"


@pytest.mark.parametrize("stream_method", ["ea_generate", "naive_generate"])
def test_streams_closed_with_a_round_under_way(stream_method, model, device):
    other = prompt(20, device, seed=2)
    expected = run(model, other)[0]
    for interrupt in (False, True):
        stream = getattr(model, stream_method)(prompt(11, device), max_new_tokens=NEW)
        next(stream)
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        else:
            stream.close()
        for method in METHODS:
            assert run(model, other, method)[0] == expected


def test_interleaved_streams_and_threads(model, device):
    prompts = [prompt(length, device) for length in (9, 20, 31)]
    expected = [run(model, each, "naivegenerate")[0] for each in prompts]
    streams = [model.ea_generate(each, max_new_tokens=NEW) for each in prompts]
    last = [None] * 3
    for outs in itertools.zip_longest(*streams):
        last = [old if new is None else new for old, new in zip(last, outs, strict=True)]
    assert [each.tolist() for each in last] == expected
    got = [None] * 3

    def decode(place):
        got[place] = run(model, prompts[place])[0]

    threads = [threading.Thread(target=decode, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


@pytest.mark.gpu
def test_calls_on_streams_of_their_own(model):
    """A thread's rounds, and one stream's from step to step, run on whatever CUDA stream is current."""
    prompts = [prompt(length, GPU) for length in (9, 20, 31)]
    expected = [run(model, each, "naivegenerate")[0] for each in prompts]
    streams = [model.ea_generate(each, max_new_tokens=NEW) for each in prompts]
    last = [None] * 3
    for outs in iter(lambda: [next(stream, None) for stream in streams], [None] * 3):
        last = [old if new is None else new for old, new in zip(last, outs, strict=True)]
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.cuda.set_stream(torch.cuda.default_stream())
    assert [each.tolist() for each in last] == expected
