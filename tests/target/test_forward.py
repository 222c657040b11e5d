"""A forward leaves nothing behind: what it set for the layers, and what they left for each other, is taken back."""

import gc
import weakref

import pytest
import torch
from trees import PARENTS, prefill, tree_step
from zoo import make

from eagle_fast.target import Target
from eagle_fast.target.fused import FusedLayer


def left_behind(target):
    """What a target still holds of a forward."""
    contexts = [value for context in target.contexts.values() for value in (context.step, context.slab)]
    return [
        *(each for each in [*contexts, target.handover.hidden, target.handover.normed] if each is not None),
        *(rope.long_rows for rope in target.long_ropes if rope.long_rows is not None),
        *target.transfers._sent,
        *target.features.taken,
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3_longrope", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
def test_nothing_is_left_of_a_forward(name, device):
    target = Target(make(name).to(device), (2, 3, 5))
    tokens = torch.randint(3, 130, (2, 19 + len(PARENTS)), device=device)
    cache = target.new_cache(2, 64)
    prefill(target, tokens[:, :19], cache)
    assert left_behind(target) == []
    target.verify(tokens[:, 19:], tree_step(torch.tensor([19, 13], device=device), device), cache)
    assert left_behind(target) == []
    slab = weakref.ref(cache.slab.slabs[0])
    del cache
    gc.collect()
    assert slab() is None, "a target keeps the keys and values of a call that is over"


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_nothing_is_left_of_a_forward_that_fails(layer, device):
    model = make("llama").to(device)
    target = Target(model, (2, 3, 5))
    tokens = torch.randint(3, 130, (1, 9), device=device)
    expected = target.read(tokens)

    def fail(module, args):
        raise RuntimeError("in the middle")

    assert isinstance(target.decoder.layers[layer], FusedLayer)
    handle = target.decoder.layers[layer].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        target.read(tokens)
    assert left_behind(target) == []
    handle.remove()
    for mine, other in zip(target.read(tokens), expected, strict=True):
        assert torch.equal(mine, other)


def test_attention_outside_of_a_forward_is_an_error(device):
    target = Target(make("llama").to(device), (2,))
    with pytest.raises(AssertionError, match=r"outside of Target\.forward"):
        target.decoder(input_ids=torch.ones(1, 3, dtype=torch.long, device=device), use_cache=False)


def test_experts_are_run_their_own_way_again(device):
    target = Target(make("mixtral").to(device), (2,))
    config = target.experts.model_config
    stock = config._experts_implementation
    target.experts.bytes_per_row = 1  # as on a GPU in a precision that grouped products don't take
    cache = target.new_cache(1, 64)
    tokens = torch.randint(3, 130, (1, len(PARENTS)), device=device)
    seen = []
    handle = target.decoder.register_forward_pre_hook(lambda *_: seen.append(config._experts_implementation))
    target.prefill(tokens[:, :8], 0, cache)
    target.verify(tokens, tree_step(torch.tensor([8], device=device), device), cache)
    handle.remove()
    assert seen == [stock, "batched_mm"]
    assert config._experts_implementation == stock
