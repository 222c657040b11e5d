"""What a twin computes is held against what the user's model computes, before anything is decoded."""

import warnings

import pytest
import torch
from decoders import decoder, prompt, rebuilt, stock
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama
from zoo import FAMILIES, make

from eagle_fast import EaModel
from eagle_fast.layers.slab import KVSlab
from eagle_fast.target import Target, UnsupportedModel
from eagle_fast.target import target as target_module
from eagle_fast.target.check import check_target
from eagle_fast.target.fused import FusedLayer
from eagle_fast.target.interface import LayerBinding
from eagle_fast.target.rehearsal import DEEP

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass(name, dtype, device):
    check_target(Target(make(name).to(device, dtype), (2,)))


def test_more_nodes_change_nothing(device):
    target = Target(make("gemma3_text").to(device), (2,))
    for nodes in (1, 60, 500):
        check_target(target, nodes)


def test_the_model_is_left_as_it_was(device):
    model = make("qwen3").to(device).train()
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    target = Target(model, (2,))
    check_target(target)
    assert target.is_current()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


# -- hooks and code that no tree can run ------------------------------------------------------------------------------


def decoded_rows_only(module, args, output):
    return output if output.shape[1] > 1 else output * 1.1


def prompts_only(module, args, output):
    return output * 1.1 if output.shape[1] > 1 else output


def last_row(module, args, output):
    return torch.cat([output[:, :-1], 1.1 * output[:, -1:]], 1)


def mean_of_rows(module, args, output):
    return output + output.mean(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("hook", [decoded_rows_only, prompts_only, last_row, mean_of_rows], ids=lambda f: f.__name__)
def test_hooks_that_look_at_the_rows_are_refused(hook, dtype, device):
    model = make("llama").to(device, dtype)
    model.model.layers[3].mlp.register_forward_hook(hook)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.3 \(LlamaDecoderLayer\) computes something else"):
        check_target(Target(model, (2,)))


def test_such_a_hook_is_refused_when_it_comes_later(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    handle = model.base_model.model.layers[2].register_forward_hook(last_row)
    with pytest.raises(UnsupportedModel, match=r"layers\.2 "):
        model.eagenerate(ids, max_new_tokens=4)
    handle.remove()
    assert torch.equal(model.eagenerate(ids, max_new_tokens=4), stock(model, ids, max_new_tokens=4))


def test_a_hook_that_every_row_can_run_is_not_refused(device):
    model = make("llama").to(device)
    model.model.layers[3].mlp.register_forward_hook(lambda module, args, output: 1.1 * output)
    check_target(Target(model, (2,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_an_attention_function_of_the_users_is_refused(dtype, device):
    def cooler(module, query, key, value, mask, scaling, **options):
        return modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling * 0.8, **options)

    AttentionInterface.register("cooler", cooler)
    model = make("llama").to(device, dtype)
    model.set_attn_implementation("cooler")
    with pytest.raises(UnsupportedModel, match=r"layers\.0 .* attention function"):
        check_target(Target(model, (2,)))


# -- code that stock layers run: nothing is fused then ----------------------------------------------------------------


def test_a_patched_class_is_followed(device, monkeypatch):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x).abs())
    expected = stock(model, ids, max_new_tokens=20)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=20), expected)
    assert not any(isinstance(layer, FusedLayer) for layer in model.target.decoder_layers)
    monkeypatch.undo()
    assert torch.equal(model.eagenerate(ids, max_new_tokens=20), stock(model, ids, max_new_tokens=20))
    assert all(isinstance(layer, FusedLayer) for layer in model.target.decoder_layers)


def test_a_patched_function_is_found(device, monkeypatch):
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: rotate(1.3 * q, k, *rest))
    with pytest.warns(UserWarning, match=r"not fused, which is slower: model\.layers\.0 "):
        model = rebuilt(decoder("llama", device))
    ids = prompt(11, device)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=20), stock(model, ids, max_new_tokens=20))


