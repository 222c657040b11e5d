"""Calls into transformers use the names of the day: nothing is deprecated, and nothing warns without a cause."""

import warnings

import pytest
import torch
from decoders import decoder, prompt

NEW = 6
CALLS = {
    "eagenerate": lambda model, ids: model.eagenerate(ids, max_new_tokens=NEW),
    "naivegenerate": lambda model, ids: model.naivegenerate(ids, max_new_tokens=NEW),
    "generate": lambda model, ids: model.generate(ids, max_new_tokens=NEW, do_sample=False),
    "custom_generate": lambda model, ids: model.base_model.generate(
        ids, max_new_tokens=NEW, do_sample=False, custom_generate=model.custom_generate
    ),
    "forward": lambda model, ids: model(ids, output_orig=True),
    "read": lambda model, ids: model.target.read(ids),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "mixtral"]
)  # fused; learned positions; kinds; experts
def test_no_call_is_deprecated(name, call, device, caplog):
    model, ids = decoder(name, device), prompt(11, device)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*", DeprecationWarning, module=r"(torch|numpy)\b")
        CALLS[call](model, ids)
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]


def test_a_cache_of_the_users_goes_under_the_name_of_the_day(device):
    model, ids = decoder("llama", device), prompt(11, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = model(ids)
        cache = model(ids[:, :-1])[0]
        cache = next(cache[name] for name in ("cache", "past_key_values") if cache.get(name) is not None)
        outputs, hidden = model(ids[:, -1:], past_key_values=cache)
    torch.testing.assert_close(hidden[:, -1], whole[0][:, -1], rtol=0, atol=1e-4)
    assert torch.equal(outputs[0], hidden)
