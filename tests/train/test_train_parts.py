"""What training is made of: the rollout computes what drafting computes, and the losses have the right gradients."""

import itertools
import json

import numpy as np
import pytest
import torch
from chatty import ASSISTANT, END, USER, make_tokenizer
from zoo import VOCAB, make

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.draft import Drafter
from eagle_fast.decoding.sampling import SamplingTensors
from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig
from eagle_fast.prompts import encode_prompt, read_prompts
from eagle_fast.target import Target
from eagle_fast.train.chat import chat_format, stop_ids
from eagle_fast.train.fresh import empty_head, head_config, measure, scaled_fc, start_from_target
from eagle_fast.train.learn import chain_tau
from eagle_fast.train.loss import distil
from eagle_fast.train.optimizer import MasterAdamW, learning_rate
from eagle_fast.train.pool import collate, load_texts, plan, save_texts
from eagle_fast.train.rollout import _StepAttention, rollout
from eagle_fast.train.teacher import Teacher
from eagle_fast.train.vocabulary import choose_tokens
from eagle_fast.train.writer import Text

CPU = torch.device("cpu")


def numbers(*shape, seed=0, low=3, high=128):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def texts_of(lengths, start=4):
    return [Text(numbers(length, seed=length).numpy().astype(np.int32), start) for length in lengths]


# -- the target, read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss", "llama4_text", "phi3_longrope", "gpt2"])
def test_reading_gives_stock_logits_and_the_features_of_decoding(name, device):
    """Windows, chunks, sinks, long rotary frequencies; 40 tokens are past every window, short of longrope's switch."""
    model = make(name).to(device)
    tokens = numbers(2, 40).to(device)
    target = Target(model, (2, 3, 6))
    logits, features = target.read(tokens)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features, target.prefill(tokens, 0, target.new_cache(2, 64)), atol=1e-4, rtol=1e-4)


# -- the rollout ---------------------------------------------------------------------------------------------------


def head_for(model, **settings):
    embedding = model.get_input_embeddings().weight
    common = dict(
        kind="eagle3", hidden_size=64, target_hidden_size=64, embedding_size=64, intermediate_size=96, num_heads=4,
        num_kv_heads=2, head_dim=16, vocab_size=VOCAB, draft_vocab_size=VOCAB, num_target_layers=6,
        feature_layers=(2, 3, 6),
    )  # fmt: skip
    config = HeadConfig(**(common | settings))
    return DraftHead.random(config, embedding=embedding, std=0.15, device=embedding.device)


