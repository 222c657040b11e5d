"""Device maps: what they mean, and what is refused before anything is loaded. No GPU is needed: their number and their
memory are pretended."""

import warnings

import pytest
import torch
from decoders import TREE, prompt, stock
from often_right import write_often_right_head
from transformers import LlamaConfig, Qwen3Config
from zoo import LAYERS, make

import eagle_fast.target.placement
from eagle_fast import EaModel
from eagle_fast.target.placement import GIB, plan_placement, skeleton

HALVES = [*(0,) * 3, *(1,) * 3]
LAYER_NAMES = [f"model.layers.{n}" for n in range(LAYERS)]


@pytest.fixture
def gpus(monkeypatch):
    """Call with the free GiB of each pretended GPU."""

    def pretend(*free):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(eagle_fast.target.placement, "free_bytes", lambda device: int(free[device.index] * GIB))
        budgets = {index: int(gib * GIB) for index, gib in enumerate(free)} | {"cpu": 64 * GIB}
        given = eagle_fast.target.placement.get_max_memory
        monkeypatch.setattr(
            eagle_fast.target.placement,
            "get_max_memory",
            lambda limits: dict(budgets) if limits is None else given(limits),
        )

    return pretend


def cuda(*numbers):
    return [torch.device("cuda", number) for number in numbers]


def by_layer(placement):
    return [placement[name].index for name in LAYER_NAMES]


def full_map(numbers, **others):
    return {"model.embed_tokens": numbers[0], **dict(zip(LAYER_NAMES, numbers, strict=True))} | {
        "model.norm": others.get("norm", numbers[-1]), "lm_head": others.get("head", numbers[-1]),
    }  # fmt: skip


@pytest.mark.parametrize(
    "numbers", [HALVES, HALVES[::-1], [0, 0, 2, 2, 2, 2], [0, 1, 0, 1, 0, 1], [2, 1, 0, 0, 1, 2]], ids=str
)
def test_maps_by_name(numbers, gpus):
    gpus(80, 80, 80)
    given = full_map(numbers, norm=1, head=0)
    shuffled = dict(sorted(given.items(), reverse=True))
    for device_map in (given, shuffled, {name: f"cuda:{number}" for name, number in given.items()}):
        placement = plan_placement(make("llama"), device_map)
        assert by_layer(placement) == numbers
        assert next(iter(placement)) == "model.embed_tokens"
        assert next(iter(placement.values())) == torch.device("cuda", numbers[0])
        assert (placement["model.norm"].index, placement["lm_head"].index) == (1, 0)
        assert placement["model.rotary_emb"] == placement["model.embed_tokens"]


def test_prefixes_and_coarse_maps(gpus):
    gpus(80, 80)
    model = make("llama", num_hidden_layers=12)
    placement = plan_placement(model, {"": 0, "model.layers.1": 1})
    found = [name for name, device in placement.items() if device == torch.device("cuda", 1)]
    assert found == ["model.layers.1"]  # and not 10 and 11
    assert set(plan_placement(model, {"model": 1, "lm_head": 0}).values()) == set(cuda(0, 1))
    assert list(plan_placement(make("gpt2"), {"": 0, "lm_head": 1}))[:2] == ["transformer.wte", "transformer.wpe"]


