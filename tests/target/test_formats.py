"""Packed checkpoints, read without the libraries that wrote them: the weights are those of the file, to the bit."""

import pytest
import torch
from eagle_fast_kernels.packed import unpack
from quantized_files import LAYOUTS, awq, compressed, compressed_fp8, fp8, gptq, write_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import make

from eagle_fast.layers.packed import PackedLinear
from eagle_fast.target.formats.arriving import ArrivingLinear, make_room, shrink
from eagle_fast.target.formats.choose import format_of
from eagle_fast.target.formats.quantizer import PackedConfig, PackedQuantizer, packed_config
from eagle_fast.target.formats.rounding import rounded_groups
from eagle_fast.target.formats.scheme import Unreadable


@pytest.fixture(scope="module")
def model():
    return make("qwen2", num_hidden_layers=2)


def load(folder, **options):
    """(model, what transformers says of its tensors)."""
    config = AutoConfig.from_pretrained(folder)
    config = packed_config(config, PackedConfig(stored=config.quantization_config))
    return AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)


def fill(layer, tensors):
    """Give a layer its tensors, as transformers does."""
    for name, tensor in tensors.items():
        tensor = tensor.to(layer.get_parameter(name).dtype)
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_those_of_the_file(name, model, tmp_path):
    dense = write_quantized(model, tmp_path, LAYOUTS[name])
    found, info = load(tmp_path)
    assert not any(info.values()), info
    for key, weight in dense.items():
        layer = found.get_submodule(key.removesuffix(".weight"))
        assert type(layer) is PackedLinear
        assert torch.equal(layer.dense(), weight), key
    stock = model.state_dict()
    for key, tensor in found.state_dict().items():
        if key in stock:  # norms, biases, the two ends
            assert torch.equal(tensor, stock[key]), key
    assert not found.training
    assert all(not module.training for module in found.modules())


@pytest.mark.parametrize(
    "layout",
    [gptq(4, 128), gptq(8, 64, even=False, act_order=True), awq(128), awq(64), compressed(4, 128, even=False),
     compressed(8, 64), compressed(4, 128, act_order="group"), fp8(128), fp8(None), compressed_fp8("block")],
    ids=["gptq128", "gptq64", "awq128", "awq64", "ct128", "ct64", "ct128_order", "fp8", "fp8_one", "ct_fp8"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_every_size(layout, dtype):
    """Of a layer of its own: 24 x 256, whose blocks of fp8 are ragged; in 16 bits rounded once, from rounded scales."""
    linear = torch.nn.Linear(256, 24, bias=False, dtype=dtype)
    written = layout.write(torch.randn(24, 256, generator=torch.Generator().manual_seed(3)))
    scheme = format_of(layout.settings).scheme("model.layers.0.mlp.up_proj", linear, True)
    layer = ArrivingLinear(linear, scheme)
    assert set(dict(layer.named_parameters())) == set(written.tensors)
    for name, tensor in written.tensors.items():
        assert layer.get_parameter(name).shape == tensor.shape, name
    fill(layer, written.tensors)
    assert type(layer) is PackedLinear
    if dtype == torch.float32:
        assert torch.equal(layer.dense(), written.weight)
        return
    groups = layer.packed.scales.shape[0]
    assert layer.packed.scales.dtype == (torch.float32 if groups == 1 else dtype)
    assert (layer.dense().float() - written.weight).abs().max() <= written.weight.abs().max() * 2**-7


def test_a_layer_is_packed_when_its_last_tensor_comes():
    linear = torch.nn.Linear(64, 16, dtype=torch.float32)
    written = awq().write(linear.weight.detach())
    layer = ArrivingLinear(linear, format_of(awq().settings).scheme("", linear, True))
    tensors = {**written.tensors, "bias": torch.ones(16)}
    for name, tensor in tensors.items():
        assert type(layer) is ArrivingLinear
        fill(layer, {name: tensor})
    assert type(layer) is PackedLinear
    assert not list(layer.parameters())  # nothing of the file is kept beside
    assert torch.equal(layer.bias, torch.ones(16))
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, written.weight, torch.ones(16)), atol=1e-5)


