"""Reading draft heads: every format gives the right configuration, and what we cannot run is refused by name."""

import json
import warnings

import pytest
import torch
from draft_formats import FORMATS, sample
from draft_weights import DEFAULT_LAYERS, LAYERS, TARGET, VD, H, V, norm, plain_eagle3

import eagle_fast.head.files
from eagle_fast.head.checkpoint import read_head, write_head
from eagle_fast.head.config import HeadConfig, default_feature_layers, tensor_shapes


def read(made, folder, **arguments):
    return read_head(made.write(folder), **{**made.target, **made.arguments, **arguments})


@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_the_configuration(name, tmp_path):
    made = sample(name)
    truth = made.truth
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, tensors, ids = read(made, tmp_path)
    assert [str(w.message) for w in caught] == [] if made.warns is None else made.warns in str(caught[0].message)
    assert config.kind == ("eagle3" if truth.eagle3 else "eagle")
    assert config.feature_layers == (truth.features or ())
    assert config.uses_final_hidden == (truth.features is None)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (4, 2, 16, truth.layers)
    assert (config.rope["rope_theta"], config.rope["rope_type"]) == (truth.theta, "default")
    assert config.activation == truth.activation
    assert (config.rope_interleaved, config.rms_norm_eps) == (truth.interleaved, truth.eps)
    assert (config.norm_output, config.norm_before_residual) == (truth.norm_output, truth.norm_before_residual)
    assert config.draft_vocab_size == (V if truth.ids is None else VD)
    assert (None if ids is None else ids.tolist()) == truth.ids
    assert config.own_embedding == (truth.embedding is not None)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(config)
    for name, tensor in truth.weights.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", FORMATS)
def test_written_heads_read_the_same(name, tmp_path):
    first = read(sample(name), tmp_path / "theirs")
    write_head(tmp_path / "ours", first)
    second = read_head(tmp_path / "ours", **TARGET)
    assert second.config == first.config
    assert (first.token_ids is None and second.token_ids is None) or torch.equal(first.token_ids, second.token_ids)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_written_layout_is_safeailabs(tmp_path):
    made = plain_eagle3()
    write_head(tmp_path / "ours", read(made, tmp_path / "theirs"))
    written = eagle_fast.head.files.read_tensors(tmp_path / "ours")
    assert written.keys() == made.tensors.keys()
    assert written["d2t"].dtype == torch.int64
    assert written["t2d"].dtype == torch.bool
    assert all(torch.equal(written[key], made.tensors[key]) for key in written)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == list(DEFAULT_LAYERS)
    assert config["draft_vocab_size"] == VD
    assert config["rope_theta"] == 10000.0


# -- feature layers


@pytest.mark.parametrize(
    ("config", "argument", "layers"),
    [
        ({}, None, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, None, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}}, None, (2, 6, 9)),  # output of layer
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}, None, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 6, 9]}}, None, (2, 6, 9)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [6, 9, 12]}}, None, (6, 9, 12)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}}, (1, 5, 8), (1, 5, 8)),
        ({"eagle_config": {"feature_layers": [1, 5, 8]}}, None, (1, 5, 8)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "speculators_model_type": "eagle3"}, None, (1, 5, 8)),
    ],
)
def test_feature_layer_conventions(config, argument, layers, tmp_path):
    assert read(plain_eagle3(config=config), tmp_path, feature_layers=argument).config.feature_layers == layers


def test_default_feature_layers_repeat_in_tiny_targets():
    assert [default_feature_layers(n) for n in (32, 6, 5, 4, 2)] == [
        (2, 16, 29), (2, 3, 3), (2, 2, 2), (1, 2, 2), (0, 1, 2),
    ]  # fmt: skip


def test_a_list_that_begins_at_boundary_one_survives_writing(tmp_path):
    head = read(plain_eagle3(), tmp_path / "a", feature_layers=(1, 6, 9))
    write_head(tmp_path / "b", head)
    assert read_head(tmp_path / "b", **TARGET).config.feature_layers == (1, 6, 9)


