"""On a GPU: a round is one graph, and neither it nor the loop around it waits for the device."""

import contextlib
import copy
import warnings

import pytest
import torch
from often_right import write_often_right_head
from zoo import FAMILIES, make

from eagle_fast import EaModel
from eagle_fast.decoding.graph import GraphedStep
from eagle_fast.decoding.round import Round
from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig, default_feature_layers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the model caps its attention scores")]


def decoder(name, folder, **options):
    model = make(name)
    write_often_right_head(copy.deepcopy(model), folder)
    return EaModel.from_pretrained(base_model_path=model.cuda(), ea_model_path=str(folder), **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_family_is_captured(name, batch, tmp_path):
    model = decoder(name, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rounds run without a CUDA graph")
        model.eagenerate(torch.randint(3, 130, (batch, 19)).cuda(), max_new_tokens=60)
    assert [bool(step.graphs) for _, step, _ in model.states.idle] == [True]


@contextlib.contextmanager
def host_syncs_forbidden():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["ea_generate", "naive_generate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_host_sync_in_the_loop(method, temperature, batch, tmp_path):
    """Launching, reading, stops and streaming of 256 tokens, from the second step on: the prompt is prefilled in the
    first. Ids on the CPU, because results go where ids are. Three sequences end at stop tokens, each in its own round.
    """
    model = decoder("llama", tmp_path)
    ids = torch.randint(3, 130, (batch, 19), generator=torch.Generator().manual_seed(1))
    options = {"temperature": temperature, "seed": list(range(batch)), "max_new_tokens": 256}
    expected = model.naivegenerate(ids, **options)
    if batch > 1:
        options["eos_token_id"] = [int(expected[row, 19 + 40 * (row + 1)]) for row in range(batch)]
        expected = model.naivegenerate(ids, **options)
    list(getattr(model, method)(ids, **options))  # captures
    stream = getattr(model, method)(ids, **options)
    seen = [next(stream)]
    with host_syncs_forbidden():
        seen += stream
    assert torch.equal(seen[-1], expected)
    most = expected.shape[1] - 19
    assert len(seen) == most if method == "naive_generate" else len(seen) < most


def test_no_host_sync_between_prompts(tmp_path):
    """The host launches a prompt while the device runs the one before."""
    model = decoder("llama", tmp_path)
    texts = [[3 + token % 100 for token in range(length)] for length in (9, 80, 19)]
    state = Round(model.target, model.ea_layer, model.tree, len(texts), 128)
    state.begin(texts, [100] * len(texts))  # compiles
    with host_syncs_forbidden():
        state.begin(texts, [100] * len(texts))


ROWS = {"output_scores": True, "output_logits": True}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("records", [{}, ROWS], ids=["logprobs", "rows"])
def test_rounds_that_record_are_captured(name, batch, records, tmp_path):
    """The figures are those of the very tokens, eager or replayed: stock's own, and the argmax of greedy rows."""
    model = decoder(name, tmp_path)
    ids = torch.randint(3, 130, (batch, 19), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"max_new_tokens": 60, "return_dict_in_generate": True}
    own = model.base_model.generate(ids, do_sample=False, output_logits=True, **options)
    own = torch.stack(own.logits, 1).log_softmax(-1)
    for settings in ({}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 3}):
        plain = model.eagenerate(ids, max_new_tokens=60, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="rounds run without a CUDA graph")
            out = model.eagenerate(ids, output_logprobs=True, **records, **options, **settings)
        assert torch.equal(out.sequences, plain)
        new = out.sequences[:, 19:, None]
        if not settings:
            torch.testing.assert_close(out.logprobs[..., None], own.gather(-1, new), rtol=1e-2, atol=1e-2)
        if records:
            logits, scores = torch.stack(out.logits, 1), torch.stack(out.scores, 1)
            assert logits.device == scores.device == ids.device
            found = logits.log_softmax(-1).gather(-1, new)
            torch.testing.assert_close(out.logprobs[..., None], found, rtol=0, atol=1e-5)
            if settings:
                assert scores.gather(-1, new).isfinite().all()
                assert ((scores > -torch.inf).sum(-1) <= 40).all()
            else:
                assert torch.equal(logits.argmax(-1), new[..., 0])
                assert torch.equal(scores, logits)
    assert len(model.states.idle) == 2
    assert all(step.graphs for _, step, _ in model.states.idle)


@pytest.mark.parametrize("batch", [1, 3])
def test_logprobs_cost_no_host_sync(batch, tmp_path):
    """They travel with the reports, two rounds under way."""
    model = decoder("llama", tmp_path, adaptive=False)  # so that both calls have the same rounds
    ids = torch.randint(3, 130, (batch, 19), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 128, "return_dict_in_generate": True, "output_logprobs": True}
    expected = list(model.ea_generate(ids, **options))  # captures
    stream = model.ea_generate(ids, **options)
    seen = [next(stream)]
    with host_syncs_forbidden():
        seen += stream
    assert torch.equal(seen[-1].logprobs, expected[-1].logprobs)
    assert len(seen) == len(expected) < 128


def random_pair(adaptive, **shape):
    """A Llama of these shapes with random bf16 weights, built on the GPU, and an EAGLE-3 head for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(dtype=torch.bfloat16, **shape)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            target = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_config = HeadConfig(
        kind="eagle3", hidden_size=hidden, target_hidden_size=hidden, embedding_size=hidden,
        intermediate_size=config.intermediate_size, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        draft_vocab_size=32000, num_target_layers=layers, feature_layers=default_feature_layers(layers),
    )  # fmt: skip
    embedding = target.get_input_embeddings().weight
    head = DraftHead.random(head_config, embedding=embedding, dtype=torch.bfloat16, device="cuda")
    return EaModel(target, head, adaptive=adaptive)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_host_sync_inside_a_round_of_an_8b_target(adaptive):
    """Random bf16 weights at Llama-3.1-8B's shapes, 256 tokens: the loop runs with host syncs forbidden, and so does
    every step of it, which is not a graph here."""
    model = random_pair(
        adaptive, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    ids = torch.randint(0, 128256, (1, 64))
    model.eagenerate(ids, max_new_tokens=4)
    state, step, _ = model.states.idle[0]
    steps = 0

    def counting(eager):
        def counted():
            nonlocal steps
            steps += 1
            eager()

        return counted

    for tree in state.trees:
        of_tree = step.of(tree)
        of_tree.step, of_tree.eager, of_tree.graph = counting(of_tree.step), True, None
    step.release = GraphedStep(state.release, state.devices)
    step.release.eager = True
    stream = model.ea_generate(ids, max_new_tokens=256, eos_token_id=[])
    seen = [next(stream)]
    with host_syncs_forbidden():
        seen += stream
    assert seen[-1].shape == (1, 64 + 256)
    assert len(seen) > 60
    assert steps - len(seen) in (0, 1), "at most one round was under way at the end"
