"""Rotary tables of draft heads against transformers, and the ways in which configs spell them."""

import pytest
import torch
from draft_weights import HEADS, D
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle_fast.head.rope import rope_parameters, rope_table


def stock_rotary(rope, max_positions=64):
    config = LlamaConfig(
        hidden_size=HEADS * D,
        num_attention_heads=HEADS,
        max_position_embeddings=max_positions,
        rope_parameters=dict(rope),
    )
    return LlamaRotaryEmbedding(config)


FACTORS = dict(short_factor=[1.0 + 0.1 * i for i in range(D // 2)], long_factor=[2.0 + 0.3 * i for i in range(D // 2)])
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "longrope": dict(rope_type="longrope", original_max_position_embeddings=32, factor=2.0, **FACTORS),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_table_is_transformers(kind):
    rope = {"rope_theta": 5000.0, **ROPES[kind]}
    cos, sin = rope_table(rope, 90, head_dim=D, max_position_embeddings=64)
    assert cos.dtype == sin.dtype == torch.float32
    rotary, x = stock_rotary(rope), torch.zeros(1)
    for position in (0, 1, 31, 32, 63, 64, 89):  # as decoding reaches them: a sequence that ends at this position
        want = rotary(x, torch.tensor([[position]]))
        for got, expected in zip((cos[position], sin[position]), want, strict=True):
            torch.testing.assert_close(got, expected[0, 0], rtol=1e-5, atol=1e-5)
    if kind not in ("dynamic", "longrope"):
        want = rotary(x, torch.arange(90)[None])
        torch.testing.assert_close((cos, sin), (want[0][0], want[1][0]), rtol=1e-5, atol=1e-5)


def test_partial_and_interleaved_tables():
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    sizes = dict(head_dim=D, max_position_embeddings=64)
    half, _ = rope_table(rope | {"partial_rotary_factor": 0.5}, 9, **sizes)
    assert torch.equal(half, rope_table(rope, 9, head_dim=D // 2, max_position_embeddings=64)[0])
    paired, plain = rope_table(rope, 9, interleaved=True, **sizes)[0], rope_table(rope, 9, **sizes)[0]
    assert torch.equal(paired[:, 0::2], plain[:, : D // 2])
    assert torch.equal(paired[:, 1::2], plain[:, : D // 2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_type": "default", "rope_theta": 7.0}),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
            {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"partial_rotary_factor": 0.5}, {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_rope_spellings(settings, expected):
    assert rope_parameters(settings) == expected