@pytest.mark.parametrize(
    ("argument", "config", "message"),
    [
        ((2, 6), {}, r"144 columns, 3 times .* 48, but the feature layers are \[2, 6\]"),
        ((2, 6, 13), {}, r"\[13\] outside 0..12"),
        (None, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [24, 30, 36]}}, r"\[24, 30, 36\] outside 0..12"),
        (None, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8, 11]}}, "3 times"),
    ],
)
def test_wrong_feature_layers(argument, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(plain_eagle3(config=config), tmp_path, feature_layers=argument)


# -- arguments and config


def test_arguments_go_before_the_config(tmp_path):
    made = plain_eagle3(config=dict(rope_theta=5e5, norm_before_residual=True))
    given = dict(rope_theta=1e6, norm_before_residual=False, norm_output=True, rope_interleaved=True)
    config = read(made, tmp_path, **given).config
    assert config.rope["rope_theta"] == 1e6
    assert config.rope_interleaved
    assert config.norm_output
    assert not config.norm_before_residual


@pytest.mark.parametrize("name", ["safeailab_eagle1", "safeailab_eagle3"])
def test_use_eagle3_and_the_weights(name, tmp_path):
    """True needs them; False, which scripts say whose flag was left out, is told of and does not hold."""
    eagle3 = name.endswith("3")
    kind = "eagle3" if eagle3 else "eagle"
    assert read(sample(name), tmp_path, use_eagle3=eagle3).config.kind == kind
    if eagle3:
        with pytest.warns(UserWarning, match="use_eagle3=False, but the weights are an EAGLE-3 head"):
            assert read(sample(name), tmp_path, use_eagle3=False).config.kind == kind
    else:
        with pytest.raises(ValueError, match="use_eagle3=True: leave use_eagle3 out"):
            read(sample(name), tmp_path, use_eagle3=True)


def test_norm_output_of_an_unknown_trainer_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="pass norm_output=False"):
        assert read(plain_eagle3(config=dict(norm_output=True)), tmp_path).config.norm_output


def test_weights_overrule_the_config_with_one_warning(tmp_path):
    wrong = dict(hidden_size=50, intermediate_size=7, num_key_value_heads=4, num_hidden_layers=32, draft_vocab_size=9)
    with pytest.warns(UserWarning, match="the weights win") as caught:
        config = read(plain_eagle3(config=wrong), tmp_path).config
    assert len(caught) == 1
    assert all(f"{key} {value} ->" in str(caught[0].message) for key, value in wrong.items())
    assert (config.hidden_size, config.num_kv_heads, config.draft_vocab_size) == (H, 2, VD)


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("num_heads", [None, 3, 8])  # unknown, does not divide, divides but contradicts the key heads
def test_head_size_from_whatever_fits_the_weights(num_heads, tmp_path):
    made = plain_eagle3(config=dict(num_attention_heads=num_heads, head_dim=16))
    assert read(made, tmp_path).config.head_dim == 16


def test_a_bare_sliding_window_is_the_targets(tmp_path):
    assert read(plain_eagle3(config=dict(sliding_window=4096)), tmp_path).config.sliding_window == 0
    made = plain_eagle3(config=dict(sliding_window=7, layer_types=["sliding_attention"]))
    assert read(made, tmp_path).config.sliding_window == 7


def test_eagle1_embedding_for_padding_rows_is_cut(tmp_path):
    made = sample("safeailab_eagle1")
    made.tensors["embed_tokens.weight"] = torch.randn(V + 3, H)
    assert read(made, tmp_path).tensors["embed_tokens.weight"].shape == (V, H)


# -- refusals

