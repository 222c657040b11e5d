"""The trees that a round may use, the root alone among them: with or without a head, the text is the target's."""

import pytest
import torch
from decoders import decoder, prompt

from eagle_fast import SamplingParams, TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.draft import Drafter, NoHead
from eagle_fast.decoding.round import Round

NEW = 24


def text_of(state, ids, temperature=0.0):
    """(new tokens, rounds) of one sequence."""
    state.sampling.load(SamplingParams(temperature, seed=3), shared_noise=True)
    state.begin(ids.tolist(), [ids.shape[1] + NEW - 1])
    text, rounds = [], 0
    while len(text) < NEW:
        state.step()
        text += state.emitted[0, : int(state.counts[0])].tolist()
        rounds += 1
    return text, rounds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", [ROOT_ALONE, TreeConfig(2, 0, 1), TreeConfig(8, 7, 1), TreeConfig(16, 3, 4)], ids=str)
def test_every_tree_gives_the_text_of_plain_decoding(tree, temperature, device):
    model, ids = decoder("mistral", device), prompt(11, device)
    plain = Round(model.target, None, TreeConfig(), 1, 64)
    speculative = Round(model.target, model.ea_layer, tree, 1, 64)
    assert isinstance(plain.drafter, NoHead)
    assert isinstance(speculative.drafter, Drafter)
    expected, rounds = text_of(plain, ids, temperature)
    assert rounds == NEW
    text, rounds = text_of(speculative, ids, temperature)
    assert text == expected
    assert rounds == NEW if tree is ROOT_ALONE else rounds < NEW


def test_a_head_absorbs_under_a_root_alone_as_under_a_tree(device):
    """A state that decoded token by token drafts next what one does that was prefilled with the same text."""
    model, ids = decoder("llama", device), prompt(11, device)
    alone = Round(model.target, model.ea_layer, ROOT_ALONE, 1, 64)
    text, _ = text_of(alone, ids)
    fresh = Round(model.target, model.ea_layer, TreeConfig(16, 3, 4), 1, 64)
    whole = [*ids[0].tolist(), *text]
    fresh.begin([whole], [len(whole) + NEW])
    torch.testing.assert_close(alone.drafter.hidden, fresh.drafter.hidden, rtol=0, atol=1e-4)
    rows = int(alone.lengths)
    assert rows == int(fresh.lengths)
    for mine, other in zip(alone.drafter.slabs, fresh.drafter.slabs, strict=True):
        torch.testing.assert_close(mine[..., :rows, :], other[..., :rows, :], rtol=0, atol=1e-4)
