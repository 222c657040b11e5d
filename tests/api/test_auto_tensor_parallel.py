"""device_map="auto": every layer over two GPUs where one does not hold the model, or the ordinary way. GPUs are
pretended."""

import json

import pytest
import torch
from decoders import TREE
from ranked import folders, prompts
from transformers import LlamaConfig
from zoo import make

import eagle_fast.loading_auto as loading_auto
import eagle_fast.target.placement
from eagle_fast import EaModel
from eagle_fast.loading_auto import plan_over_gpus
from eagle_fast.loading_ranks import plan_of
from eagle_fast.target.packing import Bits
from eagle_fast.target.placement import GIB
from eagle_fast.target.rank_files import cut_of

CPUS = [torch.device("cpu")] * 2
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.fixture
def gpus(monkeypatch):
    """Call with the free GiB of each pretended GPU; those in `alone` reach no other."""

    def pretend(*free, alone=()):
        def budgets(limits):
            return {index: int(gib * GIB) for index, gib in enumerate(free)} | {"cpu": 64 * GIB}

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(
            torch.cuda, "can_device_access_peer", lambda *pair: not set(alone) & {each.index for each in pair}
        )
        monkeypatch.setattr(eagle_fast.target.placement, "get_max_memory", budgets)
        for module in (eagle_fast.target.placement, loading_auto):
            monkeypatch.setattr(module, "free_bytes", lambda device: int(free[device.index] * GIB))

    return pretend


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("8b")
    LLAMA_8B.save_pretrained(folder)
    return str(folder)


def chosen(path, bits=None, **options):
    found = plan_over_gpus(path, options, {"device_map": None, "max_memory": None}, Bits(bits))
    return None if found is None else [each.index for each in found[1]]


def over_cpus(path, options, beside, bits):
    """In the place of `plan_over_gpus`."""
    return plan_of(path, options, bits), CPUS


def test_two_gpus_that_hold_what_one_does_not(path, gpus):
    """8B: 15 GiB in bf16, and a head, a cache and room to work."""
    gpus(80, 80)
    assert chosen(path) is None, "one holds it"
    gpus(16, 16)
    assert chosen(path) == [0, 1]
    assert chosen(path, 8) is None, "in 8 bits one holds it"
    gpus(12, 16, 8, 14)
    assert chosen(path) == [1, 3], "those with the most room"
    gpus(16, 6)
    assert chosen(path) is None, "one is too full for its half"
    for first, second, fits in ((11.8, 10.8, True), (11.8, 10.4, False), (11.3, 10.8, False)):
        gpus(first, second)
        assert (chosen(path) == [0, 1]) is fits, "10.2 each, 0.5 for a part of the head, and the whole on the first"
    gpus(16)
    assert chosen(path) is None


def test_gpus_that_do_not_reach_each_other(path, gpus, monkeypatch):
    gpus(16, 16, alone=[1])
    assert chosen(path) is None
    gpus(16, 16)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert chosen(path) is None


def test_what_ranks_do_not_take_goes_the_ordinary_way(path, gpus, tmp_path):
    gpus(16, 16)
    assert chosen(path, num_hidden_layers=31) is None
    assert plan_over_gpus(path, {}, {"max_memory": {0: "10GiB"}}, Bits()) is None
    assert plan_over_gpus(make("llama"), {}, {}, Bits()) is None
    config = LLAMA_8B.to_dict() | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not know"):
        chosen(str(tmp_path))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return folders(make("qwen3"), tmp_path_factory.mktemp("pair"))


def test_it_is_said_and_there_is_a_way_back(pair, monkeypatch):
    monkeypatch.setattr(loading_auto, "plan_over_gpus", over_cpus)
    with pytest.warns(UserWarning, match=r"device_map='auto'.*cut over cpu and cpu.*tensor_parallel=False spreads"):
        model = EaModel.from_pretrained(**pair, device_map="auto", **TREE)
    assert len(cut_of(model.base_model).ranks) == 2
    single = EaModel.from_pretrained(**pair, device_map="auto", tensor_parallel=False, **TREE)
    assert cut_of(single.base_model) is None
    options = {**prompts(1), "max_new_tokens": 10}
    assert torch.equal(model.eagenerate(**options), single.naivegenerate(**options))
    assert cut_of(EaModel.from_pretrained(**pair, device_map="cpu", **TREE).base_model) is None


def test_what_turns_out_not_to_be_cut_is_loaded_in_the_ordinary_way(pair, monkeypatch, tmp_path):
    """No safetensors files, or a family that is found out: no error of what nobody asked for."""
    monkeypatch.setattr(loading_auto, "plan_over_gpus", over_cpus)
    given = folders(make("gemma3_text"), tmp_path)
    model = EaModel.from_pretrained(**given, device_map="auto", **TREE)
    assert cut_of(model.base_model) is None