def test_one_layer_at_a_time(model, tmp_path, monkeypatch):
    """No tensor of a layer is read before the layers in front of it are packed."""
    write_quantized(model, tmp_path, LAYOUTS["gptq"])
    waiting, most = set(), []
    arrive = ArrivingLinear.__setattr__

    def watched(self, name, value):
        arrive(self, name, value)
        if isinstance(value, torch.nn.Parameter) and not value.is_meta:
            (waiting.discard if type(self) is PackedLinear else waiting.add)(id(self))
            most.append(len(waiting))

    monkeypatch.setattr(ArrivingLinear, "__setattr__", watched)
    load(tmp_path)
    assert max(most) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_devices_are_asked_for_as_many_bytes_as_packed_weights_take(bits):
    """What transformers asks for before it loads, by each number of a tensor of the file."""
    model = make("llama")
    quantizer = PackedQuantizer(PackedConfig(bits=bits, lm_head_bits=8))
    quantizer._process_model_before_weight_loading(model)
    asked = sum(
        each.numel() * quantizer.param_element_size(model, name, each) for name, each in model.named_parameters()
    )
    shrink(model)
    assert round(asked) == sum(each.nbytes for each in model.parameters())


def test_scales_that_are_powers_of_two(model, tmp_path):
    """As DeepSeek's newer files have them, a byte each (ue8m0)."""
    dense = write_quantized(model, tmp_path, fp8(), scale_fmt="ue8m0")
    file, exponents = tmp_path / "model.safetensors", {}
    tensors = load_file(file)
    for name in [each for each in tensors if each.endswith("weight_scale_inv")]:
        exponents[name] = 2.0 ** tensors[name].log2().round()
        tensors[name] = exponents[name].to(torch.float8_e8m0fnu)
    save_file(tensors, file, metadata={"format": "pt"})
    found = load(tmp_path)[0]
    for key in dense:
        codes, scales = tensors[key].float(), exponents[f"{key}_scale_inv"]
        rows, columns = codes.shape
        scales = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        assert torch.equal(found.get_submodule(key.removesuffix(".weight")).dense(), codes * scales)


# -- rules for single modules ------------------------------------------------------------------------------------------