def test_hooks_of_all_modules_are_followed(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)

    def colder(module, args, output):
        return 0.7 * output if type(module).__name__ == "LlamaMLP" else None

    handle = torch.nn.modules.module.register_module_forward_hook(colder)
    try:
        expected = stock(model, ids, max_new_tokens=20)
        assert torch.equal(model.eagenerate(ids, max_new_tokens=20), expected)
    finally:
        handle.remove()
    other = stock(model, ids, max_new_tokens=20)
    assert not torch.equal(other, expected)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=20), other)


# -- hooks that change the model --------------------------------------------------------------------------------------


def test_a_hook_that_prepares_the_first_forward_runs_on_the_model(device):
    """As compressed-tensors' does, which unpacks the weights and takes itself off."""
    ids = prompt(11, device)
    plain = decoder("llama", device)

    def packed(model):
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data.mul_(2)

        def unpack(module, args, kwargs):
            weight.data.div_(2)
            handle.remove()

        handle = model.register_forward_pre_hook(unpack, with_kwargs=True)

    model = rebuilt(plain, packed)
    assert not model.base_model._forward_pre_hooks
    expected = stock(plain, ids, max_new_tokens=20)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=20), expected)
    assert torch.equal(stock(model, ids, max_new_tokens=20), expected)


def test_a_hook_that_goes_on_changing_the_model_is_refused(device):
    model = make("llama").to(device)

    def renew(module, args):
        module.weight = nn.Parameter(module.weight.detach().clone())

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(renew)
    with pytest.raises(UnsupportedModel, match="a hook changes the model on every forward"):
        Target(model, (2,))


# -- faults of our own ------------------------------------------------------------------------------------------------


