"""A prompt is prefilled by itself: its cache rows have the bits that they have alone, whatever its neighbours are."""

import pytest
import torch
from decoders import batch_of, decoder, prompt, rebuilt, with_head
from zoo import make

from eagle_fast.decoding import round as rounds
from eagle_fast.decoding.round import Round

CHUNK = 8
LENGTHS = [9, 1, 31, 66, 14]
# windows, experts, learned positions, and longrope's switch at 64 tokens
FAMILIES = ["llama", "gemma2", "gpt_oss", "gpt2", "phi3_longrope"]
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(rounds, "PREFILL_CHUNK", CHUNK)


@pytest.fixture
def forwards(monkeypatch):
    """Call with a model: the prompt forwards from then on, each (sequences, first token, tokens)."""

    def watch(model):
        found, prefill = [], model.target.prefill

        def noted(tokens, start, cache):
            found.append((len(tokens), start, tokens.shape[1]))
            return prefill(tokens, start, cache)

        monkeypatch.setattr(model.target, "prefill", noted)
        return found

    return watch


def chunks(length, start=0):
    """The forwards of a prompt alone: all of its tokens but the last."""
    return [(1, first, min(CHUNK, length - 1 - first)) for first in range(start, length - 1, CHUNK)]


def begun(model, texts):
    """A state with these prompts in its caches."""
    state = Round(model.target, model.ea_layer, model.tree, len(texts), 96)
    state.begin(texts, [len(text) + 9 for text in texts])
    return state


def random_texts(lengths):
    return [prompt(length, torch.device("cpu"), seed)[0].tolist() for seed, length in enumerate(lengths)]


def assert_as_alone(state, row, alone, length):
    """All that a sequence starts its first round with."""
    for name in ("lengths", "roots", "ends"):
        assert torch.equal(getattr(state, name)[row], getattr(alone, name)[0])
    for name in ("hidden", "states"):
        assert torch.equal(getattr(state.drafter, name)[row], getattr(alone.drafter, name)[0])
    slabs = zip(
        [*state.cache.slab.slabs, *state.drafter.slabs], [*alone.cache.slab.slabs, *alone.drafter.slabs], strict=True
    )
    for mine, theirs in slabs:
        assert torch.equal(mine[:, row, :, : length - 1], theirs[:, 0, :, : length - 1])
    for device, long in state.cache.long_rows.items():
        assert torch.equal(long[row], alone.cache.long_rows[device][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_have_the_bits_of_the_prompt_alone(name, dtype, device):
    model = decoder(name, device) if dtype == torch.float32 else with_head(make(name, dtype=dtype), device)
    texts = random_texts(LENGTHS)
    state = begun(model, texts)
    for row, text in enumerate(texts):
        assert_as_alone(state, row, begun(model, [text]), len(text))


def test_forwards_are_those_of_each_prompt_alone(device, forwards):
    model = rebuilt(decoder("llama", device))
    found = forwards(model)
    begun(model, random_texts(LENGTHS))
    assert found == [each for length in LENGTHS for each in chunks(length)]


@pytest.mark.parametrize("length", [1, 20])
def test_samples_of_one_prompt_are_prefilled_once(length, device, forwards):
    model = rebuilt(decoder("llama", device))
    (same, other), found = random_texts([length] * 2), forwards(model)
    texts = [same, other, same, same]
    state = begun(model, texts)
    assert found == 2 * chunks(length)
    for row, text in enumerate(texts):
        assert_as_alone(state, row, begun(model, [text]), length)


def test_turns_of_a_batch_go_on_as_alone(device, forwards):
    """Each sequence from the token that it would go on from alone, in the chunks that it would have alone."""
    model, texts, more = rebuilt(decoder("llama", device)), random_texts([20, 3, 12]), random_texts([11] * 3)
    longer = [[*text, *new] for text, new in zip(texts, more, strict=True)]
    starts, ends = [len(text) - 2 for text in texts], [len(text) + 9 for text in longer]
    state, found = begun(model, texts), forwards(model)
    state.begin(longer, ends, starts)
    assert found == [each for text, start in zip(longer, starts, strict=True) for each in chunks(len(text), start)]
    for row, (text, end, start) in enumerate(zip(longer, ends, starts, strict=True)):
        alone = begun(model, texts[row : row + 1])
        alone.begin([text], [end], [start])
        assert_as_alone(state, row, alone, len(text))


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate"])
def test_only_the_text_that_passes_longropes_switch_is_prefilled_again(method, device, forwards):
    model = rebuilt(decoder("phi3_longrope", device))
    ids, mask = batch_of([60, 3, 70], device)
    found = forwards(model)
    getattr(model, method)(ids, attention_mask=mask, max_new_tokens=20)
    assert found == [each for length in (60, 3, 70, 65) for each in chunks(length)]