REFUSED = {
    "missing layers": (
        {n: d for n, d in full_map(HALVES).items() if "layers.2" not in n},
        r"no device to model.layers.2$",
    ),
    "missing many": ({"model.embed_tokens": 0}, r"no device to model.layers.0, .* model.layers.5, model.norm, lm_head"),
    "unknown": (
        full_map(HALVES) | {"model.layers.6": 0, "transformer.h": 1},
        r"names model.layers.6, transformer.h, whi",
    ),
    "absent GPU": (full_map([0, 0, 1, 1, 2, 2]), r"device_map\['model.layers.4'\]=2: 'cuda:2', but torch sees 2 GPU"),
    "negative": (full_map([0, 0, 0, 0, 0, -1]), r"device_map\['model.layers.5'\]=-1: use"),
    "no device": (full_map(HALVES) | {"lm_head": "gpu"}, r"device_map\['lm_head'\]='gpu': use"),
    "meta": (full_map(HALVES) | {"lm_head": "meta"}, r"eagle_fast runs on CUDA GPUs and on the CPU"),
    "split layer": (
        full_map(HALVES) | {"model.layers.1.mlp": 1},
        r"spreads model.layers.1 over cuda:0, cuda:1: give it",
    ),
    "strategy": ("balance", r"device_map='balance': use 'auto'.* 'balanced'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_maps(name, gpus):
    gpus(80, 80)
    device_map, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        plan_placement(make("llama"), device_map)


LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, dtype=torch.bfloat16,
)  # fmt: skip
QWEN3_4B = Qwen3Config(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True, dtype=torch.bfloat16,
)  # fmt: skip


def runs(placement):
    """Devices of the layers, repeats left out; how many each has."""
    devices = [device for name, device in placement.items() if ".layers." in name]
    order = list(dict.fromkeys(devices))
    assert [each for device in order for each in [device] * devices.count(device)] == devices  # contiguous
    return [(str(device), devices.count(device)) for device in order]


def test_strategies_on_several_gpus(gpus):
    gpus(80, 80, 80, 80)
    assert plan_placement(LLAMA_8B, "auto") == {"": torch.device("cuda", 0)}
    assert plan_placement(LLAMA_8B, "auto", {2: "40GiB", 3: "40GiB"}) == {"": torch.device("cuda", 2)}
    balanced = plan_placement(LLAMA_8B, "balanced")
    assert [device for device, _ in runs(balanced)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert next(iter(balanced.items())) == ("model.embed_tokens", torch.device("cuda", 0))
    low = dict(runs(plan_placement(LLAMA_8B, "balanced_low_0")))
    assert low.get("cuda:0", 0) < low["cuda:1"]
    sequential = plan_placement(LLAMA_8B, "sequential", {0: "6GiB", 1: "40GiB"})
    assert [device for device, _ in runs(sequential)] == ["cuda:0", "cuda:1"]
    assert set(plan_placement(LLAMA_8B, "sequential").values()) == set(cuda(0))
    tied = plan_placement(QWEN3_4B, "balanced")
    assert tied["model.embed_tokens"] == tied["lm_head"]
    assert len(runs(tied)) == 4


def test_an_embedding_tied_to_the_lm_head_goes_with_it(gpus):
    gpus(80, 80)
    layers = {f"model.layers.{n}": n // 18 for n in range(36)}
    device_map = {"model.embed_tokens": 0, **layers, "model.norm": 1, "lm_head": 1}
    with pytest.warns(UserWarning, match="model.embed_tokens and lm_head are one tied weight: both go to cuda:1"):
        tied = plan_placement(QWEN3_4B, device_map)
    assert tied["model.embed_tokens"] == tied["lm_head"] == torch.device("cuda", 1)


def test_auto_spreads_what_one_gpu_cannot_hold(gpus):
    """8B in bf16: 15 GiB of weights, and the head, a cache and room to work beside them."""
    gpus(16, 16)
    assert len(runs(plan_placement(LLAMA_8B, "auto"))) == 2
    gpus(20, 20)
    assert plan_placement(LLAMA_8B, "auto") == {"": torch.device("cuda", 0)}
    assert len(runs(plan_placement(LLAMA_8B, "auto", dtype=torch.float32))) == 2


def test_a_gpu_too_small_is_named_with_the_numbers(gpus):
    gpus(80, 4)
    with pytest.raises(ValueError, match=r"cuda:1 would have to hold 15.0 GiB of weights and has room for 4.0 GiB"):
        plan_placement(LLAMA_8B, 1)
    device_map = {"": 0, **{f"model.layers.{n}": 1 for n in range(16, 32)}}
    with pytest.raises(ValueError, match=r"cuda:1 would have to hold 6.5 GiB .* 4.0 GiB \(the whole model: 15.0 GiB\)"):
        plan_placement(LLAMA_8B, device_map)
    with pytest.raises(ValueError, match=r"cuda:0 would have to hold 15.0 GiB of weights and has room for 10.0 GiB"):
        plan_placement(LLAMA_8B, 0, {0: "10GiB"})


def test_what_the_gpus_cannot_hold_goes_to_the_cpu(gpus):
    gpus(6, 6)
    placement = plan_placement(LLAMA_8B, "auto")
    assert torch.device("cpu") in placement.values()
    assert "disk" in plan_placement(LLAMA_8B, "auto", {0: "6GiB"}).values()


def test_no_gpu(gpus):
    gpus()
    for strategy in ("auto", "balanced", "sequential"):
        assert plan_placement(LLAMA_8B, strategy) == {"": torch.device("cpu")}


def test_a_skeleton_has_no_weights():
    model = skeleton(QWEN3_4B)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert skeleton(QWEN3_4B, torch.float32).dtype == torch.float32
    assert QWEN3_4B.dtype == torch.bfloat16, "the config is as it was"


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target, head) as folders."""
    root = tmp_path_factory.mktemp("pair")
    model = make("llama")
    model.save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return str(root / "target"), str(root / "head")


def test_nothing_is_loaded_where_it_cannot_fit(pair, gpus, monkeypatch):
    gpus(80, 1e-6)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    target, head = pair
    for options, message in (
        ({"device_map": 1}, "cuda:1 would have to hold 0.0 GiB of weights"),
        ({"device_map": full_map(HALVES)}, "cuda:1 would have to hold"),
        (
            {"device_map": "balanced", "max_memory": {0: 300_000}},
            r"no room for 0.0 of 0.0 GiB of weights \(max_memory=\{0: 3000",
        ),
        ({"device_map": "balanced", "draft_device": 2}, r"draft_device=2: 'cuda:2', but torch sees 2 GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            EaModel.from_pretrained(base_model_path=target, ea_model_path=head, **options)


def test_disk_entries_keep_the_hooks_of_accelerate(pair, tmp_path):
    """Two layers and the lm_head on disk, everything else on the CPU: slower, one warning, the same text."""
    target, head = pair
    device_map = dict.fromkeys(full_map([0] * 6), "cpu") | dict.fromkeys(("model.layers.1", "model.layers.4"), "disk")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = EaModel.from_pretrained(
            base_model_path=target, ea_model_path=head, device_map=device_map | {"lm_head": "disk"},
            offload_folder=str(tmp_path), **TREE,
        )  # fmt: skip
        ids = prompt(11, torch.device("cpu"))
        out = model.eagenerate(ids, max_new_tokens=24, return_dict_in_generate=True)
    assert [str(each.message)[:40] for each in seen if "accelerate brings" in str(each.message)] == [
        "some of the weights lie on the CPU or on"
    ]
    assert not [each for each in seen if "CUDA graph, which" in str(each.message)]
    assert model.device_map["model.layers.4"] == model.device_map["lm_head"] == "disk"
    assert next(iter(model.device_map.items())) == ("model.embed_tokens", torch.device("cpu"))
    assert torch.equal(out.sequences, make("llama").generate(ids, do_sample=False, max_new_tokens=24))
    assert torch.equal(out.sequences, stock(model, ids, max_new_tokens=24)), "base_model is as it was"
    assert out.statistics.tau > 3
    target = model.target
    model.base_model.model.layers[4].mlp.register_forward_hook(lambda module, args, output: -output)
    expected = stock(model, ids, max_new_tokens=24)
    assert not torch.equal(out.sequences, expected)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=24), expected), "hooks are followed here too"
    assert model.target is not target
