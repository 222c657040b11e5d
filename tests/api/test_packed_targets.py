"""Packed targets: the text with the head, without it and of base_model is one, in every layout and family."""

import json

import pytest
import torch
from decoders import prompt
from often_right import write_often_right_head
from one_text import CPU, NEW, check_one_text, kinds_of_layers, load
from quantized_files import LAYOUTS, fp8, gptq, write_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from zoo import make

from eagle_fast.layers.linear import FewRowsLinear
from eagle_fast.layers.packed import PackedLinear
from eagle_fast.loading import load_target
from eagle_fast.target import Target
from eagle_fast.target.merged import SideBySide
from eagle_fast.target.placement import model_bytes

FAMILIES = ("llama", "qwen2", "qwen3")  # plain, with biases, with norms of heads


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """name -> (model, folder of a head for it)."""
    found = {}
    for name in FAMILIES:
        model = make(name, num_hidden_layers=2)
        found[name] = model, write_often_right_head(model, tmp_path_factory.mktemp(name))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_text(layout, family, targets, tmp_path):
    model, head = targets[family]
    dense = write_quantized(model, tmp_path, LAYOUTS[layout])
    decoder, said = load(tmp_path, head)
    assert len(said) == 1
    assert "runs from its packed weights" in said[0]
    check_one_text(decoder)
    assert kinds_of_layers(decoder) == ["FusedLayer"] * 2
    for name, weight in dense.items():  # base_model's own are views of the merged ones
        layer = decoder.base_model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.dense(), weight), name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_rounded_at_load(family, bits, targets, tmp_path):
    model, head = targets[family]
    model.save_pretrained(tmp_path)
    decoder, said = load(tmp_path, head, target_bits=bits)
    assert len(said) == 1
    assert f"(rounded to {bits} bits at load) runs from its packed weights" in said[0]
    check_one_text(decoder)
    assert kinds_of_layers(decoder) == ["FusedLayer"] * 2
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            layer = decoder.base_model.get_submodule(name.removesuffix(".weight"))
            assert layer.kind == f"int{bits}"
            assert layer.group_size == {8: weight.shape[1], 4: 64 if weight.shape[1] % 64 == 0 else 32}[bits]
            error = (layer.dense() - weight).norm() / weight.norm()
            assert 0 < error < {8: 0.015, 4: 0.12}[bits], name
        else:
            assert torch.equal(decoder.base_model.state_dict()[name], weight)


# -- merged weights ----------------------------------------------------------------------------------------------------


def storage_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("layout", ["gptq_act_order", "awq", "fp8_blocks", "w8a16_bytes"])
def test_merged_words_are_the_only_copy(layout, targets, tmp_path):
    model, head = targets["qwen2"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    base = load(tmp_path, head)[0].base_model
    first, second = Target(base, (1,)), Target(base, (1,))
    held = {each.data_ptr() for each in (*base.parameters(), *base.buffers()) if each.numel()}
    for one, other in zip(first.decoder_layers, second.decoder_layers, strict=True):
        for name in ("qkv", "gate_up", "o", "down"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert type(ours) is PackedLinear
            assert ours.words.data_ptr() == theirs.words.data_ptr()
            assert ours.words.data_ptr() in held
            assert ours.scales.data_ptr() in held
    whole = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.buffers()}.values())
    parts = sum(each.num_bytes for each in base.modules() if isinstance(each, PackedLinear))
    orders = sum(each.columns.nbytes for each in base.modules() if getattr(each, "columns", None) is not None)
    assert whole <= parts + 4096
    assert whole >= parts - orders
    # a tensor that was a view keeps what it viewed, whatever its data is set to
    assert not [name for name, each in base.named_buffers() if each._base is not None and each.numel() > 64]


