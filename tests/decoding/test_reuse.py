"""A conversation goes on with what its last turn left in the caches: the text stays the target's own."""

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, stock, with_head
from often_right import write_often_right_head
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from zoo import make

from eagle_fast import EaModel
from eagle_fast.decoding.held import common_prefix
from eagle_fast.decoding.states import LENGTH_STEP

NEW = 16
CASES = [("llama", "naivegenerate"), *((name, "eagenerate") for name in ("llama", "gemma3_text", "llama4_temperature"))]
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


def run(model, ids, method="eagenerate", **options):
    options = {"max_new_tokens": NEW, "reuse_cache": True, "return_dict_in_generate": True, **options}
    return getattr(model, method)(ids, **options)


def greedy(model, ids, new=NEW):
    """Stock text; without a mask, stock `generate` takes a 0 that was decoded earlier for padding."""
    return stock(model, ids, max_new_tokens=new, attention_mask=torch.ones_like(ids))


def longer(ids, count=5, seed=9):
    """The next turn: what the user says after the text so far."""
    return torch.cat([ids, torch.cat([prompt(count, ids.device, seed + row) for row in range(len(ids))])], 1)


def plain_tau(model, ids, **options):
    """Tokens per round of the same call without reuse, by a model with states of its own."""
    return run(rebuilt(model), ids, reuse_cache=False, **options).statistics


@pytest.mark.parametrize(("name", "method"), CASES)
def test_turns_of_a_conversation(name, method, device):
    model, ids, held = rebuilt(decoder(name, device)), prompt(30, device), 0
    for _ in range(3):
        out = run(model, ids, method)
        assert torch.equal(out.sequences, greedy(model, ids))
        assert out.statistics.reused_tokens == [held]
        held = out.sequences.shape[1] - 2  # the newest token was not in the cache; the row before is computed again
        ids = longer(out.sequences)
    assert len(model.states.idle) == 1


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_drafts_are_as_good_as_without(kind, device, tmp_path):
    base = make("qwen3")
    write_often_right_head(base, tmp_path, kind)
    model = EaModel.from_pretrained(
        base_model_path=base.to(device), ea_model_path=tmp_path, total_token=16, depth=3, top_k=4, adaptive=False
    )
    out = run(model, prompt(30, device), max_new_tokens=40)
    ids = longer(out.sequences)
    again, alone = run(model, ids, max_new_tokens=40), plain_tau(model, ids, max_new_tokens=40)
    assert again.statistics.reused_tokens[0] > 60
    assert again.statistics.accepted == alone.accepted
    assert again.statistics.tau > 1.5


def test_each_sequence_of_a_batch_goes_on_from_what_it_shares_itself(device):
    model = rebuilt(decoder("llama", device))
    ids, mask = batch_of([20, 30, 9], device)
    first = run(model, ids, attention_mask=mask)
    rows = [row[seen.bool()].tolist() for row, seen in zip(first.sequences[:, :30], mask, strict=True)]
    texts = [[*row, *new] for row, new in zip(rows, first.sequences[:, 30:].tolist(), strict=True)]
    texts[1][33] = 7  # rendered otherwise
    for side in ("left", "right"):
        wide = max(map(len, texts)) + 3
        ids, mask = torch.zeros(3, wide, dtype=torch.long), torch.zeros(3, wide, dtype=torch.long)
        for row, text in enumerate(texts):
            text = [*text, 11, 12, 13]
            place = slice(wide - len(text), None) if side == "left" else slice(len(text))
            ids[row, place], mask[row, place] = torch.tensor(text), 1
        ids, mask = ids.to(device), mask.to(device)
        again = run(model, ids, attention_mask=mask, temperature=0.8, seed=[4, 5, 6])
        assert again.statistics.reused_tokens == ([34, 32, 23] if side == "left" else [37, 47, 26])
        alone = model.naivegenerate(ids, attention_mask=mask, temperature=0.8, seed=[4, 5, 6], max_new_tokens=NEW)
        assert torch.equal(again.sequences, alone)


def test_sampling_processors_and_stops_in_between(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(40, device)
    whole = greedy(model, ids)
    stop = int(whole[0, 40 + 6])
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)])
    calls = [
        {"eos_token_id": stop},  # within a round
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "seed": 4, "top_p": 0.8},
        {"logits_processor": penalty},
        {"logits_processor": penalty, "eos_token_id": stop, "temperature": 0.7, "seed": 1},
        {"stopping_criteria": [lambda text, scores: text.shape[1] >= 44 and text.shape[1] % 3 == 0]},
    ]
    for options in calls:
        for again in (longer(ids), ids[:, :25]):
            out = run(model, again, **options)
            expected = rebuilt(model).naivegenerate(again, max_new_tokens=NEW, **options)
            assert torch.equal(out.sequences, expected), options
            ids = torch.cat([again, out.sequences[:, again.shape[1] :]], 1)[:, :60]
        assert out.statistics.reused_tokens[0] >= 23


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate"])
def test_longrope_is_prefilled_anew_past_its_switch(method, device):
    """At 64 tokens: reused below and beyond, not across; a text that crosses it is recomputed there. The state below
    stays while the conversation goes on beyond, and is found again."""
    model, text = rebuilt(decoder("phi3_longrope", device)), prompt(30, device)
    for new, more, reused in (
        (10, 2, 0),
        (10, 30, 38),
        (10, 3, 0),
        (10, None, 90),
        (10, 2, 48),
        (10, 3, 58),
        (10, 3, 70),
    ):
        out = run(model, text, method, max_new_tokens=new)
        assert torch.equal(out.sequences, greedy(model, text, new))
        assert out.statistics.reused_tokens == [reused]
        text = text[:, :50] if more is None else longer(out.sequences, more)


