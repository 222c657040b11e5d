"""Scores, logits and log-probabilities: transformers' own, of the very tokens that were emitted.

Floating-point figures of a round of many rows and of stock's single rows differ by rounding, some 1e-5 here.
"""

import copy
import tempfile
import warnings

import pytest
import torch
from decoders import TREE, batch_of, decoder, prompt, rebuilt, stock, with_head
from fake_devices import FakeDevices, layers_map, place
from often_right import write_often_right_head
from transformers import StoppingCriteriaList
from zoo import make

from eagle_fast import EaModel

NEW = 24
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def model(device):
    return decoder("llama", device)


def ends(sequences, stops, start):
    """New tokens of each sequence, the stop token included."""
    for row in sequences[:, start:].tolist():
        yield next((place + 1 for place, token in enumerate(row) if token in stops), len(row))


def stops_of(model, ids, mask, places=(5, 14, 9)):
    """A token of each sequence's greedy text; the text ends there or earlier."""
    text = stock(model, ids, attention_mask=mask, max_new_tokens=NEW)[:, ids.shape[1] :]
    return [int(row[place]) for row, place in zip(text, places, strict=False)]


def check_like_stock(ours, theirs, stops, start, names=("scores", "logits")):
    """Equal up to every sequence's end, and certain padding behind it."""
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in names:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is tuple
        assert len(mine) == len(other) == ours.sequences.shape[1] - start
        for row, end in enumerate(ends(ours.sequences, stops, start)):
            for step, (here, there) in enumerate(zip(mine, other, strict=True)):
                assert (here.shape, here.dtype, here.device) == (there.shape, there.dtype, there.device)
                if step < end:
                    torch.testing.assert_close(here[row], there[row], **CLOSE)
                else:
                    token = ours.sequences[row, start + step]
                    assert here[row, token] == 0
                    assert (here[row] > -torch.inf).sum() == 1


def check_logprobs(out, start):
    """logprobs are log_softmax(logits) at the tokens, and 0 where padding follows."""
    expected = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, out.sequences[:, start:, None])[..., 0]
    assert out.logprobs.dtype == torch.float32
    assert out.logprobs.device == out.sequences.device
    torch.testing.assert_close(out.logprobs, expected, rtol=0, atol=2e-6)
    assert (out.logprobs <= 0).all()