@pytest.mark.parametrize("layout", ["gptq_act_order", "awq", "fp8_blocks"])
def test_the_kernel_reads_views_as_it_does_merged_weights(layout, targets, tmp_path, monkeypatch):
    """base_model's own layers and the fused one, in 16 bits."""
    write_quantized(targets["qwen2"][0], tmp_path, LAYOUTS[layout])
    with pytest.warns(UserWarning, match="packed weights"):
        base = load_target(str(tmp_path), "cpu", {"dtype": torch.float16})
    fused = Target(base, (1,)).decoder_layers[0]
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "auto" if torch.cuda.is_available() else "triton")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half()
    attention, mlp = base.model.layers[0].self_attn, base.model.layers[0].mlp
    for whole, parts in (
        (fused.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (fused.gate_up, (mlp.gate_proj, mlp.up_proj)),
    ):
        torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), whole(x), rtol=1e-3, atol=1e-3)
        exact = [x.float() @ part.dense().float().T + (0 if part.bias is None else part.bias) for part in parts]
        torch.testing.assert_close(whole(x).float(), torch.cat(exact, -1), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["gptq", "gptq_act_order", "awq", "w4a16_row", "w8a16_bytes", "fp8_blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_on_a_gpu(layout, dtype, targets, tmp_path):
    model, head = targets["qwen2"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    decoder, _ = load(tmp_path, head, dtype=dtype, device_map="cuda")
    tensors = [*decoder.base_model.parameters(), *decoder.base_model.buffers()]
    assert {each.device.type for each in tensors} == {"cuda"}
    assert decoder.exactness == "bitwise", decoder.exactness.reason
    ids = prompt(11, CPU).cuda()
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        with_head, plain = (
            way(ids, max_new_tokens=NEW, **options) for way in (decoder.eagenerate, decoder.naivegenerate)
        )
        assert torch.equal(with_head, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4])
def test_memory_while_a_gpu_is_filled(bits, tmp_path):
    """What is packed, and what one layer more takes: never the plain weights, or the file's beside ours."""
    model = make("llama", sharp=False, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12)
    if bits is None:
        write_quantized(model, tmp_path, gptq(group=128), "bfloat16")
    else:
        model.bfloat16().save_pretrained(tmp_path)
    load_target(str(tmp_path), "cuda", {}, target_bits=bits)  # once, for what CUDA takes itself
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = load_target(str(tmp_path), "cuda", {}, target_bits=bits)
    layer = 1024 * 3072  # numbers of the largest weight; those at work take several of 4 bytes
    kept = torch.cuda.memory_allocated() - before
    assert kept < 1.1 * model_bytes(base)
    assert torch.cuda.max_memory_allocated() - before < kept + 60 * layer


def rewrite(folder, change):
    """Edit the tensors and the config of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(tensors, settings)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def replaced(model, layout, name):
    """For `rewrite`: one projection of every layer in another layout, or plain."""

    def change(tensors, settings):
        for key, weight in model.state_dict().items():
            if not key.endswith(f"{name}.weight"):
                continue
            stem = key.removesuffix("weight")
            for old in [each for each in tensors if each.startswith(stem) and not each.endswith("bias")]:
                del tensors[old]
            new = {"weight": weight.clone()} if layout is None else layout.write(weight).tensors
            tensors.update({f"{stem}{end}": part.contiguous() for end, part in new.items()})

    return change


@pytest.mark.parametrize(
    ("other", "rule"),
    [(None, {r"-:.*\.v_proj": {}}), (gptq(8, 64), {r"+:.*\.v_proj": {"bits": 8, "group_size": 64}}),
     (gptq(group=64), {r".*\.v_proj": {"group_size": 64}})],
    ids=["plain", "8 bits", "other groups"],
)  # fmt: skip
def test_weights_that_are_not_alike_stay_side_by_side(other, rule, targets, tmp_path):
    """In layers that are fused all the same."""
    model, head = targets["qwen2"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"], dynamic=rule)
    rewrite(tmp_path, replaced(model, other, "v_proj"))
    decoder, _ = load(tmp_path, head)
    layer = decoder.target.decoder_layers[0]
    assert type(layer).__name__ == "FusedLayer"
    assert type(layer.qkv) is SideBySide
    assert [type(each) for each in layer.qkv.linears[:2]] == [PackedLinear] * 2
    assert type(layer.qkv.linears[2]) is (FewRowsLinear if other is None else PackedLinear)
    assert type(layer.gate_up) is PackedLinear
    check_one_text(decoder)


def test_orders_that_differ_stay_side_by_side(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq_act_order"])

    def turn(tensors, settings):
        """Columns of up_proj the other way round in groups: as in a file whose layers were sorted one by one."""
        for key in [each for each in tensors if each.endswith("up_proj.g_idx")]:
            tensors[key] = tensors[key].flip(0).contiguous()

    rewrite(tmp_path, turn)
    decoder, _ = load(tmp_path, head)
    layer = decoder.target.decoder_layers[0]
    assert type(layer.gate_up) is SideBySide
    assert type(layer.qkv) is PackedLinear
    check_one_text(decoder)


# -- what is not packed here, and why ----------------------------------------------------------------------------------


def test_packed_tensors_of_plain_weights_are_refused(targets, tmp_path):
    """A config that leaves out what the file has packed."""
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["fp8_blocks"], modules_to_not_convert=["lm_head"])
    with_lm_head = fp8().write(model.lm_head.weight.detach()).tensors
    rewrite(tmp_path, lambda tensors, _: tensors.update({f"lm_head.{end}": part for end, part in with_lm_head.items()}))
    with pytest.raises(ValueError, match=r"packed tensors where .* plain weights: lm_head.weight_scale_inv"):
        load(tmp_path, head)


@pytest.mark.parametrize(
    "layout", ["gptq", "awq", "w4a16", "w8a16_bytes", "w8a8", "fp8_dynamic", "fp8_blocks", "fp8_auto"]
)
def test_packed_files_without_a_quantization_config_are_refused(layout, targets, tmp_path):
    """Some state it in a file of its own. Codes would be taken for weights, without their scales."""
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    rewrite(tmp_path, lambda _, settings: settings.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"packed tensors where its config.json speaks of plain weights"):
        load(tmp_path, head)


@pytest.mark.parametrize("options", [{}, {"target_bits": 4}, {"lm_head_bits": 8}])
def test_packed_models_are_not_saved(options, targets, tmp_path):
    model, head = targets["llama"]
    if options:
        model.save_pretrained(tmp_path)
    else:
        write_quantized(model, tmp_path, LAYOUTS["gptq"])
    decoder, _ = load(tmp_path, head, **options)
    with pytest.warns(UserWarning, match="keep the checkpoint"), pytest.raises(ValueError, match="not serializable"):
        decoder.base_model.save_pretrained(tmp_path / "saved")


def test_why_a_library_is_needed_is_said(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"], checkpoint_format="marlin")
    with pytest.raises(ValueError, match=r"(optimum|gptqmodel).* since its checkpoint_format is 'marlin'"):
        load(tmp_path, head)


def test_a_missing_part_is_named(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["awq"])
    rewrite(tmp_path, lambda tensors, _: tensors.pop("model.layers.1.mlp.up_proj.qzeros"))
    with pytest.raises(ValueError, match=r"lacks tensors .*model.layers.1.mlp.up_proj.qzeros"):
        load(tmp_path, head)


@pytest.mark.parametrize(("layout", "part"), [("gptq", "g_idx"), ("w4a16", "weight_shape")])
def test_a_missing_part_that_is_looked_into_is_named(layout, part, targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS[layout])
    rewrite(tmp_path, lambda tensors, _: tensors.pop(f"model.layers.1.mlp.up_proj.{part}"))
    with pytest.raises(ValueError, match=rf"{part}.* lacks"):
        load(tmp_path, head)


def test_other_shapes_are_refused(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["awq"], group_size=64)
    with pytest.raises(ValueError, match=r"other shapes than its config.json|config.json says"):
        load(tmp_path, head)


def test_stacked_experts_go_to_their_library(tmp_path, targets):
    """Without which nothing is loaded."""
    make("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda _, settings: settings.update(quantization_config=gptq().settings))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*(optimum|gptqmodel)"):
        load(tmp_path, targets["llama"][1])


BAD_BITS = {
    "number": (dict(target_bits=3), r"target_bits=3: use 8 or 4"),
    "bool": (dict(target_bits=True), r"target_bits=True: use 8 or 4"),
    "text": (dict(target_bits="4"), r"target_bits='4': use 8 or 4"),
    "beside": (dict(target_bits=4, load_in_4bit=True), r"target_bits=4 beside quantization_config"),
    "gguf": (dict(target_bits=4, gguf_file="m.gguf"), r"target_bits=4, but .* is quantized already"),
}


@pytest.mark.parametrize("case", BAD_BITS)
def test_bits_that_cannot_be(case, targets, tmp_path):
    model, head = targets["llama"]
    model.save_pretrained(tmp_path)
    options, message = BAD_BITS[case]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, head, **options)


def test_bits_of_models_that_cannot_be_rounded(targets, tmp_path):
    model, head = targets["llama"]
    with pytest.raises(ValueError, match=r"'target_bits'.* cannot change a model that is loaded already"):
        load(model, head, target_bits=4)
    write_quantized(model, tmp_path / "packed", LAYOUTS["awq"])
    with pytest.raises(ValueError, match=r"target_bits=8, but .* is quantized already"):
        load(tmp_path / "packed", head, target_bits=8)
    make("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"target_bits=4 is not possible for .*: its experts are stacked"):
        load(tmp_path / "experts", head, target_bits=4)
    make("llama", num_hidden_layers=2, intermediate_size=72).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has 72 inputs, which no group of 128, 64 or"):
        load(tmp_path / "odd", head, target_bits=4)
    assert load(tmp_path / "odd", head, target_bits=8)[0].base_model.model.layers[0].mlp.down_proj.kind == "int8"


# -- around it ---------------------------------------------------------------------------------------------------------


def test_options_beside_packed_weights(targets, tmp_path):
    """A dtype, and fields of the config, which transformers takes no longer where it is given a config."""
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"])
    decoder, _ = load(tmp_path, head, dtype=torch.bfloat16, max_position_embeddings=512)
    assert decoder.base_model.config.max_position_embeddings == 512
    assert decoder.base_model.dtype == torch.bfloat16
    assert decoder.base_model.model.layers[0].mlp.down_proj.dtype == torch.bfloat16
    given = AutoConfig.from_pretrained(tmp_path)
    decoder, _ = load(tmp_path, head, config=given)
    assert given.quantization_config["quant_method"] == "gptq"  # as it was
    check_one_text(decoder)


def test_packed_models_that_are_loaded_already(targets, tmp_path):
    model, head = targets["qwen3"]
    write_quantized(model, tmp_path, LAYOUTS["w4a16_zeros"])
    base = load(tmp_path, head)[0].base_model
    decoder, said = load(base, head)
    assert said == []
    check_one_text(decoder)


def test_other_families_run_packed_in_stock_layers(tmp_path):
    model = make("olmo2", num_hidden_layers=2)
    head = write_often_right_head(model, tmp_path / "head")
    write_quantized(model, tmp_path / "base", LAYOUTS["awq"])
    decoder, _ = load(tmp_path / "base", head)
    assert kinds_of_layers(decoder) == ["Olmo2DecoderLayer"] * 2
    assert type(decoder.target.decoder_layers[0].mlp.up_proj) is PackedLinear
    check_one_text(decoder)


def test_a_packed_layer_with_a_forward_of_its_own_stays(targets, tmp_path):
    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"])
    base = load(tmp_path, head)[0].base_model
    layer = base.model.layers[0].mlp.down_proj
    layer.forward = lambda rows: type(layer).forward(layer, rows) * 1.5
    decoder, _ = load(base, head)
    assert kinds_of_layers(decoder) == ["LlamaDecoderLayer", "FusedLayer"]
    check_one_text(decoder)


def test_off_the_gpus_is_refused(targets, tmp_path, monkeypatch):
    from eagle_fast import loading_target

    model, head = targets["llama"]
    write_quantized(model, tmp_path, LAYOUTS["gptq"])
    places = {"model.embed_tokens": torch.device("cuda", 0), "model.layers.0": torch.device("cpu")}
    monkeypatch.setattr(loading_target, "plan_placement", lambda *_: places)
    monkeypatch.setattr(loading_target, "_one_device", lambda *_: None)
    with pytest.raises(ValueError, match=r"leaves a part of 0.0 GiB of packed weights off the GPUs"):
        load(tmp_path, head, device_map="auto")
