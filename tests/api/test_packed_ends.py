"""lm_head and embedding in few bits: rounded at load, tied or not, or an lm_head that a file has so."""

import json

import pytest
import torch
from decoders import TREE, prompt
from often_right import write_often_right_head, write_random_head
from one_text import CPU, NEW, check_one_text, kinds_of_layers, load
from quantized_files import LAYOUTS, compressed, fp8, gptq, write_quantized
from safetensors.torch import load_file, save_file
from zoo import make

from eagle_fast import EaModel
from eagle_fast.layers.embedding import PackedEmbedding, int8_rows
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.target.formats.arriving import num_parameters
from eagle_fast.target.placement import model_bytes

FAMILIES = ("llama", "qwen2", "qwen3", "olmo2")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """name -> (model, folder of an EAGLE-3 head for it)."""
    found = {}
    for name in FAMILIES:
        model = make(name, num_hidden_layers=2)
        found[name] = model, write_often_right_head(model, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(model, folder of it, folder of an EAGLE-3 head)."""
    model = make("llama", num_hidden_layers=2, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder / "base")
    return model, folder / "base", write_random_head(model, folder / "head")


def ends(decoder):
    return decoder.base_model.get_input_embeddings(), decoder.base_model.get_output_embeddings()


def check_rounded(end, weight):
    """In int8, within half a step of each row."""
    rows = end.rows if isinstance(end, PackedEmbedding) else end
    assert (rows.kind, rows.group_size) == ("int8", weight.shape[1])
    error = (rows.dense() - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 253).all()
    assert error.max() > 0


# -- rounded at load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["plain", "target_bits", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_ends(family, beside, targets, tmp_path):
    model, head = targets[family]
    name = ""
    if beside == "file":
        write_quantized(model, tmp_path, LAYOUTS["awq"])
        name = "AWQ, 4 bits in groups of 32, "
    else:
        model.save_pretrained(tmp_path)
    options = {"target_bits": 4} if beside == "target_bits" else {}
    name = "rounded to 4 bits at load, " if options else name
    decoder, said = load(tmp_path, head, lm_head_bits=8, **options)
    assert len(said) == 1
    assert f"({name}lm_head and embedding rounded to 8 bits at load) runs from its packed weights" in said[0]
    embedding, lm_head = ends(decoder)
    assert [type(embedding), type(lm_head)] == [PackedEmbedding, PackedLinear]
    check_rounded(embedding, model.get_input_embeddings().weight)
    check_rounded(lm_head, model.get_output_embeddings().weight)
    ids = prompt(5, CPU)
    assert torch.equal(embedding(ids[0]), embedding.rows.dense()[ids[0]])
    if family != "olmo2":
        assert kinds_of_layers(decoder) == ["FusedLayer"] * 2
    assert num_parameters(decoder.base_model) == sum(each.numel() for each in model.parameters())
    check_one_text(decoder)


def test_a_tied_weight_is_there_once(tied):
    model, folder, head = tied
    decoder, _ = load(folder, head, lm_head_bits=8)
    embedding, lm_head = ends(decoder)
    weight = model.get_input_embeddings().weight
    check_rounded(lm_head, weight)
    assert embedding.rows is lm_head
    assert num_parameters(decoder.base_model) == sum(each.numel() for each in model.parameters())
    saved = model_bytes(model) - model_bytes(decoder.base_model)
    assert saved == 4 * weight.numel() - lm_head.words.nbytes - lm_head.scales.nbytes
    assert decoder.ea_layer.embedding.packed.words.data_ptr() == lm_head.words.data_ptr()
    twin = decoder.target.model
    assert twin.get_input_embeddings().rows is twin.get_output_embeddings()
    check_one_text(decoder)


@pytest.mark.parametrize("options", [{}, {"tensor_parallel": ["cpu", "cpu"]}], ids=["one device", "ranks"])
def test_a_tied_weight_beside_one_of_its_own_is_refused(options, tied, tmp_path):
    model, _, head = tied
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.randn(model.lm_head.weight.shape)}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"lm_head_bits=8, but .* has an lm_head beside the embedding"):
        load(tmp_path, head, lm_head_bits=8, **options)


def test_logits_scores_and_warpers_are_those_of_plain_decoding(targets, tmp_path):
    model, head = targets["qwen2"]
    model.save_pretrained(tmp_path)
    decoder, _ = load(tmp_path, head, lm_head_bits=8)
    ids = prompt(9, CPU)
    options = dict(max_new_tokens=NEW, temperature=0.8, top_k=7, top_p=0.9, seed=3, return_dict_in_generate=True)
    options |= dict(output_logits=True, output_scores=True, output_logprobs=True)
    found, plain = (way(ids, **options) for way in (decoder.eagenerate, decoder.naivegenerate))
    assert torch.equal(found.sequences, plain.sequences)
    stock = decoder.base_model(plain.sequences).logits[0, 8:-1]
    torch.testing.assert_close(torch.cat(found.logits), stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found.scores), torch.cat(plain.scores), rtol=1e-4, atol=1e-4)


# -- what heads read ---------------------------------------------------------------------------------------------------


def test_an_eagle_1_head_reads_the_numbers_of_lm_head(targets, tmp_path):
    model, _ = targets["llama"]
    model.save_pretrained(tmp_path / "base")
    head = write_often_right_head(model, tmp_path / "head", "eagle")
    decoder, _ = load(tmp_path / "base", head, lm_head_bits=8)
    _, lm_head = ends(decoder)
    drafting = decoder.ea_layer
    assert drafting.lm_head_weight.dtype == torch.int8
    assert torch.equal(drafting.lm_head_weight * drafting.lm_head_scale[:, None], lm_head.dense())
    before = drafting.lm_head_weight
    drafting.quantize()
    assert drafting.lm_head_weight is before
    decoder, _ = load(tmp_path / "base", head, lm_head_bits=8)
    check_one_text(decoder)
    found = decoder.eagenerate(prompt(11, CPU), max_new_tokens=NEW, return_dict_in_generate=True)
    assert found.statistics.tau > 2


def test_a_head_that_repeats_the_embedding_shares_it(targets, tmp_path):
    model, _ = targets["llama"]
    model.save_pretrained(tmp_path / "base")
    head = write_random_head(model, tmp_path / "head", "eagle")
    tensors = load_file(head / "model.safetensors") | {"embed_tokens.weight": model.model.embed_tokens.weight.clone()}
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    decoder, _ = load(tmp_path / "base", head, lm_head_bits=8)
    assert decoder.ea_layer.embedding.packed.words.data_ptr() == ends(decoder)[0].packed.words.data_ptr()
    own = decoder.ea_layer.checkpoint().tensors["embed_tokens.weight"]
    assert torch.equal(own, ends(decoder)[0].rows.dense())


@pytest.mark.parametrize("settings", [{"draft_vocab_size": 60}, {"hidden_size": 96}], ids=str)
def test_heads_of_other_sizes(settings, targets, tmp_path):
    """A map of the vocabulary; an embedding of the head's own."""
    model, _ = targets["llama"]
    model.save_pretrained(tmp_path / "base")
    decoder, _ = load(tmp_path / "base", write_often_right_head(model, tmp_path / "head", **settings), lm_head_bits=8)
    assert isinstance(decoder.ea_layer.embedding, PackedEmbedding) == ("hidden_size" not in settings)
    check_one_text(decoder)


def test_rows_that_a_heads_embedding_lacks_are_the_targets(targets, tmp_path):
    model, _ = targets["llama"]
    model.save_pretrained(tmp_path / "base")
    head = write_random_head(model, tmp_path / "head", "eagle")
    tensors = load_file(head / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:100].clone()
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((head / "config.json").read_text()) | {"vocab_size": 100}
    (head / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="vocabulary|tokens"):
        decoder = EaModel.from_pretrained(
            base_model_path=tmp_path / "base", ea_model_path=head, lm_head_bits=8, **TREE
        )  # fmt: skip
    assert torch.equal(decoder.ea_layer.embedding[100:], ends(decoder)[0].rows.dense()[100:])


# -- an lm_head that a file has packed ---------------------------------------------------------------------------------

WITH_LM_HEAD = {
    "gptq": (gptq(), {"lm_head": True}),
    "gptq, other bits": (gptq(8), {"lm_head": True}),
    "gptq, act-order": (gptq(act_order=True, even=False), {"lm_head": True}),
    "compressed": (compressed(), {"ignore": []}),
    "compressed, a row": (compressed(8, -1, packed=False), {"ignore": []}),
}


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
@pytest.mark.parametrize("name", WITH_LM_HEAD)
def test_a_quantized_lm_head(name, kind, targets, tmp_path):
    model, _ = targets["llama"]
    layout, settings = WITH_LM_HEAD[name]
    # nibbles of zero points lie along the rows: a whole number of words
    model = make("llama", num_hidden_layers=2, vocab_size=136)
    dense = write_quantized(model, tmp_path / "base", layout, ends=("_proj.weight", "lm_head.weight"), **settings)
    decoder, said = load(tmp_path / "base", write_often_right_head(model, tmp_path / "head", kind))
    assert "runs from its packed weights" in said[0]
    lm_head = ends(decoder)[1]
    assert torch.equal(lm_head.dense(), dense["lm_head.weight"])
    if kind == "eagle":
        scale = decoder.ea_layer.lm_head_scale
        weight = decoder.ea_layer.lm_head_weight * (1 if scale is None else scale[:, None])
        assert torch.equal(weight, dense["lm_head.weight"])
        assert (scale is not None) == (lm_head.kind == "int8" and lm_head.group_size == lm_head.in_features)
    check_one_text(decoder)


def test_a_quantized_lm_head_that_is_tied_is_refused(tied, tmp_path):
    model, _, head = tied
    write_quantized(model, tmp_path, gptq(), lm_head=True)
    with pytest.raises(ValueError, match=r"(optimum|gptqmodel)"):
        load(tmp_path, head)


# -- what cannot be ----------------------------------------------------------------------------------------------------

BAD = {
    "number": (dict(lm_head_bits=4), r"lm_head_bits=4: use 8, or leave it out"),
    "bool": (dict(lm_head_bits=True), r"lm_head_bits=True: use 8, or"),
    "beside": (dict(lm_head_bits=8, load_in_4bit=True), r"lm_head_bits=8 beside quantization_config"),
    "gguf": (dict(lm_head_bits=8, gguf_file="m.gguf"), r"lm_head_bits=8, but .* is quantized already: leave lm_head_b"),
    "both": (dict(lm_head_bits=8, target_bits=3), r"target_bits=3: use 8 or 4, or leave it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bits_that_cannot_be(case, targets, tmp_path):
    model, head = targets["llama"]
    model.save_pretrained(tmp_path)
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, head, **options)


def test_models_whose_ends_cannot_be_rounded(targets, tmp_path):
    model, head = targets["llama"]
    with pytest.raises(ValueError, match=r"'lm_head_bits'.* cannot change a model that is loaded already"):
        load(model, head, lm_head_bits=8)
    make("gemma3_text").save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"lm_head_bits=8 is not possible .*: its embedding \(Gemma3TextScaledWordEmb"):
        load(tmp_path / "scaled", head, lm_head_bits=8)
    larger = make("llama", num_hidden_layers=2, vocab_size=136)
    write_quantized(larger, tmp_path / "file", gptq(), ends=("_proj.weight", "lm_head.weight"), lm_head=True)
    with pytest.raises(ValueError, match=r"lm_head_bits=8 is not possible .*: its lm_head is quantized in the file"):
        load(tmp_path / "file", head, lm_head_bits=8)
    write_quantized(model, tmp_path / "other", fp8(), quant_method="mxfp4")
    with pytest.raises(ValueError, match=r"lm_head_bits=8 is not possible .*: its quant_method is 'mxfp4'"):
        load(tmp_path / "other", head, lm_head_bits=8)


def test_rows_are_rounded_as_the_heads_are():
    weight = torch.randn(5, 48)
    packed = int8_rows(weight)
    check_rounded(PackedLinear.of(packed), weight)


# -- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_bits_on_a_gpu(kind, dtype, targets, tmp_path):
    model, _ = targets["qwen2"]
    model.save_pretrained(tmp_path / "base")
    head = write_often_right_head(model, tmp_path / "head", kind)
    decoder, _ = load(tmp_path / "base", head, dtype=dtype, device_map="cuda", lm_head_bits=8, target_bits=8)
    assert decoder.exactness == "bitwise", decoder.exactness.reason
    ids = prompt(11, CPU).cuda().expand(5, -1)
    for options in ({}, {"temperature": 1.0, "seed": [1, 2, 3, 4, 5]}):
        found = decoder.eagenerate(ids, max_new_tokens=NEW, **options)
        for row in range(5):
            own = {"seed": options["seed"][row], "temperature": 1.0} if options else {}
            assert torch.equal(found[row], decoder.naivegenerate(ids[:1], max_new_tokens=NEW, **own)[0])


@pytest.mark.multi_gpu
def test_ends_on_two_gpus(targets, tied, tmp_path):
    """Embedding and lm_head apart; of a tied model both where lm_head is to be."""
    model, head = targets["llama"]
    model.save_pretrained(tmp_path)
    apart = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    decoder, _ = load(tmp_path, head, device_map=apart | {"model.rotary_emb": 0}, lm_head_bits=8)
    assert [end.device.index for end in ends(decoder)] == [0, 1]
    ids = prompt(11, CPU).cuda()
    expected = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
    decoder, _ = load(*tied[1:], device_map=apart | {"model.rotary_emb": 0}, lm_head_bits=8)
    assert [end.device.index for end in ends(decoder)] == [1, 1]
    expected = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.eagenerate(ids, max_new_tokens=NEW), expected)
