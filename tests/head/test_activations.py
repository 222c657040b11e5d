"""Heads whose gate is not SiLU: every activation of transformers without weights, also in bf16, int8 and graphs."""

import copy
import warnings

import pytest
import torch
from causal import CausalAttention
from decoders import TREE, prompt
from draft_weights import H, V, plain_eagle3
from naive_head import ACTIVATIONS, Naive
from often_right import write_often_right_head
from transformers.activations import ACT2FN
from zoo import make

from eagle_fast import EaModel
from eagle_fast.head import DraftHead, read_head
from eagle_fast.layers.linear import QuantizedLinear

ROWS = 6
WITHOUT_WEIGHTS = [name for name in ACT2FN if name not in ("prelu", "xielu")]


def head_with(activation, folder, **options):
    """(head, its naive twin) with this activation."""
    torch.manual_seed(0)
    made = plain_eagle3(dict(activation=activation), dict(hidden_act=activation))
    embedding, lm_head = torch.randn(V, H), torch.randn(V, H)
    checkpoint = read_head(made.write(folder), **made.target)
    return DraftHead(checkpoint, embedding=embedding, **options), Naive(made.truth, embedding, lm_head)


def states(head):
    """What lm_head reads after six rows [6, H], and the features and tokens [6] of the rows."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, ROWS, head.feature_size, generator=generator).to(head.device)
    tokens = torch.randint(V, (1, ROWS), generator=generator).to(head.device)
    positions = torch.arange(ROWS, device=head.device)[None]
    with torch.no_grad():
        _, found = head(tokens, head.embed_features(features), positions, CausalAttention(head))
    return found[0].cpu(), features[0].cpu(), tokens[0].cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_the_formula(activation, dtype, tmp_path, device):
    head, naive = head_with(activation, tmp_path, dtype=dtype, device=device)
    found, features, tokens = states(head)
    rows = zip(tokens, features.double(), strict=True)
    want = torch.stack([naive.row(token, naive.embed_features(row))[1] for token, row in rows])
    error = (found.double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_in_int8(activation, tmp_path, device):
    head, _ = head_with(activation, tmp_path, device=device)
    exact = states(head)[0]
    head.quantize()
    assert isinstance(head.layers[0].gate_up, QuantizedLinear)
    assert 0 < (states(head)[0] - exact).norm() < 0.03 * exact.norm()


def test_only_silu_is_fused(tmp_path):
    for name in ("silu", "swish", "gelu"):
        assert (head_with(name, tmp_path / name)[0].layers[0].activation is None) == (name != "gelu")


@pytest.mark.parametrize("activation", WITHOUT_WEIGHTS)
def test_every_activation_trains_and_survives_writing(activation, tmp_path):
    head, _ = head_with(activation, tmp_path / "theirs")
    head.requires_grad_(True)
    hidden = torch.randn(1, 3, H)
    head.layers[0].mlp(hidden).sum().backward()
    assert head.layers[0].gate_up.weight.grad.isfinite().all()
    head.export(tmp_path / "ours")
    again = read_head(tmp_path / "ours", target_hidden_size=H, target_vocab_size=V, num_target_layers=12)
    assert again.config == head.config


def test_text_of_a_geglu_head(tmp_path, device):
    model = make("gemma2").to(device)
    write_often_right_head(copy.deepcopy(model), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu_pytorch_tanh"'))
    ea_model = EaModel.from_pretrained(base_model_path=model, ea_model_path=tmp_path, **TREE)
    ids = prompt(11, device)
    out = ea_model.eagenerate(ids, max_new_tokens=24, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=24, do_sample=False))
    assert out.statistics.tau > 1.5


@pytest.mark.gpu
def test_in_a_graph_and_in_bfloat16(tmp_path):
    model = make("llama")
    write_often_right_head(copy.deepcopy(model), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu_pytorch_tanh"'))
    model, ids = model.to("cuda", torch.bfloat16), prompt(11, "cuda")
    for draft_int8 in (None, False):
        ea_model = EaModel.from_pretrained(base_model_path=model, ea_model_path=tmp_path, draft_int8=draft_int8, **TREE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a step that cannot be captured warns
            ea_model.warmup()
        out = ea_model.eagenerate(ids, max_new_tokens=64, return_dict_in_generate=True)
        assert out.statistics.tau > 1.5
