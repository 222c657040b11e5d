"""Loads quantized targets, and checks that their text is one: with the head, without it, and of base_model."""

import warnings

import torch
from decoders import TREE, prompt

from eagle_fast import EaModel

NEW = 20
CPU = torch.device("cpu")


def load(folder, head, **options):
    """(decoder, what was said of quantized weights)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoder = EaModel.from_pretrained(base_model_path=folder, ea_model_path=head, **TREE, **options)
    return decoder, [str(each.message) for each in seen if "weights" in str(each.message)]


def check_one_text(decoder):
    ids = prompt(11, CPU)
    expected = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(decoder.naivegenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    sampled = [
        way(ids, max_new_tokens=NEW, temperature=1.0, seed=seed)
        for seed in (1, 2)
        for way in (decoder.eagenerate, decoder.naivegenerate)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[2], sampled[3])


def kinds_of_layers(decoder):
    return [type(layer).__name__ for layer in decoder.target.decoder_layers]
