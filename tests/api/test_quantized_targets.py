"""Quantized targets: loaded so that there is one text and base_model keeps it, or refused with what to do instead."""

import warnings

import pytest
import torch
from decoders import TREE, prompt
from often_right import write_often_right_head
from packed import FORMATS, write_compressed
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig
from zoo import make

from eagle_fast import EaModel
from eagle_fast.target import UnsupportedModel, quantized
from eagle_fast.target.quantized import DEQUANTIZE, GgufConfig, quantization_options
from eagle_fast.target.sound import check_rows, settle

NEW = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """(model, folder of a head for it)."""
    model = make("llama", num_hidden_layers=3)
    return model, write_often_right_head(model, tmp_path_factory.mktemp("head"))


def load(base, head, **options):
    return EaModel.from_pretrained(base_model_path=base, ea_model_path=head, **TREE, **options)


def same_text(decoder, expected=None):
    """Whether base_model, with and without a head, says the same; before and after, and as expected."""
    ids = prompt(11, CPU)
    if expected is None:
        expected = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    found = decoder.eagenerate(ids, max_new_tokens=NEW), decoder.naivegenerate(ids, max_new_tokens=NEW)
    after = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    return all(torch.equal(each, expected) for each in (*found, after))


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def test_compressed_checkpoints_that_cannot_be_read_are_dequantized(target, tmp_path):
    """With one line that says so, and why; the layers are plain ones, which are fused."""
    pytest.importorskip("compressed_tensors")
    model, head = target
    write_compressed(model, tmp_path, "pack-quantized", group=16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoder = load(tmp_path, head)
    told = [str(each.message) for each in seen if "quantiz" in str(each.message)]
    assert len(told) == 1
    assert "take 4 bytes each: its group_size is 16, and -1 or 32 or 64 or 128 can be read." in told[0]
    check_dequantized(decoder, model)


@pytest.mark.parametrize("kind", FORMATS)
def test_compressed_checkpoints_are_dequantized_where_asked_for(kind, target, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, head = target
    write_compressed(model, tmp_path, kind)
    dense = CompressedTensorsConfig(**{DEQUANTIZE: DEQUANTIZE == "dequantize"})
    check_dequantized(load(tmp_path, head, quantization_config=dense), model)


def check_dequantized(decoder, model):
    """Plain weights near those of the model, in layers that are fused."""
    assert same_text(decoder)
    weights = decoder.base_model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    assert 0 < (weights[0] - weights[1]).abs().max() < weights[1].abs().max() / 5
    assert type(decoder.target.decoder.layers[0]).__name__ == "FusedLayer"


@pytest.mark.parametrize("kind", FORMATS)
def test_compressed_models_unpack_themselves_first(kind, target, tmp_path):
    """A model whose first forward unpacks it keeps its text, whoever loaded it."""
    pytest.importorskip("compressed_tensors")
    model, head = target
    write_compressed(model, tmp_path, kind)
    ids = prompt(11, CPU)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, max_new_tokens=NEW, do_sample=False)
    assert same_text(load(loaded, head), expected)
    packed = CompressedTensorsConfig(**{DEQUANTIZE: DEQUANTIZE != "dequantize"})
    with pytest.warns(UserWarning, match="runs through the linear layers of compressed-tensors, .* not fused"):
        decoder = load(tmp_path, head, quantization_config=packed)
    assert same_text(decoder, expected)


def test_a_scale_over_all_rows_is_refused(target, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, head = target
    write_compressed(model, tmp_path, "int-quantized", strategy="tensor")
    with pytest.raises(UnsupportedModel, match=r"q_proj \(Linear\) rounds its input by what all rows hold"):
        load(AutoModelForCausalLM.from_pretrained(tmp_path), head)
    assert same_text(load(tmp_path, head))


def test_the_library_is_named_where_it_lacks(target, tmp_path, monkeypatch):
    model, head = target
    write_compressed(model, tmp_path, FORMATS[0], group=16)
    monkeypatch.setattr(quantized, "is_compressed_tensors_available", lambda: False)
    with pytest.raises(ValueError, match=r"='.*' is .*compressed-tensors, .*group_size is 16.* pip install compressed"):
        load(tmp_path, head)


# -- hooks and layers, without a library -------------------------------------------------------------------------------


def pack(model):
    """Weights at half their size, which a hook doubles before the first forward, and then takes itself off."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(0.5)

    def unpack(module, args):
        for layer in module.model.layers:
            layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight * 2, requires_grad=False)
        module.unpacking.remove()
        del module.unpacking

    model.unpacking = model.register_forward_pre_hook(unpack)
    return model


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_edits_the_model_once(late, target):
    """Set before EaModel is made, or after."""
    original, head = target
    ids = prompt(11, CPU)
    expected = original.generate(ids, max_new_tokens=NEW, do_sample=False)
    model = make("llama", num_hidden_layers=3)
    if late:
        decoder = load(model, head)
        pack(model)
    else:
        decoder = load(pack(model), head)
    assert same_text(decoder, expected)
    assert not hasattr(model, "unpacking")
    assert not hasattr(decoder.target.model, "unpacking")


def test_models_without_hooks_run_nothing_more(target):
    model, _ = target
    count = []
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda *args: count.append(1) or inner(*args)
    try:
        settle(model)
    finally:
        del model.model.layers[0].mlp.forward
    assert not count


def test_a_model_that_cannot_run_a_token():
    model = make("llama", num_hidden_layers=2)

    def broken(module, args):
        raise RuntimeError("no weights")

    model.register_forward_pre_hook(broken)
    with pytest.raises(UnsupportedModel, match=r"does not run a token by itself \(RuntimeError: no weights\)"):
        settle(model)


class Rounded(nn.Linear):
    """Rounds its input to int8: by the largest of a row, of all rows, or by a number fixed before."""

    how = "row"

    def forward(self, input):
        scales = dict(row=input.abs().amax(-1, keepdim=True), all=input.abs().amax(), fixed=torch.tensor(8.0))
        scale = scales[self.how] / 127
        return super().forward((input / scale).round().clamp(-127, 127) * scale)


@pytest.mark.parametrize(("how", "refused"), [("row", False), ("fixed", False), ("all", True)])
def test_rows_that_depend_on_each_other(how, refused, target):
    _, head = target
    model = make("llama", num_hidden_layers=3)
    layer = model.model.layers[1].self_attn.o_proj
    layer.__class__, layer.how = Rounded, how
    if refused:
        with pytest.raises(UnsupportedModel, match=r"layers\.1\.self_attn\.o_proj \(Rounded\) rounds its input by"):
            load(model, head)
    else:
        load(model, head).eagenerate(prompt(11, CPU), max_new_tokens=4)
    check_rows(make("llama", num_hidden_layers=2))


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_packed_ends_of_the_model(part, target):
    _, head = target
    model = make("llama", num_hidden_layers=2)
    model.get_submodule(part).weight = nn.Parameter(torch.zeros(131, 34, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"has a weight of Tensor in torch.uint8: .*dequantize=True"):
        load(model, head)


# -- bitsandbytes and GGUF: what is asked of transformers --------------------------------------------------------------


def test_load_in_8bit_has_no_threshold(target, tmp_path, monkeypatch):
    model, head = target
    model.save_pretrained(tmp_path)
    asked = []

    def keep(path, **options):
        asked.append(options["quantization_config"])
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", keep)
    told, failed = pytest.warns(UserWarning, match=r"llm_int8_threshold=0.0"), pytest.raises(ValueError, match="enough")
    with told, failed:
        load(tmp_path, head, load_in_8bit=True)
    with pytest.raises(ValueError, match="enough"):
        load(tmp_path, head, load_in_4bit=True)
    assert [each.llm_int8_threshold for each in asked] == [0.0, 6.0]
    assert [each.load_in_8bit for each in asked] == [True, False]


@pytest.mark.parametrize(
    "asked", [BitsAndBytesConfig(load_in_8bit=True), {"load_in_8bit": True}], ids=["config", "dict"]
)
def test_a_threshold_is_refused_before_loading(asked, target, tmp_path):
    model, head = target
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"quantization_config asks for .*=6.0: .*pass llm_int8_threshold=0.0"):
        load(tmp_path, head, quantization_config=asked)
    model.config.quantization_config = dict(quant_method="bitsandbytes", load_in_8bit=True)
    try:
        model.config.save_pretrained(tmp_path)
    finally:
        del model.config.quantization_config
    with pytest.raises(UnsupportedModel, match=r"base_model_path='.*' is bitsandbytes .*in its config.json"):
        load(tmp_path, head)


def test_no_quantization_config_is_none_given(target, tmp_path):
    model, head = target
    model.save_pretrained(tmp_path)
    assert same_text(load(tmp_path, head, quantization_config=None))


def test_gguf_is_dequantized():
    with pytest.warns(UserWarning, match=r"dequantized .*GGUF"):
        found = quantization_options(None, dict(gguf_file="m.gguf"))
    if GgufConfig is None:  # transformers never keeps the weights packed
        assert found == dict(gguf_file="m.gguf")
        return
    assert found["quantization_config"].dequantize
    with pytest.raises(ValueError, match=r"dequantize=False\) keeps the weights in GGUF's blocks"):
        quantization_options(None, dict(gguf_file="m.gguf", quantization_config=GgufConfig()))
    given = dict(gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True))
    assert quantization_options(None, given) == given


def test_gguf_files_that_are_not_there(target, tmp_path):
    _, head = target
    (tmp_path / "other.gguf").write_bytes(b"no GGUF")
    for name, message in (("m.gguf", r"no file m.gguf, .*: other.gguf"), ("other.gguf", r"other.gguf is no GGUF file")):
        with pytest.warns(UserWarning, match="dequantized"), pytest.raises(ValueError, match=message):
            load(tmp_path, head, gguf_file=name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_text_of_a_gguf_file(kind, target, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, head = target
    write_gguf(gguf, model, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    with pytest.warns(UserWarning, match="dequantized"):
        decoder = load(tmp_path, head, gguf_file="m.gguf", dtype="float32")
    assert same_text(decoder)


def write_gguf(gguf, model, file, kind):
    """A Llama as llama.cpp writes it, but that q and k keep transformers' order of rows."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{index}" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        name = names.get_name(name, try_suffixes=(".weight",))
        packed = tensor.numpy()
        if tensor.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(packed, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