def long_window():
    return make("mistral", sliding_window=4096)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_is_found(off, dtype, device, monkeypatch):
    target = Target(make("mistral", sliding_window=4096).to(device, dtype), (2,))
    check_target(target)
    for layer, binding in zip(target.decoder_layers, target.bindings, strict=True):
        assert binding.window == 4096
        layer.binding = LayerBinding(binding.context, binding.window + off)
    with pytest.raises(UnsupportedModel, match=f"at position {str(DEEP)[:2]}"):
        check_target(target)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_missing_temperature_is_found(dtype, device, monkeypatch):
    """Llama 4's own: queries beyond position 8192 are 0.1 * log(2) larger."""
    settings = dict(floor_scale=8192, attn_scale=0.1, attn_temperature_tuning=True)
    check_target(Target(make("llama4_temperature", **settings).to(device, dtype), (2,)))
    monkeypatch.setattr(target_module, "take_temperature", lambda module: setattr(module, "attn_temperature_tuning", 0))
    with pytest.raises(UnsupportedModel, match=f"at position {str(DEEP)[:2]}"):
        check_target(Target(make("llama4_temperature", **settings).to(device, dtype), (2,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_switch_of_frequencies_not_made_is_found(dtype, device, monkeypatch):
    target = Target(make("phi3_longrope").to(device), (2,))
    target.choose_frequencies = lambda cache, lengths: None
    with pytest.raises(UnsupportedModel, match=f"in a prompt at position {str(DEEP)[:2]}"):
        check_target(target)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_compaction_that_does_nothing_is_found(dtype, device, monkeypatch):
    target = Target(make("llama").to(device, dtype), (2,))
    monkeypatch.setattr(KVSlab, "compact", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="in a tree after a compaction"):
        check_target(target)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_tree_that_sees_a_sibling_is_found(dtype, device):
    target = Target(make("llama").to(device, dtype), (2,))
    verify = target.verify

    def sees_all(tokens, step, cache):
        step.ancestors[:, 1:] |= 0b111
        return verify(tokens, step, cache)

    target.verify = sees_all
    with pytest.raises(UnsupportedModel, match=r"layers\.0 .* in a tree at position"):
        check_target(target)


# -- compiled targets, and autocast -----------------------------------------------------------------------------------


def whole(model):
    return torch.compile(model)


def in_place(model):
    model.compile()
    return model


def its_forward(model):
    model.forward = torch.compile(model.forward)
    return model


def its_layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


def an_mlp_in_place(model):
    model.model.layers[2].mlp.compile()
    return model


def never(*_):
    raise AssertionError("nothing is compiled for a load or a call of ours")


@pytest.mark.parametrize(
    "compile_it", [whole, in_place, its_forward, its_layers, an_mlp_in_place], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_targets_are_decoded_uncompiled(name, compile_it, device, monkeypatch):
    plain, ids = decoder(name, device), prompt(11, device)
    expected = stock(plain, ids, max_new_tokens=20)
    monkeypatch.setattr(torch, "compile", torch._dynamo.optimize(never))
    model = rebuilt(plain)
    model = EaModel(compile_it(model.base_model), plain.ea_layer, tree=plain.tree)
    for method in (model.eagenerate, model.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=20), expected)
    fused = [isinstance(layer, FusedLayer) for layer in model.target.decoder_layers]
    assert all(fused) if name == "llama" else not any(fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_apply(dtype, device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    expected = stock(model, ids, max_new_tokens=20)
    with torch.autocast(device.type, dtype):
        with pytest.warns(UserWarning, match=r"torch\.autocast is on and does not apply"):
            assert torch.equal(model.eagenerate(ids, max_new_tokens=20), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = list(model.ea_generate(ids, max_new_tokens=20))
            fresh = rebuilt(decoder("llama", device))
        assert torch.is_autocast_enabled(device.type), "it is the caller's again between rounds"
        assert torch.equal(steps[-1], expected)
    assert torch.equal(fresh.eagenerate(ids, max_new_tokens=20), expected)


# -- what else is followed --------------------------------------------------------------------------------------------


def another_rotary(model):
    inv_freq = model.model.rotary_emb.inv_freq
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb.inv_freq = inv_freq * 0.5


def rotary_edited_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def a_hook_on_the_rotary(model):
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: (output[0] * 0.9, output[1] * 0.9))


def an_activation(model):
    model.model.layers[2].mlp.act_fn = nn.ReLU()


def a_scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 2.0


@pytest.mark.parametrize(
    "change",
    [another_rotary, rotary_edited_in_place, a_hook_on_the_rotary, an_activation, a_scale],
    ids=lambda f: f.__name__,
)
def test_odd_changes_are_followed(change, device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    before = model.eagenerate(ids, max_new_tokens=30)
    change(model.base_model)
    expected = stock(model, ids, max_new_tokens=30)
    assert not torch.equal(expected, before), "the change does not show"
    assert torch.equal(model.eagenerate(ids, max_new_tokens=30), expected)


def test_a_config_that_changes_is_followed(device):
    model, ids = rebuilt(decoder("gemma2", device)), prompt(11, device)
    model.base_model.set_attn_implementation("eager")
    before = stock(model, ids, max_new_tokens=30)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=30), before)
    model.base_model.config.final_logit_softcapping = 0.5
    model.base_model.config.attn_logit_softcapping = 0.2
    expected = stock(model, ids, max_new_tokens=30)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=30), expected)


def test_hunyuan_with_alpha_is_exact(device):
    model, ids = decoder("hunyuan_alpha", device), prompt(11, device)
    for method in (model.eagenerate, model.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=40), stock(model, ids, max_new_tokens=40))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_rows_that_a_rounding_sends_to_another_expert_are_no_fault(name, seed, device):
    model = make(name, seed=seed, sharp=False, num_experts=32, num_local_experts=32, num_experts_per_tok=4)
    check_target(Target(model.to(device, torch.bfloat16), (2,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_fault_in_a_model_of_experts_is_found(dtype, device, monkeypatch):
    target = Target(make("qwen3_moe").to(device, dtype), (2,))
    monkeypatch.setattr(KVSlab, "compact", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="in a tree after a compaction"):
        check_target(target)


@pytest.mark.parametrize(("name", "sharper"), [("llama", 40), ("mistral", 16), ("mistral", 20), ("mistral", 32)])
def test_layers_that_make_much_of_a_rounding_are_no_fault(name, sharper):
    """Attention to one key or another, as the last bit has it."""
    model = make(name)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= sharper
        layer.self_attn.v_proj.weight.data *= 4
    check_target(Target(model.bfloat16(), (2,)))
