"""The draft's scores are the probabilities of what the target will choose, where its logits err as they are said to."""

import pytest
import torch
from eagle_fast_kernels.lm_head_topk import lm_head_topk_ref
from eagle_fast_kernels.noise import gumbel_row_ref

from eagle_fast.config import SamplingParams
from eagle_fast.decoding.sampling import SHARPNESS, SamplingTensors, draft_scales

VOCAB, DRAWS = 12, 100_000


def loaded(temperature, shared_noise):
    """The settings of one sequence."""
    sampling = SamplingTensors(1, torch.device("cpu"))
    sampling.load(SamplingParams(temperature, seed=5), shared_noise)
    return sampling


def draft_scores(z, sampling, position):
    """log_softmax of all tokens [V] as a draft with logits z [V] scores them, in the order of the vocabulary."""
    scores, tokens = lm_head_topk_ref(
        torch.ones(1, 1), z[:, None], VOCAB, gain=sampling.draft_gain, share=sampling.draft_share, positions=position,
        seeds=sampling.seeds, sequences=sampling.sequences,
    )  # fmt: skip
    return scores[0][tokens[0].argsort()]


def check(frequencies, probabilities):
    """Frequencies of DRAWS draws within four standard errors of their probabilities [V]."""
    error = (probabilities * (1 - probabilities) / DRAWS).sqrt() + 1e-5
    assert ((frequencies - probabilities).abs() < 4 * error).all()


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 1.7])
def test_scores_under_shared_noise_are_frequencies_of_the_choice(temperature):
    """Target logits drawn from the model of the docstring, k z + e, with the position's noise held fixed."""
    generator = torch.Generator().manual_seed(1)
    z = 2 * torch.randn(VOCAB, generator=generator)
    sampling, position = loaded(temperature, True), torch.tensor([9])
    noise = gumbel_row_ref(sampling.seeds, sampling.sequences, position, VOCAB)[0]
    errors = -torch.empty(DRAWS, VOCAB).exponential_(generator=generator).log()
    chosen = (SHARPNESS * z + errors + temperature * noise).argmax(-1)
    check(torch.bincount(chosen, minlength=VOCAB) / DRAWS, draft_scores(z, sampling, position).exp())


def test_scores_without_noise():
    """Greedy: as under noise of temperature 0. At T = 1: the head's own probabilities. Between and beyond: monotone."""
    z = torch.linspace(-2, 3, VOCAB)
    position = torch.tensor([9])
    greedy = draft_scores(z, loaded(0.0, False), position)
    torch.testing.assert_close(greedy, (SHARPNESS * z).log_softmax(-1))
    torch.testing.assert_close(greedy, draft_scores(z, loaded(0.0, True), position))
    torch.testing.assert_close(draft_scores(z, loaded(1.0, False), position), z.log_softmax(-1))
    gains = [draft_scales(temperature, False).gain for temperature in (0.0, 0.3, 0.7, 1.0, 2.0, 10.0)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0
