"""Whether decoding with a head gives the bits of plain decoding: measured, told, and traced to a module."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from decoders import decoder, prompt, rebuilt
from row_by_row import compute_row_by_row
from torch import nn
from zoo import FAMILIES, make

from eagle_fast.layers.attention import TreeStep
from eagle_fast.target import Exactness, Target
from eagle_fast.target.bits import measured
from eagle_fast.target.check import check_target
from eagle_fast.target.fused import FusedLayer
from eagle_fast.target.paths import BUSHY, CHAIN, PATH, runs, wide
from eagle_fast.target.rehearsal import MOST_NODES

DENSE = [
    "llama", "llama3_rope", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3",
    "cohere2", "glm4", "starcoder2", "seed_oss", "exaone4",
]  # fmt: skip
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
pytestmark = pytest.mark.filterwarnings("ignore:the model caps its attention scores")


def measure(target, num_nodes=16):
    """What is measured of a target, whatever the rest of the check would say of it."""
    names = [f"model.layers.{index} (Layer)" for index in range(len(target.decoder_layers))]
    cache = target.new_cache(1, 64)
    target.prefill(torch.arange(5, 13, device=target.device)[None], 0, cache)
    with torch.no_grad():
        return measured(target, [*names, "what follows"], cache.slab, 0, num_nodes)


# -- the word ---------------------------------------------------------------------------------------------------------


def test_it_is_one_of_two_words():
    exactness = Exactness("rounding", "lm_head (Linear)", "because")
    assert isinstance(exactness, str)
    assert exactness in {"bitwise", "rounding"}
    assert f"{exactness}" == exactness == "rounding"
    assert (exactness.module, exactness.reason) == ("lm_head (Linear)", "because")
    with pytest.raises(ValueError, match="'bitwise' or 'rounding', not 'exact'"):
        Exactness("exact")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_it_keeps_what_it_says(again):
    same = again(Exactness("rounding", "lm_head (Linear)", "because"))
    assert (same, same.module, same.reason) == ("rounding", "lm_head (Linear)", "because")


# -- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [CHAIN, BUSHY, *map(wide, (5, 6, 17, 60, 63))], ids=lambda form: len(form.parents))
def test_trees_hold_the_path(form):
    assert len(form.path) == PATH
    assert [form.parents[node] for node in form.path] == [-1, *form.path[:-1]]
    assert all(parent < node for node, parent in enumerate(form.parents))


@pytest.mark.parametrize("fuse", [True, False])
def test_rows_that_depend_on_themselves_alone_are_bitwise(fuse, monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,), fuse=fuse)
    exactness = measure(target)
    assert (exactness, exactness.module) == ("bitwise", None)
    assert "61 and 8445" in exactness.reason


class LooksAtTheRows(nn.Module):
    def __init__(self, module, changed):
        super().__init__()
        self.module, self.changed = module, changed

    def forward(self, hidden, *args, **options):
        out = self.module(hidden, *args, **options)
        return self.changed(out)


def by_their_number(out):
    return out + 1e-3 * out.shape[:-1].numel()


def in_large_batches(out):
    return out + 1e-3 * (out.shape[:-1].numel() > 64)


def in_batches(out):
    return out + 1e-3 * (len(out) > 1)


def wrap(parent, name, changed):
    setattr(parent, name, LooksAtTheRows(getattr(parent, name), changed))


def an_mlp(target, changed):
    wrap(target.decoder_layers[2], "mlp", changed)
    return "model.layers.2.mlp (LlamaMLP)"


def a_projection(target, changed):
    wrap(target.decoder_layers[3].self_attn, "o_proj", changed)
    return "model.layers.3.self_attn.o_proj (Linear)"


def the_values(target, changed):
    wrap(target.decoder_layers[5].self_attn, "v_proj", changed)
    return "model.layers.5.self_attn.v_proj (Linear)"


def the_final_norm(target, changed):
    wrap(target.decoder, "norm", changed)
    return "model.norm (LlamaRMSNorm)"


def the_lm_head(target, changed):
    wrap(target.model, "lm_head", changed)
    return "lm_head (Linear)"


@pytest.mark.parametrize("changed", [by_their_number, in_large_batches, in_batches], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "fault", [an_mlp, a_projection, the_values, the_final_norm, the_lm_head], ids=lambda f: f.__name__
)
def test_the_module_is_found(fault, changed, monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,), fuse=False)
    module = fault(target, changed)
    exactness = measure(target)
    assert (exactness, exactness.module) == ("rounding", module)
    assert exactness.reason.startswith(f"{module} gives a row other bits in ")
    assert ("a batch of " in exactness.reason) == (changed is not by_their_number)


def test_of_a_fused_layer_the_layer_is_named(monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,))
    layer = target.decoder_layers[4]
    assert isinstance(layer, FusedLayer)
    monkeypatch.setattr(layer, "down", copy.copy(layer.down))
    layer.down.sums = lambda rows: type(layer.down).sums(layer.down, rows) + 1e-3 * len(rows)
    assert measure(target).module == "model.layers.4 (Layer)"


def test_attention_that_adds_up_by_tiles_of_the_tree_is_found(monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,), fuse=False)
    attend = TreeStep.attend

    def nudged(self, q, *args, **options):
        return attend(self, q, *args, **options) * (1 + 1e-6 * (q.shape[2] > 5))

    monkeypatch.setattr(TreeStep, "attend", nudged)
    exactness = measure(target)
    assert exactness.module == "model.layers.0.self_attn (LlamaAttention)"
    assert "a tree of 12 nodes" in exactness.reason


def test_what_happens_deep_in_a_text_is_found(monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,), fuse=False)
    attend = TreeStep.attend

    def nudged(self, q, *args, **options):
        deep = (self.lengths > 4000).view(-1, 1, 1, 1)
        return torch.where(deep, 1 + 1e-6 * q.shape[2], 1.0) * attend(self, q, *args, **options)

    monkeypatch.setattr(TreeStep, "attend", nudged)
    assert "at position 8445" in measure(target).reason


def test_numbers_that_are_none_are_equal(monkeypatch):
    compute_row_by_row(monkeypatch)
    target = Target(make("llama"), (2,), fuse=False)
    wrap(target.decoder_layers[2], "mlp", lambda out: out * float("nan"))
    assert measure(target) == "bitwise"


def test_before_the_size_of_trees_is_known_the_largest_is_tried():
    target = Target(make("llama"), (2,))
    cache = target.new_cache(1, 64)
    sizes = [[len(run.form.parents) for _, others in runs(target, cache.slab, 0, n) for run in others] for n in (9, -1)]
    assert sizes[0] == [5, 12, 9, 17, 12, 5, 12, 9, 33]
    assert max(sizes[1]) == MOST_NODES


def test_learned_positions_that_end_early_are_kept_to():
    target = Target(make("gpt2", n_positions=40), (2,))
    check_target(target, 60)
    assert target.exactness in {"bitwise", "rounding"}


def test_without_memory_for_it_nothing_is_promised(monkeypatch):
    target = Target(make("llama"), (2,))
    verify = target.verify

    def out_of_memory(tokens, *rest):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return verify(tokens, *rest)

    compute_row_by_row(monkeypatch)
    target.verify = out_of_memory
    assert measure(target).reason == "bits were not compared, so texts may differ by rounding"


# -- what a model is told to be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_measured_holds_for_a_text(dtype, device):
    """A chain of five tokens behind a prompt, against the same decoded one by one."""
    if device.type != "cpu" and dtype == torch.float64:
        pytest.skip("kernels take no float64")
    target = Target(make("llama").to(device, dtype), (2,))
    check_target(target)
    tokens, lengths = torch.arange(40, 45, device=device)[None], torch.tensor([61], device=device)
    cache = target.new_cache(1, 128)
    target.prefill(torch.arange(3, 64, device=device)[None], 0, cache)
    root = torch.ones(1, 1, 1, dtype=torch.long, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
    alone = [target.verify(tokens[:, i : i + 1], TreeStep(lengths + i, *root), cache).logits for i in range(5)]
    ancestors = torch.tensor([1, 3, 7, 15, 31], device=device).view(1, 5, 1)
    chain = target.verify(tokens, TreeStep(lengths, ancestors, torch.arange(5, device=device)[None]), cache).logits
    same = torch.equal(torch.cat(alone, 1), chain)
    assert target.exactness in {"bitwise", "rounding"}
    assert same or target.exactness == "rounding"
    assert (target.exactness == "rounding") == (target.exactness.module is not None)


def test_before_the_check_nothing_is_promised():
    exactness = Target(make("llama"), (2,)).exactness
    assert (exactness, exactness.module) == ("rounding", None)
    assert "not compared" in exactness.reason


def test_it_follows_the_base_model(monkeypatch):
    compute_row_by_row(monkeypatch)
    cpu = torch.device("cpu")
    model, ids = rebuilt(decoder("llama", cpu)), prompt(11, cpu)
    assert model.exactness == "bitwise"
    attend = TreeStep.attend
    monkeypatch.setattr(TreeStep, "attend", lambda self, q, *rest, **options: (
        attend(self, q, *rest, **options) * (1 + 1e-6 * (q.shape[2] > 1))
    ))  # fmt: skip
    model.base_model.model.layers[3].mlp.register_forward_hook(lambda module, args, out: 1.1 * out)
    model.eagenerate(ids, max_new_tokens=2)
    assert model.exactness == "rounding"
    assert model.exactness.module == "model.layers.0 (LlamaDecoderLayer)"
    assert model.exactness is model.target.exactness


def test_offloaded_models_are_not_measured():
    cpu = torch.device("cpu")
    model = cpu_offload(make("llama"), cpu)
    model._hf_hook.execution_device = cpu
    with pytest.warns(UserWarning, match="rounds run many times slower"):
        target = Target(model, (2,))
    check_target(target)
    assert (target.exactness, target.exactness.module) == ("rounding", None)
    assert "offloaded" in target.exactness.reason


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", DENSE)
def test_dense_families_are_bitwise(name, fuse, dtype, device):
    target = Target(make(name).to(device, dtype), (2,), fuse=fuse)
    for num_nodes in (16, 60):
        check_target(target, num_nodes)
        assert target.exactness == "bitwise", target.exactness.reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_name_the_module(name, dtype, device):
    target = Target(make(name).to(device, dtype), (2,))
    check_target(target, 60)
    assert target.exactness in {"bitwise", "rounding"}
    assert (target.exactness == "rounding") == (target.exactness.module is not None)


def test_the_families_exist():
    assert {*DENSE, *MIXTURES} <= set(FAMILIES)
