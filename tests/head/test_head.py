"""The draft head's forward against fp64 arithmetic done row by row, for every checkpoint format."""

import os
from pathlib import Path

import pytest
import torch
from causal import POSITIONS, CausalAttention
from draft_formats import FORMATS, sample
from draft_weights import HEADS, KV_HEADS, MLP, TARGET, VD, D, H, V, plain_eagle3
from naive_head import Naive

from eagle_fast.head import DraftHead
from eagle_fast.head.checkpoint import read_head
from eagle_fast.head.config import HeadConfig

PROMPT, STEPS = 7, 3  # rows from the target's features, then rows from the head's own output
assert PROMPT + STEPS <= POSITIONS
SIZES = dict(
    hidden_size=H, target_hidden_size=H, embedding_size=H, intermediate_size=MLP, num_heads=HEADS,
    num_kv_heads=KV_HEADS, head_dim=D, vocab_size=V, draft_vocab_size=VD, num_target_layers=12,
)  # fmt: skip


def build(made, folder, device="cpu", **arguments):
    """(head, the target's embedding and lm_head) of a sample."""
    embedding, lm_head = torch.randn(V, H), 3 * torch.randn(V, H) / H**0.5
    checkpoint = read_head(made.write(folder), **{**made.target, **made.arguments})
    shared = dict(embedding=embedding.to(device), lm_head_weight=lm_head.to(device))
    return DraftHead(checkpoint, **shared, **arguments), embedding, lm_head


def drafted(head, features, tokens):
    """(states, logits) [B, PROMPT + STEPS, ...]: one pass over the prompt's rows, then one row at a time."""
    attend, positions = CausalAttention(head), torch.arange(PROMPT + STEPS, device=tokens.device).expand_as(tokens)
    hidden, states = head(tokens[:, :PROMPT], head.embed_features(features), positions[:, :PROMPT], attend)
    every = [states]
    for row in range(PROMPT, PROMPT + STEPS):
        hidden, states = head(tokens[:, row : row + 1], hidden[:, -1:], positions[:, row : row + 1], attend)
        every.append(states)
    states = torch.cat(every, 1)
    return states, torch.nn.functional.linear(states, head.lm_head_weight, head.lm_head_bias)


def naively_drafted(naive, features, tokens):
    states, logits, fed_back = [], [], None
    for row in range(PROMPT + STEPS):
        hidden = naive.embed_features(features[row].double()) if row < PROMPT else fed_back
        fed_back, state, scores = naive.row(tokens[row], hidden)
        states.append(state)
        logits.append(scores)
    return torch.stack(states), torch.stack(logits)


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", FORMATS)
def test_forward_equals_the_formulas(name, tmp_path, device):
    made = sample(name)
    head, embedding, lm_head = build(made, tmp_path, device)
    features, tokens = torch.randn(2, PROMPT, head.feature_size), torch.randint(V, (2, PROMPT + STEPS))
    with torch.no_grad():
        states, logits = drafted(head, features.to(device), tokens.to(device))
    for b in range(2):
        expected = naively_drafted(Naive(made.truth, embedding, lm_head), features[b], tokens[b])
        for got, want in zip((states[b], logits[b]), expected, strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
    ids = None if head.token_ids is None else head.token_ids.tolist()
    assert ids == made.truth.ids
    assert head.lm_head_weight.shape == (V if ids is None else VD, head.config.hidden_size)


@pytest.mark.parametrize("name", ["safeailab_eagle1", "speculators_llama"])
def test_forward_through_the_kernels(name, tmp_path, triton_kernels, device):
    made = sample(name)
    head, embedding, lm_head = build(made, tmp_path, device)
    features, tokens = torch.randn(1, PROMPT, head.feature_size), torch.randint(V, (1, PROMPT + STEPS))
    with torch.no_grad():
        states, _ = drafted(head, features.to(device), tokens.to(device))
    want, _ = naively_drafted(Naive(made.truth, embedding, lm_head), features[0], tokens[0])
    torch.testing.assert_close(states[0].cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", ["safeailab_eagle1", "speculators_qwen3_deep", "eagle31_nemo", "biases"])
def test_gradients_equal_those_of_the_formulas(name, tmp_path):
    made = sample(name)
    head, embedding, lm_head = build(made, tmp_path)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    head.requires_grad_(True)
    naive = Naive(made.truth, embedding, lm_head)
    for tensor in naive.weights.values():
        tensor.requires_grad_(True)
    features, tokens = torch.randn(1, PROMPT, head.feature_size), torch.randint(V, (1, PROMPT + STEPS))
    weight = torch.randn(PROMPT + STEPS, head.lm_head_weight.shape[0])
    (drafted(head, features, tokens)[1][0] * weight).sum().backward()
    (naively_drafted(naive, features[0], tokens[0])[1] * weight).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    merged = head.layers[0].qkv.weight.grad.split((HEADS * D, KV_HEADS * D, KV_HEADS * D))
    merged += head.layers[0].gate_up.weight.grad.chunk(2)
    names = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    pairs = [(got, f"layers.0.{part}.weight") for got, part in zip(merged, names, strict=True)]
    pairs += [
        (head.fc.weight.grad, "fc.weight"),
        (head.layers[0].post_norm.grad, "layers.0.post_attention_layernorm.weight"),
    ]
    for got, weight_name in pairs:
        want = naive.weights[weight_name].grad
        assert (got.double() - want).norm() < 1e-4 * want.norm(), weight_name


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", FORMATS)
def test_export_round_trip(name, tmp_path):
    head, embedding, lm_head = build(sample(name), tmp_path / "theirs", dtype=torch.bfloat16)
    head.export(tmp_path / "ours")
    again = read_head(tmp_path / "ours", **TARGET)
    assert again.config == head.config
    first = head.checkpoint()
    assert again.tensors.keys() == first.tensors.keys()
    for key, tensor in again.tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, first.tensors[key]), key
    assert (head.token_ids is None) == (again.token_ids is None)
    second = DraftHead(again, embedding=embedding, lm_head_weight=lm_head, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), second.parameters(), strict=True))


