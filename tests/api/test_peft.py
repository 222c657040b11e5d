"""Adapters of PEFT: what is active at a call is part of the target, wherever it came from and whenever."""

import copy

import pytest
import torch
from decoders import TREE, decoder, prompt

from eagle_fast import EaModel

peft = pytest.importorskip("peft")
NEW = 24


def lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], **options)


def randomize(model, seed):
    """Adapters begin as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and not parameter.any():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def wrapped(name, device):
    plain = decoder(name, device)
    model = peft.get_peft_model(copy.deepcopy(plain.base_model), lora(), adapter_name="a")
    randomize(model, 1)
    model.add_adapter("b", lora())
    randomize(model, 2)
    return model.eval(), plain


def check(model, base, ids):
    with torch.no_grad():
        expected = base.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        logits = base(input_ids=ids).logits
    assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    return logits


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
def test_adapters_are_switched_disabled_merged_and_deleted(name, device):
    base, plain = wrapped(name, device)
    ids = prompt(11, device)
    model = EaModel(base, plain.ea_layer, tree=plain.tree)
    seen = [check(model, base, ids)]
    base.set_adapter("b")
    seen.append(check(model, base, ids))
    base.set_adapter("a")
    with base.disable_adapter():
        seen.append(check(model, base, ids))
    check(model, base, ids)
    base.merge_adapter()
    check(model, base, ids)
    base.unmerge_adapter()
    base.delete_adapter("b")
    check(model, base, ids)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(seen[first], seen[second], atol=0.1), "the adapter does not show"


def test_an_adapter_that_is_added_later(device):
    plain, ids = decoder("llama", device), prompt(11, device)
    base = copy.deepcopy(plain.base_model)
    model = EaModel(base, plain.ea_layer, tree=plain.tree)
    before = check(model, base, ids)
    around = peft.get_peft_model(base, lora())  # into the same model
    randomize(around, 3)
    assert not torch.allclose(check(model, base, ids), before, atol=0.1)
    assert TREE["total_token"] == model.tree.total_token
    around.unload()
    assert torch.allclose(check(model, base, ids), before, atol=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_adapters_that_put_tokens_in_front_are_refused(kind, device):
    plain = decoder("llama", device)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = peft.get_peft_model(copy.deepcopy(plain.base_model), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        EaModel(base, plain.ea_layer, tree=plain.tree)


@pytest.mark.parametrize("given", ["LoraModel", "PeftMixedModel", "VeRA"])
def test_wrappers_of_all_kinds_are_decoded(given, device):
    plain, ids = decoder("llama", device), prompt(11, device)
    config = peft.VeraConfig(r=4, target_modules=["q_proj"]) if given == "VeRA" else lora()
    base = peft.get_peft_model(copy.deepcopy(plain.base_model), config, mixed=given == "PeftMixedModel").eval()
    randomize(base, 1)
    base = base.base_model if given == "LoraModel" else base
    check(EaModel(base, plain.ea_layer, tree=plain.tree), base, ids)


def test_adapters_that_a_call_chooses_are_refused(device):
    base, plain = wrapped("llama", device)
    model, ids = EaModel(base, plain.ea_layer, tree=plain.tree), prompt(11, device)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(ids, max_new_tokens=4, adapter_names=["a"])
    check(model, base, ids)


def test_adapters_that_a_prompt_switches_on_are_refused(device):
    plain = decoder("llama", device)
    config = lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(ValueError, match="activated LoRA"):
        EaModel(peft.get_peft_model(copy.deepcopy(plain.base_model), config), plain.ea_layer, tree=plain.tree)


def test_attention_that_an_adapter_replaces_is_no_raw_error(device):
    plain, ids = decoder("llama", device), prompt(11, device)
    base = copy.deepcopy(plain.base_model)
    model = EaModel(base, plain.ea_layer, tree=plain.tree)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    around = peft.get_peft_model(base, config).eval()
    check(model, base, ids)
    with pytest.raises(ValueError, match="does not route attention"):
        EaModel(around, plain.ea_layer, tree=plain.tree)