CASES = {
    "plain": {},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "stops": {"stop": True, "pad_token_id": 9},
    "stops and processors": {"stop": True, "pad_token_id": 9, "repetition_penalty": 1.3, "min_new_tokens": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [[11], [11, 3, 20]], ids=len)
def test_greedy_equals_stock(name, lengths, model, device):
    ids, mask = batch_of(lengths, device)
    options = {"attention_mask": mask, "max_new_tokens": NEW, **ALL, **CASES[name]}
    stops = stops_of(model, ids, mask) if options.pop("stop", False) else []
    options |= {"eos_token_id": stops} if stops else {}
    theirs = stock(model, ids, **options)
    assert not stops or len(lengths) == 1 or len(set(ends(theirs.sequences, stops, ids.shape[1]))) > 1
    options |= {"do_sample": False, "output_logprobs": True}
    for ours in (
        model.generate(ids, **options),
        model.base_model.generate(ids, custom_generate=model.custom_generate, **options),
    ):
        check_like_stock(ours, theirs, stops, ids.shape[1])
        check_logprobs(ours, ids.shape[1])
        sums = [
            model.base_model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
            for out in (ours, theirs)
        ]
        for row, end in enumerate(ends(ours.sequences, stops, ids.shape[1])):
            torch.testing.assert_close(sums[0][row, :end], sums[1][row, :end], **CLOSE)
            assert (sums[0][row, end:] == 0).all(), "padding adds nothing"


def test_across_the_switch_of_longrope(device):
    model = decoder("phi3_longrope", device)
    ids = prompt(55, device)
    ours = model.generate(ids, do_sample=False, max_new_tokens=NEW, **ALL)
    check_like_stock(ours, stock(model, ids, max_new_tokens=NEW, **ALL), [], 55)


def along(model, text, ids, mask, options):
    """Stock generate's (scores, logits), asked for one step after every prefix of a text."""
    found, start = [], ids.shape[1]
    for step in range(text.shape[1] - start):
        so_far = text[:, : start + step]
        seen = torch.cat([mask, torch.ones_like(so_far[:, start:])], 1)
        found.append(stock(model, so_far, attention_mask=seen, **{**options, "max_new_tokens": 1}))
    return [each.scores[0] for each in found], [each.logits[0] for each in found]


SAMPLED = {
    "temperature": {"temperature": 1.5, "top_k": 0},
    "warpers": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "processor": {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.3},
    "on the host": {"temperature": 1.3, "top_k": 20, "typical_p": 0.8},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_equals_stock_at_every_step(name, model, device):
    """Stock draws another text, so it follows ours."""
    ids, mask = batch_of([11, 3, 20], device)
    options = {"do_sample": True, "max_new_tokens": 10, **ALL, **SAMPLED[name]}
    ours = model.generate(ids, attention_mask=mask, seed=3, **options)
    scores, logits = along(model, ours.sequences, ids, mask, options)
    for mine, theirs in zip([*ours.scores, *ours.logits], scores + logits, strict=True):
        assert torch.equal(mine.isinf(), theirs.isinf())
        torch.testing.assert_close(mine, theirs, **CLOSE)
    drawn = model.base_model.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    assert drawn.isfinite().all()
    if name in ("temperature", "warpers"):
        plain = {key: value for key, value in options.items() if key != "do_sample"}
        naive = model.naivegenerate(ids, attention_mask=mask, seed=3, **plain)
        assert torch.equal(naive.sequences, ours.sequences)
        for mine, theirs in zip(ours.scores, naive.scores, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.2, "top_p": 0.9}, {"logits_processor": [lambda seen, scores: scores.mul_(0.5)]}],
    ids=["greedy", "sampled", "in-place processor"],
)
def test_logprobs(method, options, model, device):
    ids, mask = batch_of([11, 3, 20], device)
    stops = stops_of(model, ids, mask)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "seed": 2, "eos_token_id": stops, **options}
    decode = getattr(model, method)
    plain = decode(ids, **options)
    out = decode(ids, output_logprobs=True, **ALL, **options)
    assert torch.equal(out.sequences, plain)
    check_logprobs(out, ids.shape[1])
    alone = decode(ids, output_logprobs=True, return_dict_in_generate=True, **options)
    assert (alone.scores, alone.logits) == (None, None)
    assert alone.statistics.accepted == out.statistics.accepted
    torch.testing.assert_close(alone.logprobs, out.logprobs, rtol=0, atol=2e-6)
    assert "logprobs" not in decode(ids, return_dict_in_generate=True, **options)


def test_rows_belong_to_the_tokens_in_16_bits(device):
    """Greedy: the argmax of every row is its token, where rows of a tree round as they like."""
    model = with_head(make("llama", dtype=torch.bfloat16), device)
    ids, mask = batch_of([11, 3, 20], device)
    for processor in ([], [lambda seen, scores: scores]):
        out = model.eagenerate(
            ids, attention_mask=mask, max_new_tokens=40, output_logprobs=True, logits_processor=processor, **ALL
        )
        assert out.statistics.tau > 1.5
        for name in ("logits", "scores"):
            rows = torch.stack(getattr(out, name), 1)
            assert rows.dtype == torch.float32
            assert torch.equal(rows.argmax(-1), out.sequences[:, 20:])
        check_logprobs(out, 20)


def test_stops_inside_a_round_and_budgets(model, device):
    """Cut at every length: nothing of what a round brought behind the end is kept."""
    ids = prompt(11, device)
    whole = model.eagenerate(ids, max_new_tokens=NEW, output_logprobs=True, **ALL)
    text = whole.sequences[0, 11:].tolist()
    for stop in text[:9]:
        end = text.index(stop) + 1
        for options in ({"eos_token_id": stop, "max_new_tokens": NEW}, {"max_new_tokens": end}):
            out = model.eagenerate(ids, output_logprobs=True, **ALL, **options)
            assert len(out.logits) == len(out.scores) == out.logprobs.shape[1] == end
            torch.testing.assert_close(torch.cat(out.logits), torch.cat(whole.logits[:end]), **CLOSE)


