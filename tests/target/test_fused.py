"""Fused layers against the stock layers that they replace."""

import pytest
import torch
from trees import prefill
from zoo import make

from eagle_fast.target import Target
from eagle_fast.target.fused import FusedLayer

FUSED = ["llama", "llama3_rope", "mistral", "qwen2", "qwen2_sliding", "qwen3"]


def storage_bytes(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_computes_what_the_stock_layer_does(name, device):
    model = make(name).to(device)
    tokens = torch.randint(3, 130, (2, 19), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
    before = storage_bytes(model)
    target = Target(model, tuple(range(7)))
    assert all(isinstance(layer, FusedLayer) for layer in target.decoder.layers)
    *features, last = prefill(target, tokens, target.new_cache(2, 64)).chunk(7, -1)
    features.append(model.model.norm(last))  # of transformers the last hidden state is after the norm
    for ours, stock in zip(features, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5 * stock.abs().max().item())
    assert storage_bytes(model) == before, "merged weights must be the only copy"
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected.logits), "the user's model must compute what it did"


@pytest.mark.parametrize("change", ["mlp_bias", "attention_bias", "hidden_act"])
def test_what_a_fused_layer_lacks_stays_stock(change, device):
    settings = {"mlp_bias": {"mlp_bias": True}, "attention_bias": {"attention_bias": True}}
    model = make("llama", **settings.get(change, {"hidden_act": "gelu"})).to(device)
    target = Target(model, (2, 3, 3))
    assert not any(isinstance(layer, FusedLayer) for layer in target.decoder.layers)


@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm", "q_norm"])
def test_a_layer_with_a_norm_of_another_class_stays_stock(place, device):
    model = make("qwen3").to(device)
    layer = model.model.layers[2]
    owner = layer.self_attn if place == "q_norm" else layer
    norm = getattr(owner, place)
    norm.__class__ = type(
        "OffsetNorm", (type(norm),), {"forward": lambda self, x: 1 + super(type(self), self).forward(x)}
    )
    tokens = torch.randint(3, 130, (1, 19), generator=torch.Generator().manual_seed(1)).to(device)
    target = Target(model, (6,))
    assert [isinstance(each, FusedLayer) for each in target.decoder.layers] == [True, True, False, True, True, True]
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(target.read(tokens).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_second_target_shares_the_merged_weights(device):
    model = make("qwen3").to(device)
    first, second = Target(model, (2,)), Target(model, (3,))
    for one, other in zip(first.decoder.layers, second.decoder.layers, strict=True):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert one.gate_up.weight.data_ptr() == other.gate_up.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_half_precision_is_as_close_as_stock(name, dtype):
    """The error of five fused layers against fp32 is at most twice that of the stock layers."""
    tokens = torch.randint(3, 130, (1, 300), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        exact = make(name).cuda()(tokens, output_hidden_states=True).hidden_states[5]
        model = make(name).to(dtype).cuda()
        stock = (model(tokens, output_hidden_states=True).hidden_states[5] - exact).norm()
    target = Target(model, (5,))
    assert all(isinstance(layer, FusedLayer) for layer in target.decoder.layers)
    fused = (prefill(target, tokens, target.new_cache(1, 320)) - exact).norm()
    assert fused <= 2 * stock
