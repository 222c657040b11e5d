"""On a GPU: a round is one graph, and nothing inside it waits for the device."""

import copy
import warnings

import pytest
import torch
from often_right import write_often_right_head
from zoo import FAMILIES, make

from eagle_fast import EaModel, TreeConfig
from eagle_fast.head import DraftHead
from eagle_fast.head_config import HeadConfig, default_feature_layers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the model caps its attention scores")]


def decoder(name, folder):
    model = make(name)
    write_often_right_head(copy.deepcopy(model), folder)
    return EaModel.from_pretrained(base_model_path=model.cuda(), ea_model_path=str(folder))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_family_is_captured(name, batch, tmp_path):
    model = decoder(name, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rounds run without a CUDA graph")
        model.eagenerate(torch.randint(3, 130, (batch, 19)).cuda(), max_new_tokens=60)
    assert [step.graph is not None for _, step in model._idle] == [True]


def test_no_host_read_inside_a_round_of_an_8b_target():
    """Random bf16 weights at Llama-3.1-8B's shapes, 256 tokens: every step runs with host syncs forbidden."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, dtype=torch.bfloat16,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            target = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    head_config = HeadConfig(
        kind="eagle3", hidden_size=4096, target_hidden_size=4096, embedding_size=4096, intermediate_size=14336,
        num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256, draft_vocab_size=32000, num_target_layers=32,
        feature_layers=default_feature_layers(32),
    )  # fmt: skip
    embedding = target.get_input_embeddings().weight
    head = DraftHead.random(head_config, embedding=embedding, dtype=torch.bfloat16, device="cuda")
    model = EaModel(target, head, tree=TreeConfig())
    ids = torch.randint(0, 128256, (1, 64), device="cuda")
    model.eagenerate(ids, max_new_tokens=4)
    _, step = model._idle[0]
    steps = 0

    def forbidding():
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    eager, step.step, step.eager, step.graph = step.step, forbidding, True, None
    out = model.eagenerate(ids, max_new_tokens=256, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 64 + 256)
    assert steps == out.statistics.rounds > 60