REFUSED = {
    "mla": ({"midlayer.self_attn.kv_a_proj_with_mqa.weight": norm(3)}, {}, "MLA"),
    "p-eagle": ({"mask_hidden": norm(3)}, {}, "P-EAGLE"),
    "p-eagle by config": ({}, {"parallel_drafting": True}, "P-EAGLE.*parallel_drafting"),
    "peagle speculators": ({}, {"speculators_model_type": "peagle"}, "peagle draft"),
    "parallel heads": ({"parallel_draft_heads.0.medusa_layers.0.linear.weight": norm(3)}, {}, "parallel"),
    "parallel steps": ({}, {"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step"),
    "medusa": ({"medusa_heads.0.0.linear.weight": norm(3)}, {}, "Medusa"),
    "eh_proj": ({"eh_proj.weight": norm(3)}, {}, "eh_proj"),
    "eh_proj by config": ({}, {"eagle_config": {"eh_proj_before_attn": True}}, "eh_proj"),
    "fp8": ({"midlayer.mlp.up_proj.weight": torch.ones(80, 48).to(torch.float8_e4m3fn)}, {}, "quantized.*float8"),
    "scales": ({"midlayer.mlp.up_proj.weight_scale": norm(1)}, {}, "quantized.*weight_scale"),
    "moe": ({"midlayer.mlp.experts.0.up_proj.weight": norm(3)}, {}, "mixture-of-experts"),
    "dflash": ({}, {"dflash_config": {"x": 1}}, "dflash_config"),
    "layernorms": ({"embedding_layernorm.weight": norm(3)}, {}, "extra layer norms"),
    "every layer wide": ({}, {"eagle_config": {"next_layer_regular": False}}, "next_layer_regular"),
    "activation": ({}, {"hidden_act": "gelo"}, "hidden_act is 'gelo': supported are gelu, "),
    "activation with weights": ({}, {"hidden_act": "prelu"}, "hidden_act is 'prelu': supported are gelu, "),
    "rope": ({}, {"rope_scaling": {"rope_type": "spiral"}}, "rope_type 'spiral': supported are default"),
    "rope parameter": ({}, {"rope_scaling": {"type": "linear"}}, "'linear' without factor"),
    "rope per layer type": ({}, {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "per layer type"),
    "unknown key": ({"surprise.weight": norm(3)}, {}, "unknown surprise.weight"),
    "twice": ({"layers.0.hidden_norm.weight": norm(H)}, {}, "are the same tensor layers.0.hidden_norm.weight"),
    "missing key": ({"midlayer.hidden_norm.weight": None}, {}, "missing layers.0.hidden_norm.weight"),
    "missing projection": ({"midlayer.self_attn.q_proj.weight": None}, {}, "missing .*q_proj.*incomplete"),
    "missing fc": ({"fc.weight": None}, {}, "missing fc.weight"),
    "missing fc_norm": ({}, {"fc_norm": True}, "missing fc_norm.0.weight, fc_norm.1.weight"),
    "missing input_norm": ({}, {"norm_before_fc": True}, "missing input_norm.weight"),
    "wrong shape": ({"norm.weight": norm(7)}, {}, r"norm.weight is \[7\], expected \[48\]"),
    "no heads": ({}, {"num_attention_heads": 5}, "num_attention_heads=5 .* correct config.json"),
    "state": ({"optimizer": {}}, {}, "not a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    changes, config, message = REFUSED[name]
    made = plain_eagle3(config=config)
    made.tensors |= changes
    made.tensors = {key: tensor for key, tensor in made.tensors.items() if tensor is not None}
    made.storage = "bin" if name == "state" else "safetensors"
    made.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_head(tmp_path, **TARGET)


def test_a_plain_decoder_is_not_a_head(tmp_path):
    made = sample("safeailab_eagle1")
    del made.tensors["fc.weight"]
    with pytest.raises(ValueError, match=r"missing fc\.weight.*plain decoder"):
        read(made, tmp_path)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("safeailab_eagle3", dict(target_hidden_size=64), "embeddings 48 wide.*hidden size is 64"),
        ("other_hidden_size", dict(target_hidden_size=64), "144 columns, 2.25 times the target's hidden size 64"),
        ("other_hidden_size", dict(target_hidden_size=24), "144 columns, 6 times"),
        ("safeailab_eagle1", dict(target_hidden_size=40), "hidden size is 48, the target's 40"),
        ("eagle1_two_layers", dict(target_hidden_size=40), "embeddings 56 wide.*hidden size is 40"),
        ("safeailab_eagle3", dict(target_vocab_size=40), "the target, of 40 tokens, lacks \\d+ of the 23 that"),
        ("modelopt_2026", dict(target_vocab_size=50), "the target, of 50 tokens, lacks 11 of the 61 that the head"),
        ("safeailab_eagle1", dict(target_vocab_size=50), "lacks 11 of the 61 .* for this target; or, .*_size 50"),
    ],
)
def test_head_for_another_target(name, target, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(sample(name), tmp_path, **target)


def _maps(**changes):
    made = plain_eagle3(config=dict(vocab_size=V))
    for key, change in changes.items():
        if change is None:
            del made.tensors[key]
        else:
            made.tensors[key] = change(made.tensors[key])
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(d2t=lambda d: d + 50, t2d=None), r"token ids 5\d..1\d\d, the target has 61"),
        (dict(d2t=lambda d: d - 50, t2d=None), "token ids -50|token ids -4"),
        (dict(d2t=lambda d: 0 * d - torch.arange(VD), t2d=None), "same target token 22 times"),
        (dict(d2t=lambda d: d * 0), "d2t and t2d contradict each other"),
        (dict(d2t=lambda d: d[:-1], t2d=None), "lm_head.weight has 23 rows, but the draft vocabulary has 22"),
        (dict(d2t=None, t2d=None), "lm_head.weight has 23 rows, the target 61 tokens, and there is no d2t or t2d"),
        (dict(t2d=lambda t: t[:-30]), "d2t and t2d contradict each other"),
        (dict(d2t=None, t2d=lambda t: t & False), "t2d names no token"),
    ],
)
def test_damaged_vocabulary_maps(changes, message, tmp_path):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=message):
        read(_maps(**changes), tmp_path)


def test_config_refuses_what_does_not_hang_together():
    sizes = dict(
        hidden_size=H, target_hidden_size=H, embedding_size=H, intermediate_size=80, num_heads=4, num_kv_heads=2
    )
    sizes |= dict(head_dim=16, vocab_size=V, draft_vocab_size=VD, num_target_layers=LAYERS)
    assert HeadConfig(kind="eagle3", feature_layers=(2, 6, 9), **sizes).feature_size == 3 * H
    assert HeadConfig.eagle1(**sizes).feature_size == H
    for wrong in (
        dict(feature_layers=()),
        dict(feature_layers=(2, 6, 13)),
        dict(uses_final_hidden=True),
        dict(num_kv_heads=3),
        dict(norm_output=True, final_norm=False),
        dict(norm_before_fc=True, fc_norm=True),
        dict(has_fc=False),
        dict(sliding_windows=(4, 4)),
        dict(kind="medusa"),
        dict(kind="eagle"),
    ):
        with pytest.raises(ValueError, match=r"\w+"):
            HeadConfig(**{"kind": "eagle3", "feature_layers": (2, 6, 9), **sizes, **wrong})
