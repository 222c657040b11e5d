"""Heads on targets whose vocabulary grew (added tokens, padding) or lost its padding: they draft what both have."""

import copy
import functools
import json
import warnings

import pytest
import torch
from decoders import TREE, prompt
from draft_formats import sample
from draft_weights import TARGET, H, V, plain_eagle3
from often_right import write_often_right_head
from safetensors.torch import load_file, save_file
from zoo import VOCAB, make

from eagle_fast import EaModel
from eagle_fast.head import DraftHead, read_head

KINDS = {
    "whole vocabulary": {},
    "d2t and t2d": dict(draft_vocab_size=110),
    "own embedding, narrower": dict(hidden_size=32),
    "own embedding, as wide": dict(hidden_size=64),
    "eagle1": dict(kind="eagle"),
}
OLD = [33, 100, 57, 83, 63]  # tokens of the text that have stronger copies at the end of longer vocabularies


@functools.cache
def target(rows):
    """The zoo's Llama with so many tokens. Five that were added win now and then: old ones, but stronger."""
    model = make("llama")
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 0
        if rows > VOCAB:
            model.lm_head.weight[-5:] = 1.05 * model.lm_head.weight[OLD]
            model.model.embed_tokens.weight[-5:] = model.model.embed_tokens.weight[OLD]
    return model