@pytest.mark.parametrize("method", ["ea_generate", "naive_generate"])
def test_streamed(method, model, device):
    """Every result is complete for what there is so far, and stays as it was when later ones come."""
    ids, mask = batch_of([11, 3, 20], device)
    stops = stops_of(model, ids, mask)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": stops}
    seen, kept = [], []
    for out in getattr(model, method)(ids, output_logprobs=True, **ALL, **options):
        check_logprobs(out, 20)
        seen.append(out)
        kept.append(copy.deepcopy(out))
    ids_alone = list(getattr(model, method)(ids, **options))
    assert [out.sequences.tolist() for out in seen] == [each.tolist() for each in ids_alone]
    for out, then in zip(seen, kept, strict=True):
        assert torch.equal(torch.stack(out.logits), torch.stack(then.logits))
        assert out.statistics == then.statistics
    last = model.eagenerate(ids, output_logprobs=True, **ALL, **options)
    assert torch.equal(seen[-1].sequences, last.sequences)
    torch.testing.assert_close(torch.stack(seen[-1].scores), torch.stack(last.scores), **CLOSE)
    assert sum(seen[-1].statistics.new_tokens) == sum(last.statistics.new_tokens)
    assert [out.statistics.rounds for out in seen] == list(range(1, len(seen) + 1))


def test_criteria_see_scores_where_stock_shows_them(model, device):
    """Like transformers' own confidence criteria; without output_scores they see None, as there."""

    class Unsure:
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(None if scores is None else len(scores))
            sure = torch.full((len(input_ids),), False, device=input_ids.device)
            return sure if scores is None else scores[-1].softmax(-1).amax(-1) < 0.6

    ids = prompt(11, device)
    for records in (ALL, {}):
        ours, theirs = Unsure(), Unsure()
        options = {"max_new_tokens": NEW, **records}
        expected = stock(model, ids, stopping_criteria=StoppingCriteriaList([theirs]), **options)
        out = model.generate(ids, do_sample=False, stopping_criteria=StoppingCriteriaList([ours]), **options)
        assert ours.seen == theirs.seen
        if records:
            assert 1 < len(out.scores) < NEW
            check_like_stock(out, expected, [], 11)


def test_results_go_where_ids_are_from_several_devices():
    base = make("llama")
    with tempfile.TemporaryDirectory() as folder, FakeDevices(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_often_right_head(copy.deepcopy(base), folder)
        place(base, layers_map([0, 0, 0, 1, 1, 1]))
        model = EaModel.from_pretrained(
            base_model_path=base, ea_model_path=folder, draft_device=torch.device("cpu", 0), **TREE
        )
        ids = prompt(11, torch.device("cpu"))
        for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}):
            out = model.eagenerate(ids, max_new_tokens=12, output_logprobs=True, **ALL, **options)
            assert {each.device for each in (*out.scores, *out.logits, out.logprobs)} == {torch.device("cpu")}
            assert not any(type(each) is not torch.Tensor for each in (*out.scores, *out.logits))
    expected = decoder("llama", torch.device("cpu")).eagenerate(
        ids, max_new_tokens=12, output_logprobs=True, **ALL, **options
    )
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), **CLOSE)
    torch.testing.assert_close(out.logprobs, expected.logprobs, **CLOSE)


def test_states_that_record_are_apart(device):
    """Memory for records is only held by states that were asked for them."""
    model = rebuilt(decoder("llama", device))
    ids = prompt(11, device)
    model.eagenerate(ids, max_new_tokens=4)
    model.eagenerate(ids, max_new_tokens=4, logits_processor=[lambda seen, scores: scores], **ALL)
    assert [state.kept for state, *_ in model.states.idle] == [None], "processors need none"
    model.eagenerate(ids, max_new_tokens=4, output_logprobs=True, return_dict_in_generate=True)
    model.eagenerate(ids, max_new_tokens=4, **ALL)
    model.eagenerate(ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    plain, logprobs, rows = (state.kept for state, *_ in model.states.idle)
    assert plain is None
    assert logprobs.logits is None
    assert rows.logits.shape == (1, 5, 131)
