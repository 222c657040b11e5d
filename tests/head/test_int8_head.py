"""Heads in int8: they compute with the weights that quantization left, change no text, and take half the memory."""

import copy

import pytest
import torch
from causal import CausalAttention
from decoders import TREE, decoder, prompt
from draft_weights import HEADS, KV_HEADS, MLP, VD, D, H, V

from eagle_fast import EaModel
from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig
from eagle_fast.layers.linear import QuantizedLinear
from eagle_fast.loading import runs_in_int8

SIZES = dict(
    hidden_size=H, target_hidden_size=H, embedding_size=H, intermediate_size=MLP, num_heads=HEADS,
    num_kv_heads=KV_HEADS, head_dim=D, vocab_size=V, num_target_layers=12,
)  # fmt: skip


def random_head(kind, device, dtype=torch.float32):
    """A head with everything that can be quantized: biases, and for EAGLE-1 the target's lm_head."""
    if kind == "eagle3":
        config = HeadConfig(
            kind=kind, draft_vocab_size=VD, feature_layers=(2, 6, 9), fc_bias=True, qkv_bias=True, **SIZES
        )
    else:
        config = HeadConfig.eagle1(draft_vocab_size=V, fc_bias=True, qkv_bias=True, **SIZES)
    return DraftHead.random(config, device=device, dtype=dtype)


def outputs(head):
    """(next hidden, states, logits) of seven rows."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 7, head.feature_size, generator=generator).to(head.device, head.dtype)
    tokens = torch.randint(V, (1, 7), generator=generator).to(head.device)
    positions = torch.arange(7, device=head.device)[None]
    with torch.no_grad():
        hidden, states = head(tokens, head.embed_features(features), positions, CausalAttention(head))
    weight = head.lm_head_weight.to(head.dtype)
    logits = states @ weight.T if head.lm_head_scale is None else (states @ weight.T).float() * head.lm_head_scale
    return hidden, states, logits


def dequantized(quantized, original):
    """`original` with the weights that `quantized` stands for."""
    head = copy.deepcopy(original)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = head.get_submodule(name)
            linear.weight.data = (module.weight.float() * module.scale[:, None]).to(linear.weight.dtype)
    weight = quantized.lm_head_weight.float() * quantized.lm_head_scale[:, None]
    head.lm_head_weight.data = weight.to(original.lm_head_weight.dtype)
    return head


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_a_quantized_head_computes_with_its_quantized_weights(kind, device):
    original = random_head(kind, device)
    quantized = copy.deepcopy(original)
    quantized.quantize()
    left = {type(module) for module in quantized.modules() if list(module.parameters(recurse=False))}
    assert not any(issubclass(each, torch.nn.Linear) for each in left)
    for ours, exact, plain in zip(
        outputs(quantized), outputs(dequantized(quantized, original)), outputs(original), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
        assert 0 < (ours - plain).norm() < 0.03 * plain.norm()


def test_memory_halves_and_the_targets_lm_head_stays():
    shared = torch.randn(V, H).bfloat16()
    head = DraftHead.random(HeadConfig.eagle1(draft_vocab_size=V, **SIZES), lm_head_weight=shared, dtype=torch.bfloat16)
    before, kept = sum(p.nbytes for p in head.parameters()), shared.clone()
    head.quantize()
    linears = [module for module in head.modules() if isinstance(module, QuantizedLinear)]
    small = sum(p.nbytes for m in linears for p in (m.scale, m.bias) if p is not None)
    small += sum(p.nbytes for p in head.parameters() if p.dim() == 1)
    after = sum(p.nbytes for p in head.parameters()) - head.lm_head_weight.nbytes
    assert after <= before / 2 + small
    assert torch.equal(shared, kept)
    with pytest.raises(ValueError, match="quantized: export it before"):
        head.checkpoint()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_same(temperature, device):
    plain = decoder("llama", device)
    head = copy.deepcopy(plain.ea_layer)
    head.quantize()
    model, ids = EaModel(plain.base_model, head, tree=plain.tree), prompt(11, device)
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    out = model.eagenerate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, plain.naivegenerate(ids, **options))
    assert out.statistics.tau > 1.5, "an often-right head stays often right"


def test_when_a_head_runs_in_int8(device):
    full = random_head("eagle3", device)
    assert not runs_in_int8(full, None)
    assert not runs_in_int8(full, False)
    with pytest.raises(
        ValueError, match=r"draft_int8=True, but the head runs in torch.float32 .* leave draft_int8 out"
    ):
        runs_in_int8(full, True)
    half = random_head("eagle3", device, torch.bfloat16)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    assert runs_in_int8(half, None) == able
    assert not runs_in_int8(half, False)
    if not able:
        with pytest.raises(ValueError, match=r"draft_int8=True, but .* compute capability 8.0"):
            runs_in_int8(half, True)


@pytest.mark.gpu
def test_it_is_the_default_on_a_gpu_and_can_be_left_out(tmp_path):
    from often_right import write_often_right_head
    from zoo import make

    model = make("llama")
    write_often_right_head(copy.deepcopy(model), tmp_path)
    model = model.to("cuda", torch.bfloat16)
    able = torch.cuda.get_device_capability() >= (8, 0)
    for wanted, expected in ((None, able), (False, False), (True, True)):
        if wanted and not able:
            continue
        loaded = EaModel.from_pretrained(base_model_path=model, ea_model_path=tmp_path, draft_int8=wanted, **TREE)
        assert (loaded.ea_layer.lm_head_scale is not None) == expected
        out = loaded.eagenerate(prompt(11, "cuda"), max_new_tokens=24, return_dict_in_generate=True)
        assert out.statistics.tau > 1.5
