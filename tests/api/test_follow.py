"""The target is base_model as it is at the moment of a call: hooks, own forwards, adapters, modules and weights."""

import copy

import pytest
import torch
from decoders import decoder, prompt, rebuilt, stock
from torch import nn

from eagle_fast.target.fused import FusedLayer

NEW = 24
FAMILIES = ["llama", "qwen3", "gemma2"]  # fused, fused with norms of heads, stock layers


def steer(module, args, output):
    """Push hidden states along a direction."""
    hidden = output[0] if isinstance(output, tuple) else output
    pushed = hidden + 0.5 * hidden.std(-1, keepdim=True) * torch.sin(
        torch.arange(hidden.shape[-1], device=hidden.device)
    )
    return (pushed, *output[1:]) if isinstance(output, tuple) else pushed


def on_a_layer(model):
    model.model.layers[3].register_forward_hook(steer)


def on_an_mlp(model):
    model.model.layers[2].mlp.register_forward_hook(steer)


def before_a_linear(model):
    model.model.layers[4].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].abs(),))


def on_the_last_norm(model):
    model.model.norm.register_forward_hook(steer)


def own_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x).abs()


def replaced_module(model):
    model.model.layers[2].mlp.down_proj = nn.Sequential(copy.deepcopy(model.model.layers[2].mlp.down_proj), nn.Tanh())


def replaced_weight(model):
    weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(-weight.detach().clone())


def weight_data(model):
    model.model.layers[1].mlp.gate_proj.weight.data = -model.model.layers[1].mlp.gate_proj.weight.data


def edited_in_place(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        model.model.layers[5].mlp.up_proj.weight.mul_(-1)


CHANGES = [on_a_layer, on_an_mlp, before_a_linear, on_the_last_norm, own_forward, replaced_module, replaced_weight]
CHANGES += [weight_data, edited_in_place]


def logits(model, ids):
    with torch.no_grad():
        return model.base_model(ids).logits


def check(model, ids):
    expected = stock(model, ids, max_new_tokens=NEW)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(model.naivegenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    return expected


@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_changed_before_is_part_of_the_target(name, change, device):
    plain, ids = decoder(name, device), prompt(11, device)
    changed = rebuilt(plain, change)
    assert not torch.allclose(logits(changed, ids), logits(plain, ids), atol=0.1), "the change does not show"
    check(changed, ids)


@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_changed_later_is_followed(name, change, device):
    model, ids = rebuilt(decoder(name, device)), prompt(11, device)
    check(model, ids)
    before = logits(model, ids)
    change(model.base_model)
    assert not torch.allclose(logits(model, ids), before, atol=0.1), "the change does not show"
    check(model, ids)


def test_what_is_taken_back_is_gone(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    before = check(model, ids)
    handle = model.base_model.model.layers[3].register_forward_hook(steer)
    check(model, ids)
    assert [isinstance(layer, FusedLayer) for layer in model.target.decoder.layers] == [True] * 3 + [False] + [True] * 2
    handle.remove()
    assert torch.equal(check(model, ids), before)
    assert all(isinstance(layer, FusedLayer) for layer in model.target.decoder.layers)


def test_merged_biases_are_followed(device):
    model, ids = rebuilt(decoder("qwen2", device)), prompt(11, device)
    check(model, ids)
    before = logits(model, ids)
    with torch.no_grad():
        for layer in model.base_model.model.layers:
            layer.self_attn.q_proj.bias.add_(3.0)
            layer.self_attn.k_proj.bias.data.mul_(-2.0)
    assert not torch.allclose(logits(model, ids), before, atol=0.1)
    check(model, ids)


@pytest.mark.parametrize("name", ["llama", "phi3_longrope", "gpt_oss", "mixtral", "opt"])
def test_a_model_that_nobody_changed_keeps_its_twin(name, device):
    """Also where stock code has run in between, which leaves marks on a model."""
    model, ids = rebuilt(decoder(name, device)), prompt(11, device)
    target, states = model.target, model.states
    model.eagenerate(ids, max_new_tokens=NEW)
    stock(model, ids, max_new_tokens=NEW)
    model.generate(ids, max_new_tokens=NEW, do_sample=False)
    model.base_model(prompt(80, device))
    model.base_model.train().eval()
    model.base_model(ids, output_hidden_states=True)
    model.eagenerate(ids, max_new_tokens=NEW)
    assert model.target is target
    assert model.states is states


def test_another_vocabulary_is_refused(device):
    model, ids = rebuilt(decoder("llama", device)), prompt(11, device)
    model.base_model.resize_token_embeddings(140)
    with pytest.raises(ValueError, match="vocabulary of 140 tokens now, and had 131"):
        model.eagenerate(ids, max_new_tokens=NEW)
