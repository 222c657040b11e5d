"""The target over a tree: every node's logits are those of the same path run by itself through the stock model."""

import pytest
import torch
from trees import PARENTS, PROMPT, paths, prefill, tree_step
from zoo import FAMILIES, REFUSED, make

from eagle_fast.target import Target, UnsupportedModel


@torch.no_grad()
def check_tree(model, logits, prefix, nodes, tolerance):
    """logits [T, V] of a tree with tokens `nodes` under `prefix` against the stock model on every root-to-leaf path."""
    own = paths(PARENTS)
    for leaf in set(range(len(own))) - set(PARENTS):
        ids = torch.cat([prefix, nodes[own[leaf]]])[None]
        expected = model(ids, use_cache=False).logits[0, len(prefix) :]
        atol = tolerance * expected.abs().max().item()
        torch.testing.assert_close(logits[own[leaf]], expected, rtol=0, atol=atol)


# phi3_longrope stays below the length at which it changes its frequencies; test_lossless.py crosses it
@pytest.mark.parametrize("name", [*FAMILIES, "gemma2-eager"])
@pytest.mark.filterwarnings("ignore:the model caps its attention scores")
def test_tree_equals_every_path_by_itself(name, device):
    model = make(name.removesuffix("-eager")).to(device)
    if name.endswith("-eager"):
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    target = Target(model, (2, 3, 3))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 130, (2, PROMPT), generator=generator).to(device)
    nodes = torch.randint(3, 130, (2, 2, len(PARENTS)), generator=generator).to(device)
    cache = target.new_cache(2, 64)
    for slab in cache.slab.slabs:
        slab.fill_(1e4)  # what is read before it is written would show
    prefill(target, tokens, cache)
    lengths = torch.tensor([PROMPT, PROMPT - 6], device=device)
    logits, features = target.verify(nodes[0], tree_step(lengths, device), cache)
    for row in range(2):
        check_tree(model, logits[row], tokens[row, : lengths[row]], nodes[0, row], 1e-5)
    assert features.shape == (2, len(PARENTS), 3 * 64)

    path = torch.tensor([paths(PARENTS)[9], paths(PARENTS)[5] + [0, 0]], device=device)
    counts = torch.tensor([5, 3], device=device)
    cache.slab.compact(path, counts, lengths, target.transfers)
    logits, _ = target.verify(nodes[1], tree_step(lengths + counts, device), cache)
    for row in range(2):
        accepted = nodes[0, row][path[row, : counts[row]]]
        check_tree(model, logits[row], torch.cat([tokens[row, : lengths[row]], accepted]), nodes[1, row], 1e-5)
    assert model.config._attn_implementation == before
    assert not any(hasattr(module, "eagle_binding") for module in model.modules())


def test_features_are_the_inputs_of_the_named_layers(device):
    model = make("llama").to(device)
    tokens = torch.randint(3, 130, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        last = model.model.norm  # hidden_states[-1] of transformers is after the norm
    target = Target(model, (2, 5, 6))
    features = prefill(target, tokens, target.new_cache(1, 64))
    torch.testing.assert_close(features[..., :64], out.hidden_states[2], rtol=0, atol=2e-4)
    torch.testing.assert_close(features[..., 64:128], out.hidden_states[5], rtol=0, atol=2e-4)
    torch.testing.assert_close(last(features[..., 128:]), out.hidden_states[-1], rtol=0, atol=2e-4)
    final = Target(model, ())
    torch.testing.assert_close(prefill(final, tokens, final.new_cache(1, 64)), out.hidden_states[-1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_branch_are_refused_with_the_reason(name, device):
    model = make(name).to(device)
    ids = torch.ones(1, 3, dtype=torch.long, device=device)
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises(UnsupportedModel) as error:
        Target(model, ())
    assert len(str(error.value)) > 30
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)


def test_feature_layer_out_of_range():
    with pytest.raises(ValueError, match="boundaries 0 to 6"):
        Target(make("llama"), (2, 7))
