"""Targets that run through the linear layers of bitsandbytes and torchao, where these are installed: in stock layers,
in captured graphs on a GPU, and with a line that says so."""

import warnings

import pytest
import torch
from decoders import TREE, prompt
from often_right import write_often_right_head
from transformers import BitsAndBytesConfig, TorchAoConfig
from zoo import make

from eagle_fast import EaModel
from eagle_fast.target.placement import model_bytes

NEW = 24
LAYERS = 3


def nf4(double):
    pytest.importorskip("bitsandbytes")
    half = torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=half
    )


def torchao(kind, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, kind)(**options))


# what asks for it, least bytes of a weight (on a CPU scales are in 16 bits), what the line calls it
WAYS = {
    "nf4": (lambda: nf4(False), 0.5 + 2 / 64, "bitsandbytes"),
    "nf4, double": (lambda: nf4(True), 0.5 + 1 / 64, "bitsandbytes"),
    "torchao int8": (lambda: torchao("Int8WeightOnlyConfig"), 1, "torchao"),
    "torchao fp8": (lambda: torchao("Float8WeightOnlyConfig"), 1, "torchao"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """(model in bf16, its folder, folder of a head)."""
    model = make("llama", num_hidden_layers=LAYERS, hidden_size=128, intermediate_size=256)
    head = write_often_right_head(model, tmp_path_factory.mktemp("head"))
    model = model.bfloat16()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return model, folder, head


@pytest.mark.filterwarnings("error:rounds run without a CUDA graph")
@pytest.mark.parametrize("way", WAYS)
def test_a_library_runs_its_own_layers(way, target, device):
    make_config, bytes_of_weight, library = WAYS[way]
    model, folder, head = target
    config = make_config()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoder = EaModel.from_pretrained(
            base_model_path=folder, ea_model_path=head, device_map=device.type, dtype=torch.bfloat16,
            quantization_config=config, **TREE,
        )  # fmt: skip
    told = [str(each.message) for each in seen if "of weights" in str(each.message)]
    assert len(told) == 1
    assert f"runs through the linear layers of {library}, and its decoder layers are not fused" in told[0]
    linear = sum(each.numel() for name, each in model.named_parameters() if name.endswith("_proj.weight"))
    rest = model_bytes(model) - 2 * linear
    assert linear * bytes_of_weight <= model_bytes(decoder.base_model) - rest <= linear * bytes_of_weight * 1.15 + 8192
    assert [type(layer).__name__ for layer in decoder.target.decoder_layers] == ["LlamaDecoderLayer"] * LAYERS
    ids = prompt(11, device)
    expected = decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False)
    found = decoder.eagenerate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    plain = decoder.naivegenerate(ids, max_new_tokens=NEW)
    assert torch.equal(decoder.base_model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    assert found.statistics.tau > 1.5
    if decoder.exactness == "bitwise":
        assert torch.equal(found.sequences, plain)
    # kernels of a library may round by the number of rows: in 16 bits texts part where two tokens are as good
    same = min(int((text != expected).int().argmax()) or text.numel() for text in (found.sequences, plain))
    assert same >= 11 + NEW // 3
