"""Batches: every sequence gets the text that it gets alone, whatever its neighbours are and however it is padded."""

import pytest
import torch
from decoders import batch_of, decoder, prompt, stock

LENGTHS = [9, 1, 31, 14, 2]
NEW = 14


def alone(model, lengths, row_options=lambda row: {}, method="eagenerate", **options):
    """Each prompt of `batch_of` by itself: its new tokens."""
    return [
        getattr(model, method)(prompt(length, model.target.device, row), **options, **row_options(row))[0, length:]
        for row, length in enumerate(lengths)
    ]


def assert_rows(out, width, texts, pad=0):
    """out [B, width + longest]: each row's new tokens, then padding."""
    assert out.shape == (len(texts), width + max(map(len, texts)))
    for row, text in zip(out[:, width:], texts, strict=True):
        assert torch.equal(row[: len(text)], text)
        assert (row[len(text) :] == pad).all()


@pytest.mark.parametrize(
    ("batch", "side"), [(1, "left"), (2, "left"), (3, "left"), (4, "left"), (5, "left"), (2, "right"), (5, "right")]
)
def test_rows_of_any_batch_are_as_alone(batch, side, device):
    model, lengths = decoder("llama", device), LENGTHS[:batch]
    ids, mask = batch_of(lengths, device, side)
    texts = alone(model, lengths, max_new_tokens=NEW)
    assert len({tuple(text.tolist()) for text in texts}) == batch
    for method in ("eagenerate", "naivegenerate"):
        out = getattr(model, method)(ids, attention_mask=mask, max_new_tokens=NEW)
        assert_rows(out, ids.shape[1], texts)
        assert torch.equal(out[:, : ids.shape[1]], ids)


# a window of 7, learned positions, experts, and longrope's switch at 64 tokens: crossed, just ahead, just behind
FAMILIES = {
    "gemma2": [9, 1, 31],
    "mistral": [2, 25, 6],
    "gpt2": [9, 1, 31],
    "gpt_oss": [17, 3],
    "phi3_longrope": [55, 3, 64, 65],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_other_families_are_as_alone(name, device):
    model, lengths = decoder(name, device), FAMILIES[name]
    for side in ("left", "right"):
        ids, mask = batch_of(lengths, device, side)
        out = model.eagenerate(ids, attention_mask=mask, max_new_tokens=NEW)
        texts = [stock(model, prompt(n, device, row), max_new_tokens=NEW)[0, n:] for row, n in enumerate(lengths)]
        assert_rows(out, ids.shape[1], texts)
    assert_rows(model.naivegenerate(ids, attention_mask=mask, max_new_tokens=NEW), ids.shape[1], texts)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3_longrope"])
def test_sampled_rows_are_as_alone_with_their_seeds(name, device):
    model, lengths, seeds = decoder(name, device), [60, 1, 9], [5, 2**63 - 1, 5]
    options = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": NEW}
    ids, mask = batch_of(lengths, device)
    texts = alone(model, lengths, lambda row: {"seed": [seeds[row]]}, **options)
    for method in ("eagenerate", "naivegenerate"):
        out = getattr(model, method)(ids, attention_mask=mask, seed=seeds, **options)
        assert_rows(out, ids.shape[1], texts)


def test_one_seed_gives_each_row_its_own_noise(device):
    model, ids = decoder("llama", device), prompt(9, device).repeat(3, 1)
    out = model.eagenerate(ids, temperature=1.5, seed=3, max_new_tokens=NEW)
    assert len({tuple(row.tolist()) for row in out}) == 3
    assert torch.equal(out, model.naivegenerate(ids, temperature=1.5, seed=3, max_new_tokens=NEW))
    assert torch.equal(out[:1], model.eagenerate(ids[:1], temperature=1.5, seed=3, max_new_tokens=NEW))


def test_rows_end_on_their_own(device):
    """Each row has a stop token of its own, at another place of the text, one none at all."""
    model, lengths = decoder("llama", device), [9, 1, 31, 14]
    ids, mask = batch_of(lengths, device)
    texts = alone(model, lengths, max_new_tokens=NEW)
    stops = [int(texts[0][0]), int(texts[1][6]), int(texts[2][11])]
    expected = alone(model, lengths, max_new_tokens=NEW, eos_token_id=stops)
    assert len({len(text) for text in expected}) >= 3
    out = model.eagenerate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=stops)
    assert_rows(out, ids.shape[1], expected)
    result = model.naivegenerate(
        ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=stops, return_dict_in_generate=True
    )
    assert_rows(result.sequences, ids.shape[1], expected)
    assert result.statistics.new_tokens == [len(text) for text in expected]
    assert result.statistics.rounds == max(len(text) for text in expected)


def test_rows_have_budgets_of_their_own(device):
    """max_length counts a sequence's own tokens, without padding, as it does for the sequence alone."""
    model, lengths = decoder("mistral", device), [9, 1, 31, 14]
    ids, mask = batch_of(lengths, device)
    expected = alone(model, lengths, max_new_tokens=22, max_length=34)
    assert [len(text) for text in expected] == [22, 22, 3, 20]
    for method in ("eagenerate", "naivegenerate"):
        out = getattr(model, method)(ids, attention_mask=mask, max_new_tokens=22, max_length=34)
        assert_rows(out, ids.shape[1], expected)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2"])
def test_padded_as_stock_generate_pads(name, device):
    model = decoder(name, device)
    ids, mask = batch_of([9, 4, 31], device, pad=2)
    first = stock(model, ids, attention_mask=mask, max_new_tokens=NEW)
    options = {"eos_token_id": [int(first[0, 35]), int(first[2, 40])], "pad_token_id": 2, "max_new_tokens": NEW}
    expected = stock(model, ids, attention_mask=mask, **options)
    assert expected.shape[1] <= 31 + NEW
    assert (expected[:, 31:] == 2).any()
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, **options), expected)


def test_ids_under_the_padding_do_not_matter(device):
    model = decoder("llama", device)
    ids, mask = batch_of([9, 4], device)
    wild = ids.where(mask.bool(), -100)
    out, expected = (model.eagenerate(each, attention_mask=mask, max_new_tokens=NEW) for each in (wild, ids))
    assert torch.equal(out[:, 9:], expected[:, 9:])
    assert torch.equal(out[:, :9], wild)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_and_ids_of_other_types(dtype, device):
    model = decoder("llama", device)
    ids, mask = batch_of([9, 4], device)
    expected = model.eagenerate(ids, attention_mask=mask, max_new_tokens=4)
    out = model.eagenerate(ids.int(), attention_mask=mask.to(dtype), max_new_tokens=4)
    assert torch.equal(out, expected)
    assert out.dtype == torch.long


def test_alternating_batch_sizes_and_lengths(device):
    model = decoder("llama", device)
    for lengths, new in [([9], 8), ([9, 1, 31], 16), ([31], 4), ([2, 2], 6), ([9], 16), ([9, 1, 31], 3), ([2, 2], 9)]:
        ids, mask = batch_of(lengths, device)
        texts = alone(model, lengths, max_new_tokens=new)
        assert_rows(model.eagenerate(ids, attention_mask=mask, max_new_tokens=new), ids.shape[1], texts)
