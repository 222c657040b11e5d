"""A sequence that moves from one round into another goes on as if it had always been there."""

import pytest
import torch
from often_right import write_often_right_head
from zoo import make

from eagle_fast import EaModel, SamplingParams
from eagle_fast.decoding.round import Round

TREE = {"total_token": 16, "depth": 3, "top_k": 4}
NEW = 20


def prompts(batch, length, seed):
    return torch.randint(3, 130, (batch, length), generator=torch.Generator().manual_seed(seed))


def begin(decoder, ids, seeds, speculative, temperature=1.0):
    state = Round(decoder.target, decoder.ea_layer if speculative else None, decoder.tree, len(ids), 64)
    state.sampling.load(SamplingParams(temperature, seed=seeds), shared_noise=True)
    state.begin(ids.tolist(), [ids.shape[1] + NEW - 1] * len(ids))
    return state


def collect(state, texts, rounds):
    for _ in range(rounds):
        state.step()
        for text, count, emitted in zip(texts, state.counts.tolist(), state.emitted.tolist(), strict=True):
            text += emitted[:count]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])  # mistral: a window
def test_rows_are_replaced_while_others_go_on(name, speculative, device, tmp_path):
    model = make(name)
    write_often_right_head(model, tmp_path)
    decoder = EaModel.from_pretrained(base_model_path=model.to(device), ea_model_path=str(tmp_path), **TREE)
    first, second = prompts(4, 9, 1), prompts(3, 14, 2)
    expected = []
    for ids, seeds in ((first, [10, 11, 12, 13]), (second, [14, 15, 16])):
        out = decoder.naivegenerate(ids, temperature=1.0, seed=seeds, max_new_tokens=NEW)
        expected += out[:, ids.shape[1] :].tolist()
    state, texts = begin(decoder, first, (10, 11, 12, 13), speculative), [[], [], [], []]
    collect(state, texts, 3)
    entry, others = begin(decoder, second, (14, 15, 16), speculative), [[], [], []]
    collect(entry, others, 2)
    state.adopt(torch.tensor([3, 1], device=device), entry)  # the third of `entry` is not wanted
    texts[3], texts[1] = others[:2]
    collect(state, texts, NEW)
    assert texts == [expected[0], expected[5], expected[2], expected[4]]
