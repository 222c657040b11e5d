"""Texts that the target writes: prompts are completed as alone, however rows come and go; questions and answers."""

import numpy as np
import pytest
import torch
from chatty import ASSISTANT, END, USER, make_tokenizer
from zoo import make

from eagle_fast.config import SamplingParams, TreeConfig
from eagle_fast.decoding.generation import NaNLogitsError
from eagle_fast.decoding.round import Round
from eagle_fast.target import Target
from eagle_fast.train import TrainOptions
from eagle_fast.train.chat import chat_format
from eagle_fast.train.completer import Completer, Job
from eagle_fast.train.setting import Setting
from eagle_fast.train.writer import Sources, Writer

SEED = 4


def alone(target, job, number):
    """The completion of one prompt with the `number`-th noise of SEED, decoded in a round of its own."""
    state = Round(target, None, TreeConfig(), 1, 256)
    state.sampling.load(SamplingParams(job.temperature, min_p=job.min_p, seed=SEED), shared_noise=False)
    state.sampling.sequences.fill_(number)
    state.begin([job.prompt], [len(job.prompt) + job.max_new - 1])
    text = []
    for _ in range(job.max_new):
        state.step()
        text.append(int(state.emitted[0, 0]))
        if text[-1] == END:
            break
    return text


@pytest.mark.parametrize("batch", [1, 4, 33])
def test_prompts_are_completed_as_if_each_ran_alone(batch, device):
    """33 rows take in two prompts at a time, and leave one row idle until another is free."""
    target = Target(make("llama").to(device))
    rng = np.random.default_rng(batch)
    jobs = []

    def next_job():
        prompt = rng.integers(3, 130, rng.integers(1, 41)).tolist()
        temperature = float(rng.integers(2))
        jobs.append(Job(prompt, int(rng.integers(1, 40)), temperature, min_p=0.05 * temperature, tag=len(jobs)))
        return jobs[-1]

    completer = Completer(target, batch, max_prompt=40, max_new=40, stop_ids=[END], seed=SEED)
    done = []
    while len(done) < max(6, batch) or not any(completion.ended for completion in done):
        done += completer.advance(next_job)
    assert len({completion.job.tag for completion in done}) == len(done)
    for completion in [each for each in done if each.ended][:3] + [each for each in done if not each.ended][:3]:
        expected = alone(target, completion.job, completion.number)
        assert completion.tokens.tolist() == expected
        assert completion.ended == (expected[-1] == END)
        assert completion.ended or len(expected) == completion.job.max_new


def test_nan_logits_are_reported():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    completer = Completer(Target(model), 2, max_prompt=8, max_new=8, stop_ids=[END])
    with pytest.raises(NaNLogitsError):
        completer.advance(lambda: Job([3, 4], 8))


def writer_for(model, sources, rows=8, stops=(END,)):
    completer = Completer(Target(model), rows, sources.max_prompt, sources.max_new, list(stops), seed=1)
    return Writer(completer, sources, seed=2)


def test_the_target_asks_and_answers():
    """Questions begin with the chat's prefix and perhaps an opening, end with its suffix, and are not repeated."""
    chat = chat_format(make_tokenizer())
    opening, stops = [40, 41], {END, *range(3, 20)}
    sources = Sources(chat, [], [opening], opening_share=0.5, max_question=30, max_answer=20)
    model = make("llama")
    model.lm_head.weight.mul_(0.3)  # varied text
    texts = writer_for(model, sources, 16, stops).write(lambda count: count >= 200)
    opened = 0
    for tokens, start in texts:
        question, answer = tokens[:start].tolist(), tokens[start:].tolist()
        assert question[0] == USER
        assert question[-2:] == [END, ASSISTANT]
        assert not stops & set(question[1:-2])
        assert 1 <= len(answer) <= 20
        assert not stops & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == 20
        opened += question[1:3] == opening
    assert 0.2 * len(texts) < opened < 0.8 * len(texts)
    asked = [tuple(tokens[:start]) for tokens, start in texts]
    assert len(set(asked)) == len(asked)
    assert sum(len(tokens) - start for tokens, start in texts) >= 200


def test_openings_that_leave_no_room_for_a_question_are_not_used():
    """With a small --max-question: one of the three leaves some, one none at all."""
    short, full, long = [40, 41, 42], [50] * 10, [60] * 14
    sources = Sources(
        chat_format(make_tokenizer()), [], [short, full, long], opening_share=0.8, max_question=10, max_answer=4
    )
    model = make("llama")
    model.lm_head.weight.mul_(0.3)
    texts = writer_for(model, sources, stops=(END, *range(3, 36))).write(lambda count: count >= 20)
    opened = {tuple(tokens[1:4].tolist()) for tokens, start in texts}
    assert tuple(short) in opened
    assert not {(50, 50, 50), (60, 60, 60)} & opened


def test_given_prompts_are_answered_greedily_and_not():
    chat, prompts = chat_format(make_tokenizer()), [[USER, 5, END, ASSISTANT], [USER, 9, 8, END, ASSISTANT]]
    model = make("llama")
    sources = Sources(chat, prompts, [], greedy_share=0.5, max_answer=20, max_question=10)
    texts = writer_for(model, sources).write(lambda count: count >= 600)
    assert {tuple(tokens[:start]) for tokens, start in texts} == {tuple(prompt) for prompt in prompts}
    for prompt in prompts:
        answers = {tuple(tokens[start:]) for tokens, start in texts if tokens[:start].tolist() == prompt}
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=END)
        assert tuple(greedy[0, len(prompt) :].tolist()) in answers
        assert len(answers) > 3


def test_a_model_without_a_chat_template_just_writes():
    setting = Setting(make("llama"), make_tokenizer(chat=False), TrainOptions(max_answer=20))
    setting.model.generation_config.eos_token_id = END
    texts = setting.writer.write(lambda count: count >= 200)
    assert all(start == 1 and tokens[0] == 1 for tokens, start in texts)
    assert len({tuple(tokens) for tokens, _ in texts}) > len(texts) // 2


def test_a_target_that_never_ends_its_questions_is_told_apart():
    sources = Sources(chat_format(make_tokenizer()), [], [], max_question=4, max_answer=4)
    with pytest.raises(ValueError, match="prompts from a file"):
        writer_for(make("llama"), sources, rows=1).write(lambda count: False)


def test_settings_that_cannot_work():
    tokenizer = make_tokenizer()
    options = TrainOptions(batch_tokens=100, max_question=40, max_answer=60)
    setting = Setting(make("llama"), tokenizer, options, ["w5 " * 20, "w6 " * 50])
    assert (len(setting.prompts), setting.num_too_long) == (1, 1)
    with pytest.raises(ValueError, match="dtype=bfloat16"):
        Setting(make("llama", dtype=torch.float16), tokenizer, options)
    with pytest.raises(ValueError, match="leaves room"):
        Setting(make("llama"), tokenizer, options, ["w6 " * 50])
