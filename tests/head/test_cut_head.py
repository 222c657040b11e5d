"""The parts of a head over ranks add up to the head, whatever it is made of; each has its own share of the weights."""

import pytest
import torch
from causal import CausalAttention
from eagle_fast_kernels.lm_head_topk import lm_head_topk

from eagle_fast.head import DraftHead, HeadConfig
from eagle_fast.head.cut import cut_head, pass_bytes, pays, portrait
from eagle_fast.layers.links import Links, Proposed
from eagle_fast.layers.lockstep import together

VOCABULARY, CPU, ROWS = 131, torch.device("cpu"), 7
COMMON = dict(
    hidden_size=64, target_hidden_size=64, embedding_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=VOCABULARY, num_target_layers=6,
)  # fmt: skip
EAGLE3 = COMMON | dict(kind="eagle3", draft_vocab_size=VOCABULARY, feature_layers=(2, 3, 6))
BIASES = dict(fc_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True)
# settings, ranks
HEADS = {
    "plain": (EAGLE3, 2),
    "biases everywhere": (EAGLE3 | BIASES | dict(lm_head_bias=True), 2),
    "three key heads, an odd width": (EAGLE3 | dict(num_heads=6, num_kv_heads=3, intermediate_size=97), 2),
    "one key head": (EAGLE3 | dict(num_kv_heads=1, qk_norm=True), 2),
    "two key heads over three": (EAGLE3 | dict(num_heads=8), 3),
    "two layers": (EAGLE3 | dict(num_layers=2, sliding_windows=(0, 3)), 2),
    "a small vocabulary, interleaved": (EAGLE3 | dict(draft_vocab_size=90, rope_interleaved=True), 2),
    "normed residual": (EAGLE3 | dict(norm_before_residual=True), 2),
    "normed feedback and features": (EAGLE3 | dict(norm_output=True, fc_norm=True), 2),
    "an embedding of its own, gelu": (EAGLE3 | dict(own_embedding=True, activation="gelu"), 2),
}
EAGLE1 = {
    "eagle1": (COMMON | dict(draft_vocab_size=VOCABULARY), 2),
    "eagle1 with biases": (COMMON | BIASES | dict(draft_vocab_size=VOCABULARY), 3),
}


def random_head(settings, dtype=torch.float32):
    config = HeadConfig(**settings) if "kind" in settings else HeadConfig.eagle1(**settings)
    head = DraftHead.random(config, std=0.15, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=generator)
    return head


def inputs(head):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, ROWS, head.feature_size, generator=generator).to(head.dtype)
    tokens = torch.randint(VOCABULARY, (2, ROWS), generator=generator)
    return tokens, head.embed_features(features), torch.arange(ROWS).expand(2, ROWS)


def proposing(part, k=5):
    """What a part does: one pass, and what it proposes after it."""
    tokens, hidden, positions = inputs(part)
    hidden, states = yield from part.passing(tokens, hidden, positions, CausalAttention(part))
    sums = torch.empty(2 * ROWS, 2)
    found = lm_head_topk(
        states.flatten(0, 1), part.lm_head_weight, k, bias=part.lm_head_bias, scale=part.lm_head_scale,
        token_ids=part.token_ids, sums=sums,
    )  # fmt: skip
    best = yield Proposed(*found, sums)
    return hidden, states, best


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", [*HEADS, *EAGLE1])
def test_parts_add_up_to_the_head(name, int8):
    settings, ranks = (HEADS | EAGLE1)[name]
    head = random_head(settings)
    if int8:
        head.quantize()
    parts = cut_head(head, [CPU] * ranks, [head.embedding] * ranks)
    tokens, hidden, positions = inputs(head)
    hidden, states = head(tokens, hidden, positions, CausalAttention(head))
    scores, best = lm_head_topk(
        states.flatten(0, 1), head.lm_head_weight, 5, bias=head.lm_head_bias, scale=head.lm_head_scale,
        token_ids=head.token_ids,
    )  # fmt: skip
    for found in together([proposing(part) for part in parts], Links([CPU] * ranks)):
        assert torch.allclose(found[0], hidden, atol=1e-4)
        assert torch.allclose(found[1], states, atol=1e-4)
        assert torch.equal(found[2][1], best)
        assert torch.allclose(found[2][0], scores, atol=1e-4)


def products(head):
    return [each for layer in head.draft_layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]


@pytest.mark.parametrize("int8", [False, True])
def test_a_part_holds_its_share_and_shares_what_is_there(int8):
    head = random_head(HEADS["biases everywhere"][0])
    if int8:
        head.quantize()
    before = portrait(head)
    first, second = cut_head(head, [CPU] * 2, [head.embedding, head.embedding.clone()])
    for whole, *cut in zip(*(products(each) for each in (head, first, second)), strict=True):
        assert sum(each.weight.numel() for each in cut) == whole.weight.numel()
        assert {type(each) for each in cut} == {type(whole)}
    assert first.embedding.data_ptr() == head.embedding.data_ptr() != second.embedding.data_ptr()
    assert len(first.lm_head_weight) + len(second.lm_head_weight) == VOCABULARY
    assert first.lm_head_weight.data_ptr() == head.lm_head_weight.data_ptr()
    assert second.token_ids.tolist() == list(range(len(first.lm_head_weight), VOCABULARY))
    assert not head.is_part
    assert portrait(head) == before, "the head itself is left as it is"
    head.norm.add_(0.0)
    assert portrait(head) != before


@pytest.mark.parametrize(
    "settings", [dict(num_heads=2, num_kv_heads=2), dict(draft_vocab_size=40), dict(intermediate_size=2)]
)
def test_heads_that_cannot_be_cut_so_often(settings):
    head = random_head(EAGLE3 | settings)
    assert cut_head(head, [CPU] * 3, [head.embedding] * 3) is None


@pytest.mark.parametrize(("layers", "int8"), [(1, False), (2, False), (1, True)])
def test_bytes_that_a_pass_reads(layers, int8):
    head = random_head(EAGLE3 | dict(num_layers=layers))
    first, more = 64 * (2 * 128 + 64 + 3 * 96), 64 * (2 * 64 + 64 + 3 * 96)  # q, k, v of two inputs or one; o; MLP
    count = first + (layers - 1) * more + 64 * VOCABULARY
    if not int8:
        assert pass_bytes(head) == 4 * count
        return
    head.quantize()
    assert pass_bytes(head) == count + 4 * (128 + 64 + 2 * 96 + 64)  # a scale a row, but of lm_head


def test_a_cut_pays_where_the_weights_left_out_take_longer_than_the_exchanges():
    assert pays(375_000_000, 1, 2), "8B's, in int8"
    assert not pays(20_000_000, 1, 2), "that of the pair"
    assert pays(85_000_000, 1, 2) != pays(83_000_000, 1, 2)
    assert pays(83_000_000, 1, 4) != pays(83_000_000, 2, 4)