def kinds(settings, *names):
    """Bits by the name of a module, 0 where its weight is plain; all of them inside of decoder layers."""
    found, linear = format_of(settings), torch.nn.Linear(64, 64)
    schemes = [found.scheme(name, linear, True) for name in names]
    return [0 if each is None else getattr(each, "bits", 8) for each in schemes]


Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def test_rules_of_gptq():
    settings = gptq().settings
    assert kinds(settings, Q, UP, DOWN, "lm_head") == [4, 4, 4, 4]
    rules = {r"-:.*up_proj": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 64}, r".*q_proj": {"group_size": 64}}
    assert kinds(settings | {"dynamic": rules}, Q, UP, DOWN) == [4, 0, 8]
    found = format_of(settings | {"dynamic": rules})
    assert [found.scheme(name, torch.nn.Linear(64, 64), True).group for name in (Q, DOWN)] == [64, 64]
    listed = {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    assert kinds(settings | listed, Q, UP, DOWN) == [4, 4, 0]


def test_an_lm_head_is_packed_where_its_file_says_so():
    """It is in none of the decoder's layers."""

    def bits(**changes):
        found = format_of(gptq().settings | changes).scheme("lm_head", torch.nn.Linear(64, 64), False)
        return None if found is None else found.bits

    assert bits() is None
    assert bits(lm_head=True, modules_in_block_to_quantize=[["self_attn.q_proj"]]) == 4
    assert bits(lm_head=True, dynamic={"lm_head": {"bits": 8}}) == 8
    assert bits(lm_head=True, dynamic={"-:lm_head": {}}) is None


def test_rules_of_awq_and_fp8():
    assert kinds(awq().settings | {"modules_to_not_convert": ["up_proj"]}, Q, UP, DOWN) == [4, 0, 4]
    assert kinds(fp8().settings | {"modules_to_not_convert": [Q]}, Q, UP, "lm_head") == [0, 8, 0]
    assert kinds(fp8().settings | {"ignored_layers": ["model.layers.1"]}, Q, DOWN) == [8, 0]


def test_groups_of_compressed_tensors():
    settings = compressed().settings
    eight = compressed(8, 64).settings["config_groups"]["group_0"]
    four = settings["config_groups"]["group_0"]
    both = {"config_groups": {"a": four, "b": eight | {"targets": ["re:.*down_proj$", Q]}}}
    assert kinds(settings | both, Q, UP, DOWN, "lm_head") == [8, 4, 8, 0]
    assert kinds(settings | both | {"ignore": ["re:.*layers\\.1.*", UP]}, Q, UP, DOWN) == [8, 0, 0]
    assert "4 bits in groups of 32 and 8 bits in groups of 64" in format_of(settings | both).name
    ordered = [changed(settings, actorder=word) for word in ("group", "dynamic", "weight", "static", None)]
    schemes = [format_of(each).scheme(Q, torch.nn.Linear(64, 64), True) for each in ordered]
    assert [each.act_order for each in schemes] == [True, True, False, False, False]
    only = {"config_groups": {"a": four | {"targets": ["re:.*up_proj"]}}}
    assert kinds(settings | only, Q, UP) == [0, 4]


def test_what_is_not_done_is_said():
    assert format_of(LAYOUTS["w4a16"].settings).notes == []
    assert "8 bits" in format_of(LAYOUTS["w8a8"].settings).notes[0]
    cached = LAYOUTS["w4a16"].settings | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert "cached as they are" in format_of(cached).notes[0]


def changed(settings, **changes):
    """Of compressed-tensors: the settings with others in their weights."""
    group = settings["config_groups"]["group_0"]
    return settings | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


CT = compressed().settings
REFUSED = {
    "bits": (gptq().settings | {"bits": 3}, "bits is 3, and 4 or 8"),
    "no bits": ({"quant_method": "gptq"}, "odd .*bits"),
    "group": (gptq().settings | {"group_size": 1024}, "group_size is 1024"),
    "marlin": (gptq().settings | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "a rule": (gptq().settings | {"dynamic": {".*": {"bits": 2}}}, "bits is 2"),
    "gemv": (awq().settings | {"version": "GEMV"}, "version is 'gemv'"),
    "awq bits": (awq().settings | {"bits": 8}, "bits is 8"),
    "status": (CT | {"quantization_status": "frozen"}, "frozen"),
    "sparse": (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    "transform": (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "format": (CT | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4"),
    "ct bits": (changed(CT, num_bits=2), "num_bits is 2"),
    "ct group": (changed(CT, group_size=16), "group_size is 16"),
    "strategy": (changed(CT, strategy="tensor_group"), "by tensor_group"),
    "ct floats": (changed(CT, type="float"), "num_bits of floats is 4"),
    "blocks": (fp8().settings | {"weight_block_size": [128, 512]}, "weight_block_size"),
    "embeddings": (fp8().settings | {"modules_to_convert": ["embed"]}, "modules_to_convert"),
    "other": ({"quant_method": "aqlm"}, "'aqlm', and gptq, awq"),
    "nothing": ({}, "None"),
    "numbers": (fp8().settings | {"weight_block_size": 128}, "odd .*TypeError"),
    "awq names": (awq().settings | {"modules_to_not_convert": "lm_head"}, "'lm_head', and a list of names"),
    "fp8 names": (fp8().settings | {"ignored_layers": {"lm_head": 1}}, "ignored_layers is .* a list of names"),
    "ct names": (CT | {"ignore": [5]}, r"ignore is \[5\], and a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_has_a_reason(case):
    settings, reason = REFUSED[case]
    with pytest.raises(Unreadable, match=reason):
        format_of(settings)


RULES = {
    "gptq": gptq().settings | {"dynamic": {"-:[": {}}},
    "awq": awq().settings | {"modules_to_not_convert": ["["]},
    "fp8": fp8().settings | {"modules_to_not_convert": ["["]},
    "ct": CT | {"ignore": ["re:["]},
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_are_no_patterns_have_a_reason(case):
    with pytest.raises(Unreadable, match="no pattern"):
        make_room(make("llama", num_hidden_layers=1), format_of(RULES[case]))


LIES = {
    "fp8 said to be whole": (compressed_fp8(), changed(compressed(8, -1, packed=False).settings), "weight", None),
    "whole said to be fp8": (compressed(8, -1, packed=False), compressed_fp8().settings, "weight", None),
    "e5m2": (fp8(), fp8().settings, "weight", torch.float8_e5m2),
    "scales in bytes": (fp8(), fp8().settings, "weight_scale_inv", torch.uint8),
    "words as floats": (gptq(), gptq().settings, "qweight", torch.float32),
    "scales as whole numbers": (awq(), awq().settings, "scales", torch.int32),
}


@pytest.mark.parametrize("case", LIES)
def test_numbers_of_another_kind_than_the_config_says_are_refused(case, model, tmp_path):
    """transformers would turn the ones into the others, which are something else."""
    layout, settings, end, dtype = LIES[case]
    write_quantized(model, tmp_path, layout, **settings)
    if dtype is not None:
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        for name in [each for each in tensors if each.endswith(f"up_proj.{end}")]:
            tensors[name] = tensors[name].float().to(dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{end} is of \w+ in its file, and by its config.json of \w+"):
        load(tmp_path)


@pytest.mark.parametrize("groups", [[0] * 40 + [1] * 24, [0, 1] * 30 + [0] * 4])
def test_groups_of_other_sizes_are_damage(groups):
    linear = torch.nn.Linear(64, 16, bias=False)
    written = gptq().write(linear.weight.detach())
    layer = ArrivingLinear(linear, format_of(gptq().settings).scheme("", linear, True))
    tensors = written.tensors | {"g_idx": torch.tensor(groups, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"g_idx.* are not of 32 columns each"):
        fill(layer, tensors)


# -- weights rounded at load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
def test_clips_lessen_the_error(group):
    """Of every group, against the whole range; and no weight is further off than half a step or what was clipped."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(5))
    codes, scales = rounded_groups(weight, group)
    assert codes.max() <= 15
    groups = weight.unflatten(1, (-1, group))
    error = ((codes.unflatten(1, (-1, group)).float() - 8) * scales[..., None] - groups).square().sum(-1)
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().sum(-1)
    assert error.sum() < 0.95 * plain.sum()
    whole = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    unclipped = ((groups / whole).round().clamp(-8, 7) * whole - groups).square().sum(-1)
    assert (error <= unclipped).all()


def test_zeros_stay_zeros():
    weight = torch.zeros(4, 64)
    weight[1, :32] = torch.linspace(-1, 1, 32)
    codes, scales = rounded_groups(weight, 32)
    dense = (codes.unflatten(1, (-1, 32)).float() - 8) * scales[..., None]
    assert dense.isfinite().all()
    assert torch.equal(dense.flatten(1)[[0, 2, 3]], torch.zeros(3, 64))
    assert torch.equal(dense[1, 1], torch.zeros(32))


def test_packed_layers_unpack_to_what_they_are(model, tmp_path):
    write_quantized(model, tmp_path, LAYOUTS["gptq_act_order"])
    layer = load(tmp_path)[0].model.layers[0].mlp.down_proj
    assert layer.packed.order is not None
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ unpack(layer.packed, torch.float32).T, atol=1e-5)
