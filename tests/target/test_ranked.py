"""A model cut over ranks, all on the CPU: the text of the model on one device, whatever is cut and however unevenly."""

import copy

import pytest
import torch
from decoders import TREE
from eagle_fast_kernels import many_rows
from fake_devices import FakeDevices
from machine import linked
from often_right import write_often_right_head, write_random_head
from ranked import both, folders, prompts
from trees import PARENTS, tree_step
from zoo import make

from eagle_fast import EaModel
from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.linear import FewRowsLinear
from eagle_fast.layers.links import OutOfStepError
from eagle_fast.layers.slab import KVSlab
from eagle_fast.loading import load_head
from eagle_fast.loading_ranks import load_cut_target
from eagle_fast.target.anatomy import UnsupportedModel
from eagle_fast.target.packing import Bits
from eagle_fast.target.rank_files import cut_model
from eagle_fast.target.ranked import RankedTarget
from eagle_fast.target.ranks import cut_bytes, cuts_for

NEW = 40
FUSED = ["llama", "llama3_rope", "qwen2", "qwen2_sliding", "qwen3", "mistral"]
# family, its settings, ranks
ODD = {
    "three key heads over two": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, 2),
    "one key head over two": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, 2),
    "two key heads over three": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2}, 3),
    "tied embeddings": ("qwen3", {"tie_word_embeddings": True}, 2),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}, 3),
    "an odd width": ("mistral", {"intermediate_size": 97}, 2),
}


def check_same(pair, new=NEW):
    for batch in (1, 3):
        for options in ({}, {"temperature": 1.0, "seed": 7}):
            options = {**prompts(batch), **options, "max_new_tokens": new}
            expected = pair.single.naivegenerate(**options)
            assert torch.equal(pair.ranked.eagenerate(**options), expected)
            assert torch.equal(pair.ranked.naivegenerate(**options), expected)


@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in FUSED), ("llama", 4)])
def test_text_of_every_family(name, ranks):
    pair = both(make(name), ["cpu"] * ranks)
    check_same(pair)
    out = pair.ranked.eagenerate(**prompts(1), max_new_tokens=NEW, return_dict_in_generate=True)
    assert out.statistics.tau > 3


@pytest.mark.parametrize("case", ODD)
def test_text_of_odd_cuts(case):
    name, settings, ranks = ODD[case]
    check_same(both(make(name, **settings), ["cpu"] * ranks, writer=write_random_head), new=12)