VARIANTS = {
    "plain": {},
    "qk norm, one key head": dict(qk_norm=True, num_kv_heads=1),
    "two layers": dict(num_layers=2),
    "normed feedback, normed features": dict(norm_output=True, fc_norm=True),
    "interleaved rope, small vocabulary": dict(rope_interleaved=True, draft_vocab_size=90),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rollout_computes_what_drafting_computes(variant, device, monkeypatch):
    """Draft a chain with the real drafter, then roll out over prefix and chain: the same states at every step."""
    model, length, num_steps = make("llama").to(device), 11, 5
    head = head_for(model, **VARIANTS[variant])
    prefix = numbers(3, length + 1).to(device)
    features = Target(model, head.config.feature_layers).read(prefix[:, :length])[1]
    drafter = Drafter(head, TreeConfig(total_token=num_steps + 1, depth=num_steps - 1, top_k=1), 3, 64)
    lengths = torch.full((3,), length, device=device)
    drafted = []
    passing = head.passing

    def watched(*args, **options):
        output = yield from passing(*args, **options)
        drafted.append(output[1][:, -1])
        return output

    monkeypatch.setattr(head, "passing", watched)
    with torch.no_grad():
        drafter.absorb_prompt(features, prefix[:, 1:], 0)
        tree = drafter.grow(prefix[:, -1].contiguous(), lengths, SamplingTensors(3, device))
    monkeypatch.undo()
    assert tree.parents[0].tolist() == list(range(-1, num_steps)), "not a chain"
    tokens = torch.cat([prefix, tree.tokens[:, 1:]], 1)
    rolled = rollout(head.requires_grad_(True), tokens, features, num_steps, head.rope_table(40))
    states = [each[:, length - 1] for each in rolled]
    assert len(states) == len(drafted) == num_steps
    for mine, theirs in zip(states, drafted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_padding_and_later_tokens_do_not_reach_earlier_rows():
    model = make("llama")
    head, tokens = head_for(model).requires_grad_(True), numbers(2, 20)
    features = Target(model, head.config.feature_layers).read(tokens[:, :16])[1]
    other_tokens, other_features = tokens.clone(), features.clone()
    other_tokens[:, 14:], other_features[:, 9:] = 5, 1e3
    rolled = rollout(head, tokens, features, 4, head.rope_table(20))
    others = rollout(head, other_tokens, other_features, 4, head.rope_table(20))
    for first, second in zip(rolled, others, strict=True):
        assert torch.equal(first[:, :9], second[:, :9])


@pytest.mark.parametrize("num_later", [0, 1, 3])
def test_gradients_of_the_rollouts_attention(num_later):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, dtype=torch.double, generator=generator).requires_grad_()

    earlier = [random(2, 2, 5, 3) for _ in range(2 + 2 * num_later)]
    query = random(2, 4, 5, 3)
    assert torch.autograd.gradcheck(
        lambda query, *earlier: _StepAttention.apply(query, 0.6, *earlier), (query, *earlier)
    )


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 100])
def test_distilling_in_blocks_has_the_gradients_of_plain_cross_entropy(block, monkeypatch):
    monkeypatch.setattr("eagle_fast.train.loss.BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    states, weight = torch.randn(7, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = 0.8 * torch.randn(7, 11, generator=generator).softmax(-1)
    weights = torch.rand(7, generator=generator)
    grads = []
    for plain in (False, True):
        mine = [each.clone().requires_grad_() for each in (states, weight)]
        if plain:
            loss = -((targets * (mine[0] @ mine[1].T).log_softmax(-1)).sum(-1) * weights).sum()
        else:
            loss = distil(*mine, targets, weights).loss
        (2 * loss).backward()
        grads.append((loss.detach(), mine[0].grad, mine[1].grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_targets_are_the_models_probabilities_over_the_draft_vocabulary(device):
    model = make("llama").to(device)
    ids = torch.arange(0, VOCAB, 2, device=device)
    teacher = Teacher(Target(model, (2, 3, 3)), ids, torch.full((192,), 0.5, device=device))
    batch = collate(texts_of([20, 13]), 3, device)
    lesson = teacher.teach(batch, 3)
    assert batch.asked.tolist() == [*range(3, 19), *range(32 + 3, 32 + 12)]
    logits = model(batch.tokens[:, :32], use_cache=False).logits.flatten(0, 1)[batch.asked]
    torch.testing.assert_close(lesson.targets, logits.softmax(-1)[:, ids], atol=1e-5, rtol=1e-4)
    best = logits.argmax(-1)
    assert torch.equal(lesson.best, torch.where(best % 2 == 0, best // 2, -1))
    torch.testing.assert_close(lesson.features, 0.5 * Target(model, (2, 3, 3)).read(batch.tokens[:, :32])[1])


def test_a_fresh_head_passes_the_highest_feature_to_the_targets_norm(device):
    model = make("llama").to(device)
    config = head_config(model, VOCAB)
    assert (config.num_kv_heads, config.intermediate_size, config.feature_layers) == (2, 96, (2, 3, 3))
    head = empty_head(model, config, None)
    measured = measure(model, config.feature_layers, numbers(4, 60).to(device))
    torch.testing.assert_close(measured.gain, model.model.norm.weight.detach(), atol=1e-4, rtol=1e-4)
    start_from_target(head, model, measured)
    batch = collate(texts_of([60] * 4), 2, device)
    lesson = Teacher(Target(model, config.feature_layers), None, measured.scale).teach(batch, 2)
    assert lesson.features.float().std(dim=(0, 1)).log().abs().median() < 0.5
    with torch.no_grad():
        head.layers[0].o.weight.zero_()
        head.layers[0].down.weight.zero_()
    states = next(rollout(head, lesson.tokens, lesson.features, 2, head.rope_table(80)))
    expected = model.model.norm(lesson.features[..., -64:] / measured.scale[-64:])
    torch.testing.assert_close(states, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(head.lm_head_weight, model.lm_head.weight)
    before = head.fc.weight.clone()
    scaled_fc(head, measured.scale)
    scaled_fc(head, 1 / measured.scale)
    torch.testing.assert_close(head.fc.weight, before)


# -- texts ---------------------------------------------------------------------------------------------------------


def test_batches_hold_every_text_once_and_keep_to_their_size():
    texts = texts_of(range(5, 200, 3))
    for seed in (0, 1):
        batches = plan(texts, 512, np.random.default_rng(seed))
        assert sorted(index for batch in batches for index in batch) == list(range(len(texts)))
        widths = [collate([texts[i] for i in batch], 2, CPU).tokens[:, :-2].numel() for batch in batches]
        assert max(widths) <= 512
        assert sum(widths) < 1.5 * sum(len(text.tokens) for text in texts), "padding"
    assert plan(texts, 512, np.random.default_rng(0)) != batches


def test_every_step_has_a_row_for_what_is_asked():
    batch = collate([*texts_of([30], start=20), *texts_of([12], start=1)], 6, CPU)
    assert batch.asked.tolist() == [*range(19, 29), *range(32 + 6, 32 + 11)]
    whole = collate(texts_of([30], start=20), 6, CPU, whole=True)
    assert whole.asked.tolist() == list(range(6, 29))


def test_texts_are_stored_and_read(tmp_path):
    texts = texts_of([5, 19, 7])
    save_texts(tmp_path / "texts.npz", texts)
    for mine, stored in zip(texts, load_texts(tmp_path / "texts.npz"), strict=True):
        assert np.array_equal(mine.tokens, stored.tokens)
        assert mine.start == stored.start


def test_the_draft_vocabulary_is_what_answers_are_made_of():
    texts = [Text(np.array([9, 9, 9, 9, 5, 5, 6, 7, 7, 7], dtype=np.int32), 4)]
    ids, covered = choose_tokens(texts, 20, 4, always=[15, 99])
    assert ids.tolist() == [5, 6, 7, 15]
    assert covered == 1
    ids, covered = choose_tokens(texts, 20, 2, always=[15])
    assert ids.tolist() == [7, 15]
    assert covered == 0.5
    assert choose_tokens(texts, 20, 5, always=[15])[0].tolist() == [0, 5, 6, 7, 15]
    assert choose_tokens(texts, 20, 20)[0] is None
    with pytest.raises(ValueError, match="larger"):
        choose_tokens(texts, 20, 2, always=[1, 2, 3])


# -- chat ----------------------------------------------------------------------------------------------------------


def test_the_chat_format_and_what_ends_a_turn():
    tokenizer = make_tokenizer()
    chat = chat_format(tokenizer)
    assert chat == ([USER], [END, ASSISTANT])
    assert stop_ids(make("llama", eos_token_id=7), chat) == [END, 7]
    assert encode_prompt(tokenizer, "w5 w6") == [USER, 5, 6, END, ASSISTANT]
    messages = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    assert encode_prompt(tokenizer, messages) == [USER, 5, END, ASSISTANT, 6, END, USER, 7, END, ASSISTANT]
    plain = make_tokenizer(chat=False)
    assert chat_format(plain) == ([1], None)
    assert encode_prompt(plain, "w5 w6") == [5, 6]


def test_prompt_files(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"prompt": "p"}, {"turns": ["t", "u"]}, {"messages": messages}, {"text": "x"}, "plain"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    assert read_prompts(file) == ["p", "t", messages[:1], "x", "plain"]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]
    for content, message in (('{"other": 1}', "needs a field"), ("{", "line 1: not JSON"), ("", "no prompts")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(file)


# -- the optimizer -------------------------------------------------------------------------------------------------


def test_masters_take_steps_that_16_bit_weights_could_not():
    """Ten steps of 1e-4 on a weight of 1: each alone is lost in bfloat16, whose next value is 1 + 2**-7."""
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], weight_decay=0.0)
    for _ in range(60):
        parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step(1e-4)
    torch.testing.assert_close(optimizer.masters[0], torch.full((4, 4), 1.006), atol=1e-4, rtol=0)
    assert parameter[0, 0] == 1 + 2**-7
    assert parameter.grad is None


def test_the_learning_rate_warms_up_and_goes_down():
    rates = [learning_rate(1e-3, step, step / 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert 40 <= rates.index(max(rates)) <= 60
    assert rates[-1] == pytest.approx(2e-5, rel=0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[60:]))


def test_the_tokens_of_a_chain():
    assert chain_tau([0.5, 0.5]) == 1.75
