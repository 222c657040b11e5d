"""Rarer things that users do to a model, before and after an EaModel is made of it: the text is the model's own."""

import copy

import pytest
import torch
from decoders import decoder, prompt, rebuilt, stock
from torch import nn
from torch.nn.utils import parametrize
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from eagle_fast import EaModel
from eagle_fast.target import UnsupportedModel

NEW = 20
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores", "ignore:layers are not fused")


class Negative(nn.Module):
    def forward(self, value):
        return -value


def parametrized(model, _):
    parametrize.register_parametrization(model.model.layers[2].mlp.down_proj, "weight", Negative())


def another_call(model, _):
    mlp = model.model.layers[2].mlp
    mlp.__class__ = type("Louder", (type(mlp),), {"__call__": lambda self, x: -nn.Module.__call__(self, x)})


def an_attribute_of_the_whole(model, _):
    model.logit_scale = -model.logit_scale


def a_function(model, monkeypatch):
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: rotate(1.5 * q, k, *rest))


def every_product(model, monkeypatch):
    product = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: product(self, x).clamp(-1.5, 1.5))


def fewer_layers(model, _):
    del model.model.layers[5]
    model.config.num_hidden_layers = 5


def double(model, _):
    model.double()


def made_in_inference_mode(model, _):
    with torch.inference_mode():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.clone(), requires_grad=False))


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", parametrized),
        ("llama", another_call),
        ("cohere", an_attribute_of_the_whole),
        ("llama", a_function),
        ("llama", every_product),
        ("gemma2", fewer_layers),
        ("llama", double),
        ("llama", made_in_inference_mode),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_the_text_is_the_models_own(name, change, later, device, monkeypatch):
    if change is double and device.type == "cuda":
        pytest.skip("kernels take no float64, which is refused")
    plain, ids = decoder(name, device), prompt(11, device)
    if later:
        model = rebuilt(plain)
        model.eagenerate(ids, max_new_tokens=4)
        change(model.base_model, monkeypatch)
    else:
        model = rebuilt(plain, lambda base: change(base, monkeypatch))
    expected = stock(model, ids, max_new_tokens=NEW)
    for method in (model.eagenerate, model.naivegenerate):
        assert torch.equal(method(ids, max_new_tokens=NEW), expected)


def test_an_object_that_a_forward_reads_is_followed(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    mlp = model.base_model.model.layers[2].mlp
    mlp.direction = torch.ones((), device=device)
    mlp.register_forward_hook(lambda module, args, output: output * module.direction)
    for direction in (1.0, -3.0, 0.0):
        mlp.direction = torch.full((), direction, device=device)
        expected = stock(model, ids, max_new_tokens=NEW)
        assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)


def test_hooks_that_keep_what_they_saw_change_nothing(device):
    base = copy.deepcopy(decoder("llama", device).base_model)
    layer = base.model.layers[1]
    layer.calls = 0

    def keep(module, args, output):
        module.kept = layer.seen = output
        layer.calls += 1

    layer.register_forward_hook(keep)
    plain, ids = decoder("llama", device), prompt(11, device)
    model = EaModel(base, plain.ea_layer, tree=plain.tree)
    target = model.target
    for _ in range(2):
        expected = stock(model, ids, max_new_tokens=NEW)
        assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
    assert model.target is target


def test_weights_that_several_layers_share_are_edited_as_one(device):
    def share(base):
        layers, attention = base.model.layers, base.model.layers[1].self_attn
        layers[4].mlp.gate_proj.weight = layers[2].mlp.gate_proj.weight
        attention.v_proj.weight = attention.k_proj.weight

    model, ids = rebuilt(decoder("llama", device), share), prompt(11, device)
    before = model.eagenerate(ids, max_new_tokens=NEW)
    with torch.no_grad():
        model.base_model.model.layers[2].mlp.gate_proj.weight.mul_(-3)
        model.base_model.model.layers[1].self_attn.k_proj.weight.mul_(-3)
    expected = stock(model, ids, max_new_tokens=NEW)
    assert not torch.equal(expected, before), "the edit does not show"
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)


def test_another_attention_function_under_the_same_name_is_seen(device, monkeypatch):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    model.eagenerate(ids, max_new_tokens=4)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def colder(module, query, *rest, **options):
        return sdpa(module, 2 * query, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", colder)
    with pytest.raises(UnsupportedModel, match=r"layers\.0 .* attention function"):
        model.eagenerate(ids, max_new_tokens=4)


def test_layers_without_a_kind_are_refused(device):
    model, ids = rebuilt(decoder("mistral", device)), prompt(11, device)
    model.base_model.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UnsupportedModel, match="kinds of 4 layers"):
        model.eagenerate(ids, max_new_tokens=4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_is_refused(device):
    if device.type != "cpu":
        pytest.skip("it is there on the CPU only")
    plain = decoder("llama", device)
    base = torch.ao.quantization.quantize_dynamic(plain.base_model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModel, match=r"lm_head .* has no plain weight"):
        EaModel(base, plain.ea_layer, tree=plain.tree)