def test_biases_that_are_not_zero():
    model = make("llama", attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(std=0.5, generator=generator)
    check_same(both(model, ["cpu"] * 2, writer=write_random_head), new=12)


def test_text_of_an_eagle1_head():
    def write(model, folder):
        write_often_right_head(model, folder, "eagle")

    check_same(both(make("llama"), writer=write))


def target_of(model, devices, boundaries=(0, 3, 6)):
    return RankedTarget(model, *cut_model(model, devices), boundaries)


def test_hidden_states_of_every_boundary():
    """Of a prompt and then a tree, what the head reads and the logits are the stock model's."""
    model, cpu = make("qwen3"), torch.device("cpu")
    target = target_of(model, [cpu] * 2)
    ids = prompts(1)["input_ids"]
    cache = target.new_cache(1, 64)
    features = target.prefill(ids, 0, cache)
    out = model(ids, output_hidden_states=True)
    expected = [out.hidden_states[0], out.hidden_states[3]]
    assert torch.allclose(features[..., : 2 * 64], torch.cat(expected, -1), atol=1e-4)
    final = target_of(model, [cpu] * 3, ()).prefill(ids, 0, target_of(model, [cpu] * 3).new_cache(1, 64))
    assert torch.allclose(final, out.hidden_states[-1], atol=1e-4)
    chain = torch.tensor([[[1], [3]]])
    step = TreeStep(torch.tensor([19]), chain, torch.tensor([[0, 1]]))
    told = target.verify(torch.tensor([[40, 41]]), step, cache)
    more = torch.cat([ids, torch.tensor([[40, 41]])], 1)
    assert torch.allclose(told.logits, model(more).logits[:, -2:], atol=1e-3)


def test_nothing_meets_on_another_device():
    """Numbered devices refuse tensors of others: every rank works with its own, and the text is the same."""
    model, fakes = make("qwen3", num_attention_heads=6, num_key_value_heads=3), [torch.device("cpu", n) for n in (0, 1)]
    here = target_of(model, [torch.device("cpu")] * 2)
    ids = prompts(1)["input_ids"]
    cache = here.new_cache(1, 64)
    features = here.prefill(ids, 0, cache)
    nodes = torch.arange(30, 30 + len(PARENTS))[None]
    accepted = torch.tensor([[0, 2]]), torch.tensor([2]), torch.tensor([19])  # path, counts, lengths
    with FakeDevices():
        there = target_of(copy.deepcopy(model), fakes)
        far = there.new_cache(1, 64)
        assert {shape.device for shape in there.layer_shapes} == set(fakes)
        assert [shape.num_heads for shape in there.layer_shapes[:: len(there.ranks[0].layers)]] == [2, 1]
        assert torch.allclose(there.prefill(ids.to(fakes[0]), 0, far).cpu(), features, atol=1e-5)
        told = there.verify(nodes.to(fakes[0]), tree_step(torch.tensor([19]).to(fakes[0]), fakes[0]), far)
        path = [each.to(fakes[0]) for each in accepted]
        far.slab.compact(*path, there.transfers)
        logits, rows = told.logits.cpu(), [far.slab.keys[layer].cpu()[:, :, 19:21] for layer in (0, 5, 6, 11)]
    assert torch.allclose(logits, here.verify(nodes, tree_step(torch.tensor([19]), "cpu"), cache).logits, atol=1e-4)
    cache.slab.compact(*accepted, here.transfers)
    for layer, moved in zip((0, 5, 6, 11), rows, strict=True):
        assert torch.allclose(cache.slab.keys[layer][:, :, 19:21], moved, atol=1e-4)


def test_a_rank_holds_its_share():
    model = make("llama")
    ranks = cut_model(model, [torch.device("cpu")] * 2).ranks
    whole = sum(weight.nbytes for name, weight in model.named_parameters() if "norm" not in name)
    embedding = model.get_input_embeddings().weight.nbytes
    assert sum(rank.num_bytes - embedding for rank in ranks) == whole - embedding
    assert [rank.num_bytes for rank in ranks] == cut_bytes(model, cuts_for(model, 2))
    pointers = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = [part.weight for rank in ranks for layer in rank.layers for part in (layer.qkv, layer.o, layer.down)]
    assert not pointers & {weight.untyped_storage().data_ptr() for weight in held}


def test_what_a_rank_adds_to_a_sum_is_never_rounded_before(triton_kernels, device, monkeypatch):
    """Of more rows than the kernel takes too, where the sum of its parts would be faster to have, but rounded."""
    monkeypatch.setattr(many_rows, "_takes", lambda x, weight, gated=False: x.shape[:-1].numel() > 64)
    faster = {many_rows.EITHER: many_rows.Way(70, False)}
    monkeypatch.setattr(many_rows, "exact_way", lambda shape, forms: faster.get(forms))
    monkeypatch.setattr(FewRowsLinear, "_keeps_order", lambda linear, input: True)  # as on a GPU
    cut = cut_model(make("llama", dtype=torch.bfloat16), [torch.device(device)] * 2)
    layer = cut.ranks[1].layers[0]
    slab, ones = KVSlab([layer.shape], 70, 64), torch.ones(70, 1, dtype=torch.long, device=device)
    step, rows = TreeStep(0 * ones[:, 0], ones[..., None], 0 * ones), torch.randn(70, 64, device=device).bfloat16()
    rotation = torch.ones(70, 16, device=device).bfloat16(), torch.zeros(70, 16, device=device).bfloat16()
    for product in (layer.mlp(rows), layer.attend(rows, rotation, step, slab)):
        assert product.dtype == torch.float32
        assert product.shape[1:] == rows.shape


def test_a_tied_lm_head_is_a_view_of_the_embedding():
    for rank in cut_model(make("qwen3", tie_word_embeddings=True), [torch.device("cpu")] * 2).ranks:
        assert rank.lm_head.weight.untyped_storage().data_ptr() == rank.embedding.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text", "phi3_longrope", "olmo2", "gpt2"])
def test_other_families_are_refused_with_the_way(name):
    with pytest.raises(UnsupportedModel, match=r"Llama, Mistral, Qwen2 and Qwen3.*device_map='balanced'"):
        cuts_for(make(name), 2)


def test_more_ranks_than_query_heads():
    with pytest.raises(UnsupportedModel, match=r"over 5 ranks: .* cannot be dealt .*device_map='balanced'"):
        cuts_for(make("llama"), 5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_text_through_peer_links(ranks, monkeypatch):
    """As GPUs exchange, played on the CPU: no rank waits for what the host has yet to launch, in prefill and rounds."""
    machine = linked(monkeypatch)
    monkeypatch.setattr("eagle_fast.decoding.round.PREFILL_CHUNK", 8)
    pair = both(make("qwen3"), ["cpu"] * ranks)
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        options = {**prompts(3), **options, "max_new_tokens": 12}
        assert torch.equal(pair.ranked.eagenerate(**options), pair.single.naivegenerate(**options))
    assert not machine.waiting
    before = machine.synchronized
    pair.ranked.eagenerate(**options)
    assert machine.synchronized == before, "once all is loaded, nothing waits for a device"


@pytest.mark.filterwarnings("ignore:.*packed weights")
@pytest.mark.parametrize("bits", [None, 8])
def test_rounds_over_devices_that_do_not_mix(bits, monkeypatch, tmp_path):
    """Whole rounds through the links of GPUs: between devices goes what kernels of exchanges push, and nothing else."""
    linked(monkeypatch)
    paths, fakes = folders(make("qwen3"), tmp_path), [torch.device("cpu", index) for index in range(2)]
    single = EaModel.from_pretrained(**paths, target_bits=bits, **TREE)
    with FakeDevices() as devices:
        base = load_cut_target(paths["base_model_path"], fakes, {}, {}, Bits(bits))
        ranked = EaModel(base, load_head(paths["ea_model_path"], base), tree=single.tree)
        devices.between_devices()
        for options in ({}, {"temperature": 1.0, "seed": 7}):
            options = {**prompts(3), **options, "max_new_tokens": 12}
            expected = single.naivegenerate(**options)
            assert torch.equal(ranked.eagenerate(**options), expected)
            assert torch.equal(ranked.naivegenerate(**options), expected)
        assert {copy.where for copy in devices.between_devices()} == {"send", "gather", "_launch"}


def test_a_wait_that_ran_out_ends_the_call_and_no_other(monkeypatch):
    machine = linked(monkeypatch)
    pair = both(make("llama"))
    expected = pair.ranked.eagenerate(**prompts(1), max_new_tokens=20)
    running = pair.ranked.ea_generate(**prompts(1), max_new_tokens=20)
    next(running)
    machine.boxes[1].told.fill_(1 + 256)
    with pytest.raises(OutOfStepError, match=r"rank 1 .* waited in vain for rank 0"):
        next(running)
    assert torch.equal(pair.ranked.eagenerate(**prompts(1), max_new_tokens=20), expected)
