"""Packed weights over ranks: cut along groups, in the order that their columns have, to the text of one device."""

import pytest
import torch
from decoders import TREE
from often_right import write_often_right_head
from one_text import load
from quantized_files import LAYOUTS, write_quantized
from ranked import prompts
from zoo import make

from eagle_fast import EaModel
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.loading_ranks import load_cut_target
from eagle_fast.target.anatomy import UnsupportedModel
from eagle_fast.target.packing import Bits
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.ranks import cut_bytes, cuts_for

CPUS = ["cpu", "cpu"]
ORDERED = {"gptq_act_order", "gptq_8_asymmetric", "w4a16_act_order", "w4a16_act_order_zeros"}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """name -> (model, folder of a head for it)"""
    found = {}
    for name in ("llama", "qwen2"):
        model = make(name, num_hidden_layers=2)
        found[name] = model, write_often_right_head(model, tmp_path_factory.mktemp(name))
    return found


def check_texts(single, ranked):
    """With the head and without, alone and in a batch."""
    for batch, sampled in ((1, {}), (3, {"temperature": 1.0, "seed": 7})):
        asked = {**prompts(batch), **sampled, "max_new_tokens": 15}
        expected = single.naivegenerate(**asked)
        assert torch.equal(ranked.eagenerate(**asked), expected)
        assert torch.equal(ranked.naivegenerate(**asked), expected)


def check_same(folder, head, **options):
    """The ranked decoder, after its text was that of one device."""
    single, _ = load(folder, head, **options)
    ranked, said = load(folder, head, tensor_parallel=CPUS, **options)
    assert len(said) == 1
    assert "runs from its packed weights" in said[0]
    check_texts(single, ranked)
    for rank in cut_of(ranked.base_model).ranks:
        assert all(type(each) is PackedLinear for layer in rank.layers for each in (layer.gate_up, layer.down))
    return ranked


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - ORDERED))
def test_text_of_every_layout(layout, targets, tmp_path):
    model, head = targets["qwen2"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    check_same(tmp_path, head)


@pytest.mark.parametrize("options", [{}, {"target_bits": 4}], ids=["plain", "rounded"])
@pytest.mark.parametrize("tied", [False, True])
def test_ends_in_8_bits(options, tied, tmp_path):
    """The embedding whole on every rank, of lm_head a part: where it is tied, the embedding's own rows."""
    model = make("llama", num_hidden_layers=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    head = write_often_right_head(model, tmp_path / "head", "eagle")  # which reads the target's embedding and lm_head
    options = {**options, "lm_head_bits": 8}
    single, _ = load(tmp_path / "model", head, **options)
    ranked, said = load(tmp_path / "model", head, tensor_parallel=CPUS, **options)
    assert ["runs from its packed weights" in each for each in said] == [True]
    check_texts(single, ranked)
    for rank in cut_of(ranked.base_model).ranks:
        assert type(rank.lm_head) is PackedLinear
        assert rank.is_tied == tied
        assert rank.embedding.kind == "int8"


@pytest.mark.parametrize("layout", sorted(ORDERED))
def test_an_order_of_columns_is_kept_but_across_heads(layout, targets, tmp_path):
    """Rows of gate and up take over that of down; o would read other ranks' heads."""
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    with pytest.raises(UnsupportedModel, match=r"layer 0: .*act-order.*device_map='balanced'"):
        EaModel.from_pretrained(base_model_path=tmp_path, ea_model_path=head, tensor_parallel=CPUS, **TREE)
    ends = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up", "down"))
    without = {"dynamic": {"-:.*o_proj": {}}} if layout.startswith("gptq") else {"ignore": ["re:.*o_proj", "lm_head"]}
    write_quantized(model, tmp_path, LAYOUTS[layout], ends=ends, **without)
    ranked = check_same(tmp_path, head)
    orders = [layer.qkv.columns is not None for rank in cut_of(ranked.base_model).ranks for layer in rank.layers]
    assert all(orders)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_rounded_at_load(bits, targets, tmp_path):
    model = make("qwen3", num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3)
    head = write_often_right_head(model, tmp_path / "head")
    model.save_pretrained(tmp_path / "target")
    ranked = check_same(tmp_path / "target", head, target_bits=bits)
    assert {layer.o.kind for rank in cut_of(ranked.base_model).ranks for layer in rank.layers} == {f"int{bits}"}


def test_groups_that_no_cut_runs_along(tmp_path):
    """Six heads of 16 a rank are one and a half groups of 64."""
    model = make("qwen3", num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"layer 0: columns 0 to 96 do not lie along groups of 64; leave"):
        load_cut_target(str(tmp_path), [torch.device("cpu")] * 2, {}, {}, Bits(4))


def test_a_packed_lm_head(targets, tmp_path):
    _, head = targets["llama"]
    ends = ("_proj.weight", "lm_head.weight")
    write_quantized(
        make("llama", num_hidden_layers=2, vocab_size=160), tmp_path, LAYOUTS["gptq"], ends=ends, lm_head=True
    )
    single, _ = load(tmp_path, head)
    ranked, _ = load(tmp_path, head, tensor_parallel=CPUS)
    assert [type(rank.lm_head) for rank in cut_of(ranked.base_model).ranks] == [PackedLinear] * 2
    asked = {**prompts(1), "max_new_tokens": 15}
    assert torch.equal(ranked.eagenerate(**asked), single.naivegenerate(**asked))


def test_a_rank_holds_its_share(tmp_path):
    model = make("llama", num_hidden_layers=2, hidden_size=256, intermediate_size=512, head_dim=64)
    write_quantized(model, tmp_path, LAYOUTS["w8a16"])
    with pytest.warns(UserWarning, match="packed weights"):
        ranks = cut_of(load_cut_target(str(tmp_path), [torch.device("cpu")] * 2, {}, {})).ranks
    for rank, dense in zip(ranks, cut_bytes(model, cuts_for(model, 2)), strict=True):
        end = rank.embedding.nbytes + rank.lm_head.weight.nbytes
        assert rank.num_bytes - end < 0.3 * (dense - end)  # of 4 bytes 1, and a scale for 32


def test_packed_tensors_that_the_config_does_not_speak_of(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"])
    (tmp_path / "config.json").unlink()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0"):
        EaModel.from_pretrained(base_model_path=tmp_path, ea_model_path=head, tensor_parallel=CPUS, **TREE)


def test_formats_of_a_library_are_refused(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"], bits=3)
    with pytest.raises(UnsupportedModel, match=r"are packed, and its bits is 3.*device_map='balanced'"):
        EaModel.from_pretrained(base_model_path=tmp_path, ea_model_path=head, tensor_parallel=CPUS, **TREE)