def test_export_of_quantized_weights_is_refused(tmp_path):
    head, *_ = build(sample("safeailab_eagle3"), tmp_path)
    down = head.layers[0].down
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized: export it before"):
        head.export(tmp_path / "ours")


# -- what is shared with the target


def test_same_embedding_is_stored_once(tmp_path):
    made = sample("safeailab_eagle1")
    checkpoint = read_head(made.write(tmp_path), **made.target)
    targets, lm_head = made.truth.embedding.clone(), torch.randn(V, H)
    head = DraftHead(checkpoint, embedding=targets, lm_head_weight=lm_head)
    assert head.embedding.data_ptr() == targets.data_ptr()
    assert head.lm_head_weight.data_ptr() == lm_head.data_ptr()
    targets[3, 0] += 1
    head = DraftHead(checkpoint, embedding=targets, lm_head_weight=lm_head)
    assert torch.equal(head.embedding, made.truth.embedding)


def test_same_eagle1_lm_head_is_stored_once(tmp_path):
    made = sample("vllm_eagle1")
    checkpoint = read_head(made.write(tmp_path), **made.target)
    targets = made.truth.lm_head.clone()
    head = DraftHead(checkpoint, embedding=torch.randn(V, H), lm_head_weight=targets)
    assert head.lm_head_weight.data_ptr() == targets.data_ptr()
    head = DraftHead(checkpoint, embedding=torch.randn(V, H), lm_head_weight=targets + 1)
    assert torch.equal(head.lm_head_weight, targets)


def test_missing_parts_of_the_target_are_asked_for(tmp_path):
    eagle1 = read_head(sample("eagle1_two_layers").write(tmp_path / "1"), **TARGET)
    eagle3 = read_head(sample("safeailab_eagle3").write(tmp_path / "3"), **TARGET)
    embedding = torch.randn(V, H)
    for wrong in (None, embedding[1:], torch.empty(V, H, device="meta"), embedding.to(torch.int8)):
        with pytest.raises(ValueError, match=r"shares the target's embedding: pass it as \[61, 48\] floats"):
            DraftHead(eagle3, embedding=wrong, dtype=torch.float32, device="cpu")
        with pytest.raises(ValueError, match=r"shares the target's lm_head: pass it as \[61, 48\] floats"):
            DraftHead(eagle1, embedding=embedding, lm_head_weight=wrong)
    with pytest.raises(ValueError, match="draft vocabulary has 23 tokens, token_ids: 4"):
        DraftHead(eagle3._replace(token_ids=torch.arange(4)), embedding=embedding)


def test_targets_lm_head_bias(tmp_path):
    made = sample("targets_lm_head_rows")
    checkpoint = read_head(made.write(tmp_path), **made.target)
    bias = torch.randn(V)
    head = DraftHead(checkpoint, embedding=torch.randn(V, H), lm_head_weight=torch.randn(V, H), lm_head_bias=bias)
    assert torch.equal(head.lm_head_bias, bias[made.truth.ids])
    assert "lm_head_weight" not in head.state_dict()


# -- fresh heads


def test_random_heads_repeat_by_seed_and_differ_without():
    config = HeadConfig(kind="eagle3", feature_layers=(2, 6, 9), fc_norm=True, qk_norm=True, num_layers=2, **SIZES)
    one, same, other = (DraftHead.random(config, seed=seed) for seed in (3, 3, 4))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) == ("norm" in name)
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
    assert one.token_ids.unique().numel() == VD
    assert (one.dtype, one.device, one.feature_size) == (torch.float32, torch.device("cpu"), 3 * H)


def test_random_eagle1_head_takes_the_targets_parts():
    embedding, lm_head = torch.randn(V, H), torch.randn(V, H)
    config = HeadConfig.eagle1(**{**SIZES, "draft_vocab_size": V})
    head = DraftHead.random(config, embedding=embedding, lm_head_weight=lm_head, dtype=torch.bfloat16)
    assert head.token_ids is None
    assert head.dtype == head.fc.weight.dtype == torch.bfloat16
    assert torch.equal(head.lm_head_weight, lm_head.bfloat16())
    hidden = torch.randn(1, 2, H).bfloat16()
    assert head.embed_features(hidden) is hidden


# -- a real pair


def test_real_head_loads_and_drafts():
    folder = os.environ.get("EAGLE_FAST_PAIR", "")
    if not Path(folder, "config.json").is_file():
        pytest.skip("EAGLE_FAST_PAIR does not name a folder with a draft head")
    checkpoint = read_head(folder, target_hidden_size=576, target_vocab_size=49152, num_target_layers=30)
    config = checkpoint.config
    assert (config.kind, config.feature_layers, config.draft_vocab_size) == ("eagle3", (2, 15, 27), 16384)
    assert config.rope["rope_theta"] == 100000.0
    head = DraftHead(checkpoint, embedding=torch.randn(49152, 576), dtype=torch.float32)
    with torch.no_grad():
        _, logits = drafted(head, torch.randn(1, PROMPT, head.feature_size), torch.arange(PROMPT + STEPS)[None])
    assert logits.isfinite().all()
    assert logits.std() > 0.5


def test_features_in_another_dtype_are_cast(tmp_path):
    head, *_ = build(plain_eagle3(), tmp_path)
    features = torch.randn(2, 3, head.feature_size)
    torch.testing.assert_close(head.embed_features(features.double()), head.embed_features(features))