def test_longer_states_take_the_rows_over(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(LENGTH_STEP - 20, device)
    first = run(model, ids)
    ids = longer(first.sequences, 30)
    again = run(model, ids)
    assert again.statistics.reused_tokens == [first.sequences.shape[1] - 2]
    assert torch.equal(again.sequences, greedy(model, ids))
    assert [lease.state.max_length for lease in model.states.idle] == [2 * LENGTH_STEP]


def test_conversations_in_turn(device):
    """Two that begin alike, and a call that asks for no reuse: none takes another's rows away."""
    model, opening = rebuilt(decoder("llama", device)), prompt(24, device)
    texts = [longer(opening, 30, seed) for seed in (1, 2)]
    for turn in range(3):
        for number, ids in enumerate(texts):
            out = run(model, ids)
            assert torch.equal(out.sequences, greedy(model, ids))
            assert out.statistics.reused_tokens == [[0, 23][number] if turn == 0 else ids.shape[1] - 5 - 2]
            texts[number] = longer(out.sequences)
        model.eagenerate(prompt(12, device, 5), max_new_tokens=4)
    assert len(model.states.idle) == 3


def test_what_nobody_asked_to_keep_is_found_too(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(24, device)
    out = run(model, ids, reuse_cache=False)
    assert out.statistics.reused_tokens == [0]
    assert run(model, longer(out.sequences), reuse_cache=False).statistics.reused_tokens == [0]
    assert run(model, longer(out.sequences)).statistics.reused_tokens == [out.sequences.shape[1] + 3]  # the turn above
    assert run(model, longer(out.sequences), "naivegenerate").statistics.reused_tokens == [0], "no head's rows"


def test_every_method_and_the_stock_loop(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(24, device)
    *_, last = model.ea_generate(ids, max_new_tokens=NEW, reuse_cache=True)
    for generate, own_loop in (
        (model.generate, {}),
        (model.base_model.generate, {"custom_generate": model.custom_generate}),
    ):
        ids = longer(last)
        options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, **own_loop}
        options["attention_mask"] = torch.ones_like(ids)
        out = generate(ids, reuse_cache=True, **options)
        assert out.statistics.reused_tokens == [last.shape[1] - 2]
        assert torch.equal(out.sequences, greedy(model, ids))
        last = out.sequences
    *_, last = model.naive_generate(ids, max_new_tokens=NEW, reuse_cache=True)
    assert run(model, longer(last), "naivegenerate").statistics.reused_tokens == [last.shape[1] - 2]


def test_a_changed_model_starts_anew(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(24, device)
    layers = model.base_model.model.layers

    def hook(module, args, output):
        return -output

    def edit():
        with torch.no_grad():
            layers[2].mlp.down_proj.weight.mul_(-1)

    for change in (lambda: layers[1].mlp.register_forward_hook(hook), edit):
        out = run(model, ids)
        change()
        ids = longer(out.sequences)
        again = run(model, ids)
        assert again.statistics.reused_tokens == [0]
        assert torch.equal(again.sequences, greedy(model, ids))


def test_what_an_earlier_call_was_torn_out_of(device):
    """Closed and interrupted streams leave what is certain; after any other exception nothing is counted on."""
    model, ids = rebuilt(decoder("llama", device)), prompt(24, device)
    expected = greedy(model, ids)
    for ending in ("close", "interrupt"):
        stream = model.ea_generate(ids, max_new_tokens=NEW, reuse_cache=True)
        next(stream)
        seen = next(stream)
        if ending == "close":
            stream.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        again = run(model, seen)
        assert torch.equal(again.sequences[:, : expected.shape[1]], expected)
        assert again.statistics.reused_tokens == [seen.shape[1] - 2]
        model.states.clear()

    for error, reused in ((ZeroDivisionError, 0), (KeyboardInterrupt, 22)):

        def fault(text, scores, error=error):
            if text.shape[1] > 30:
                raise error
            return scores

        with pytest.raises(error):
            run(model, ids, logits_processor=[fault])
        again = run(model, ids)
        assert torch.equal(again.sequences, expected)
        assert again.statistics.reused_tokens == [reused]
        model.states.clear()


def test_half_precision_goes_on_like_plain_decoding(device):
    model, texts = with_head(make("llama", dtype=torch.bfloat16), device), []
    for method in ("eagenerate", "naivegenerate"):
        ids = prompt(30, device)
        for _ in range(3):
            out = run(model, ids, method)
            ids = longer(out.sequences)
        assert out.statistics.reused_tokens[0] > 60
        texts.append(out.sequences)
    assert torch.equal(*texts)


def test_a_second_turn_prefills_a_tenth_at_the_most(device):
    """4,096 tokens of chat, an answer, 60 more from the user."""
    model, ids = rebuilt(decoder("llama", device)), prompt(4096, device)
    first = run(model, ids, max_length=8192)
    ids = longer(first.sequences, 60)
    again = run(model, ids, max_length=8192)
    prefilled = ids.shape[1] - 1 - again.statistics.reused_tokens[0]
    assert (ids.shape[1] - 1) / prefilled > 60
    assert torch.equal(again.sequences, greedy(model, ids))


@pytest.mark.parametrize("value", [2, "yes", [True]])
def test_odd_values_are_refused(value, device):
    with pytest.raises(ValueError, match=r"reuse_cache=.*: use True or False"):
        run(decoder("llama", device), prompt(5, device), reuse_cache=value)


def test_common_prefixes():
    assert common_prefix([1, 2, 3], [1, 2, 3, 4], 9) == 3
    assert common_prefix([1, 2, 3], [1, 2, 3, 4], 2) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3], 3) == 1
    assert common_prefix([], [1], 1) == 0