def text_on(rows, folder, count=40):
    """(tau, ids emitted) on the target of so many tokens; the text is the target's, and there is one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ea_model = EaModel.from_pretrained(base_model_path=target(rows), ea_model_path=str(folder), **TREE)
    assert len(caught) == 1
    assert "the head is for a vocabulary of 131 tokens, the target has" in str(caught[0].message)
    assert caught[0].filename == __file__
    ids = prompt(11, torch.device("cpu"))
    if rows > VOCAB:
        ids[0, 3] = rows - 1
    out = ea_model.eagenerate(ids.clamp(max=rows - 1), max_new_tokens=count, return_dict_in_generate=True)
    expected = target(rows).generate(ids.clamp(max=rows - 1), max_new_tokens=count, do_sample=False)
    assert torch.equal(out.sequences, expected)
    return out.statistics.tau, out.sequences[0, 11:]


@pytest.mark.parametrize("rows", [VOCAB + 8, 2 * VOCAB, VOCAB - 8])
@pytest.mark.parametrize("kind", KINDS)
def test_text_and_acceptance(kind, rows, tmp_path):
    tau, emitted = text_on(rows, write_often_right_head(make("llama"), tmp_path, **KINDS[kind]))
    assert tau > (1.1 if kind.endswith("narrower") else 1.5)  # that one has 1.5 on its own target
    assert rows < VOCAB or (emitted >= VOCAB).any(), "some tokens are new to the head"


def test_a_d2t_without_its_mask(tmp_path):
    write_often_right_head(make("llama"), tmp_path, draft_vocab_size=110)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["t2d"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert text_on(VOCAB + 8, tmp_path)[0] > 1.3


def test_an_embedding_longer_than_lm_head(tmp_path):
    model = make("llama")
    write_often_right_head(model, tmp_path)
    longer = copy.deepcopy(model)
    longer.resize_token_embeddings(VOCAB + 8)
    model.model.embed_tokens = longer.model.embed_tokens
    ea_model = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(tmp_path), **TREE)
    ids = prompt(11, torch.device("cpu"))
    out = ea_model.eagenerate(ids, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert out.statistics.tau > 1.5


def test_tokens_that_cannot_be_embedded_are_not_drafted(tmp_path):
    model = make("llama")
    write_often_right_head(model, tmp_path)
    model.lm_head = target(VOCAB + 8).lm_head
    read = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(tmp_path), **TREE).ea_layer
    assert read.config.vocab_size == len(read.embedding) == VOCAB


# -- what read_head makes of it


def read(made, folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_head(made.write(folder), **{**TARGET, **options})
    return found, [str(each.message) for each in caught]


def test_rows_that_an_own_embedding_lacks_are_the_targets_or_zero(tmp_path):
    made, theirs = sample("safeailab_eagle1"), torch.randn(V + 4, H)
    own = made.tensors["embed_tokens.weight"]
    tensors = read(made, tmp_path, target_vocab_size=V + 4, target_embedding=theirs)[0].tensors
    assert torch.equal(tensors["embed_tokens.weight"], torch.cat((own, theirs[V:])))
    for other in (None, theirs[:, 1:], theirs.to("meta"), theirs.to(torch.int8)):
        tensors = read(made, tmp_path, target_vocab_size=V + 4, target_embedding=other)[0].tensors
        assert torch.equal(tensors["embed_tokens.weight"], torch.cat((own, torch.zeros(4, H))))


def test_a_copy_of_the_targets_embedding_is_still_shared(tmp_path):
    theirs = torch.randn(V + 4, H)
    made = sample("safeailab_eagle1")
    made.tensors["embed_tokens.weight"] = theirs[:V].clone()
    checkpoint, _ = read(made, tmp_path, target_vocab_size=V + 4, target_embedding=theirs)
    head = DraftHead(checkpoint, embedding=theirs, lm_head_weight=torch.randn(V + 4, H))
    assert head.embedding.data_ptr() == theirs.data_ptr()


def test_draft_ids_that_the_target_lacks_are_dropped(tmp_path):
    made = plain_eagle3()
    made.tensors["lm_head.bias"] = torch.arange(23.0)
    whole, _ = read(made, tmp_path)
    lost = whole.token_ids[-2:]
    shorter, said = read(made, tmp_path, target_vocab_size=int(lost[0]))
    assert len(said) == 1
    assert "2 tokens that the target lacks are not drafted" in said[0]
    assert torch.equal(shorter.token_ids, whole.token_ids[:-2])
    assert shorter.config.draft_vocab_size == 21
    for name in ("lm_head.weight", "lm_head.bias"):
        assert torch.equal(shorter.tensors[name], whole.tensors[name][:-2])


WAYS = ["targets_lm_head", "tied_lm_head", "only_t2d", "absolute_d2t", "vllm_eagle1_token_map"]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("vocab_size", [V + 4, V - 1, 3 * V])
def test_every_way_to_write_a_vocabulary(name, vocab_size, tmp_path):
    made = sample(name)
    found, said = read(made, tmp_path, target_vocab_size=vocab_size)
    assert len(said) == 1
    assert f"a vocabulary of {V} tokens, the target has {vocab_size}" in said[0]
    ids = range(found.config.draft_vocab_size) if found.token_ids is None else found.token_ids.tolist()
    expected = made.truth.ids or range(vocab_size if name == "targets_lm_head" else V)
    assert list(ids) == [each for each in expected if each < vocab_size]


def test_padding_of_lm_head_alone(tmp_path):
    made = sample("modelopt_2026")
    made.tensors["lm_head.weight"] = torch.randn(V + 3, H)
    found, said = read(made, tmp_path)
    assert found.config.draft_vocab_size == V
    assert found.token_ids is None
    assert "vocabulary of 64 tokens" in said[0]


@pytest.mark.parametrize(
    ("name", "vocab_size", "remedy"),
    [("safeailab_eagle1", 40, {"vocab_size": 40}), ("targets_lm_head", 40, {"vocab_size": 40})],
)
def test_the_advice_of_a_refusal_helps(name, vocab_size, remedy, tmp_path):
    made = sample(name)
    with pytest.raises(ValueError, match=f"write vocab_size {vocab_size} into the head's config.json"):
        read(made, tmp_path, target_vocab_size=vocab_size)
    made.config |= remedy
    assert read(made, tmp_path, target_vocab_size=vocab_size)[0].config.vocab_size == vocab_size


def test_an_lm_head_without_its_map(tmp_path):
    made = plain_eagle3(maps="")
    with pytest.raises(ValueError, match=r"has 23 rows, .* no d2t or t2d .* write vocab_size 23 into"):
        read(made, tmp_path)
    made.config["vocab_size"] = 23
    found, said = read(made, tmp_path)
    assert len(said) == 1
    assert found.token_ids.tolist() == list(range(23))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 23
