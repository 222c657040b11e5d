"""`eagle-fast doctor`: sizes and times against numbers counted by hand, what it says, and the measurements on GPUs."""

import json
import re
import warnings
from importlib.metadata import version
from itertools import pairwise

import pytest
import torch
from often_right import write_random_head
from quantized_files import LAYOUTS, awq, fp8, gptq, write_quantized
from zoo import HIDDEN, LAYERS, VOCAB, make

from eagle_fast import EaModel, TreeConfig
from eagle_fast.cli import main
from eagle_fast.doctor import environment, findings, measure
from eagle_fast.doctor import plan as planning
from eagle_fast.doctor.environment import Gpu, parse_topology
from eagle_fast.doctor.findings import Machine, Placements, as_json
from eagle_fast.doctor.measure import GpuFigures, KernelCheck, Link
from eagle_fast.doctor.plan import HeadBytes, Setting, found_head, head_bytes, plan, read_model, sizes
from eagle_fast.doctor.plan_ranks import plan_ranks
from eagle_fast.doctor.report import lines
from eagle_fast.head.checkpoint import note_acceptance
from eagle_fast.loading import load_target
from eagle_fast.target.placement import model_bytes

FIGURES = {0: GpuFigures(2e9, 1e8), 1: GpuFigures(1e9, 2e8)}  # bytes per second, all different
LINKS = {
    (0, 1): Link(0, 1, "NV18", True, 7680, 3e-5, 4e11, True),
    (1, 0): Link(1, 0, "NV18", True, 7680, 5e-5, 4e11, True),
}


def write_config(model, folder):
    """The config.json that `model.save_pretrained` writes: it names the dtype, which a new model's config need not."""
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    write_config(make("llama", sharp=False), folder)
    return folder


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_sizes_are_those_of_the_loaded_model(name, overrides, tmp_path):
    model = make(name, sharp=False, **overrides)
    write_config(model, tmp_path)
    found = sizes(read_model(Setting(str(tmp_path)))[0], context=50)
    assert found.weights == {name: p.numel() * 4 for name, p in model.named_parameters()}
    assert found.parameters == sum(p.numel() for p in model.parameters())
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    assert [model.get_submodule(found.path[0]), model.get_submodule(found.path[-1])] == [embedding, lm_head]
    layers = [type(model.get_submodule(each)).__name__ for each in found.path[1:-1]]
    assert len(layers) == LAYERS
    assert len(set(layers)) == 1
    tied = embedding.weight is lm_head.weight
    assert tied == bool(overrides)
    assert (found.unread is None) == tied
    assert tied or model.get_parameter(found.unread) is embedding.weight


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3_text"])
def test_cache_bytes_are_those_of_the_engine(name, tmp_path):
    model = make(name, sharp=False)
    write_random_head(model, tmp_path)
    decoder = EaModel.from_pretrained(base_model_path=model, ea_model_path=str(tmp_path), total_token=2, depth=0)
    decoder.naivegenerate(torch.tensor([[5, 6]]), max_new_tokens=1)
    ((state, _, _),) = decoder.states.idle
    slabs = state.cache.slab.slabs
    per_token = sum(slab.numel() * slab.element_size() // slab.shape[-2] for slab in slabs)
    assert sum(sizes(model, context=10).cache.values()) == 10 * per_token


def test_other_dtypes(folder):
    whole, half = (sizes(read_model(Setting(str(folder), dtype))[0], 8) for dtype in (torch.float32, torch.bfloat16))
    assert sum(whole.weights.values()) == 2 * sum(half.weights.values())
    assert sum(whole.cache.values()) == 2 * sum(half.cache.values())
    assert (whole.row_bytes, half.row_bytes) == (4 * HIDDEN, 2 * HIDDEN)


@pytest.mark.parametrize("layout", [gptq(group=128), awq(128), fp8(128), LAYOUTS["w8a16_row_zeros"]])
def test_sizes_of_packed_weights(layout, tmp_path):
    """Near those of the loaded model, whose scales are smaller, and which keeps no zero points in the middle."""
    model = make("llama", sharp=False, hidden_size=256, intermediate_size=512)
    write_quantized(model, tmp_path, layout, "bfloat16")
    shape, name, reason = read_model(Setting(str(tmp_path)))
    assert reason == ""
    assert name
    found = sizes(shape, 8)
    assert found.dtype == torch.bfloat16
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    loaded = load_target(str(tmp_path), "cpu", {})
    assert 0.9 < model_bytes(loaded) / sum(found.weights.values()) < 1.02
    assert model_bytes(loaded) < 0.8 * 2 * found.parameters
    assert set(found.path) <= {name for name, _ in loaded.named_modules()}


def test_quantized_models_without_packed_sizes(folder, tmp_path):
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 3, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    found, name, reason = read_model(Setting(str(tmp_path)))
    assert not name
    assert "bits is 3" in reason
    assert sizes(found, 8).weights == sizes(read_model(Setting(str(folder)))[0], 8).weights


def test_a_head_is_read_once_a_level(folder, tmp_path):
    model = make("llama", sharp=False)
    layer = 2 * HIDDEN * (HIDDEN + 2 * HIDDEN // 2) + HIDDEN * HIDDEN + 3 * HIDDEN * 96 + 3 * HIDDEN
    numbers = {"eagle3": (layer + HIDDEN + 50 * HIDDEN, 3 * HIDDEN * HIDDEN)}
    write_random_head(model, tmp_path / "eagle3", draft_vocab_size=50)
    one_wide = HIDDEN * (HIDDEN + 2 * HIDDEN // 2) + HIDDEN * HIDDEN + 3 * HIDDEN * 96 + HIDDEN
    numbers["eagle"] = (one_wide + VOCAB * HIDDEN, 2 * HIDDEN * HIDDEN + HIDDEN)  # the target's lm_head
    write_random_head(model, tmp_path / "eagle", "eagle")
    for kind, (each, once) in numbers.items():
        setting = Setting(str(folder), tree=TreeConfig(16, 3, 4), head=str(tmp_path / kind))
        found = head_bytes(setting, model, found_head(setting, model))
        assert found.read == 4 * (4 * each + once)
        assert (found.each, found.layers) == (4 * each, 1)
        assert found.resident == 4 * (each + once)  # EAGLE-1: its embedding instead of the lm_head, as many numbers
    assert head_bytes(Setting(str(folder)), model, None) == HeadBytes(0, 0)


# -- plans -----------------------------------------------------------------------------------------------------------


def placed(layers, embedding=0, norm=None, lm_head=None):
    """A device_map in the words of accelerate, for six layers."""
    last = layers[-1]
    named = {"model.embed_tokens": embedding, **{f"model.layers.{i}": each for i, each in enumerate(layers)}}
    return named | {"model.norm": last if norm is None else norm, "lm_head": last if lm_head is None else lm_head}


PLACEMENTS = {  # device_map -> devices on the way
    "one": ({"": torch.device("cuda:0")}, ("cuda:0",)),
    "halves": (placed([0, 0, 0, 1, 1, 1]), ("cuda:0", "cuda:1")),
    "repeat": (placed([0, 1, 0, 0, 0, 0]), ("cuda:0", "cuda:1", "cuda:0")),
    "reverse": (placed([1, 1, 0, 0, 0, 0], 1), ("cuda:1", "cuda:0")),
    "lm_head back": (placed([0, 0, 0, 1, 1, 1], lm_head=0), ("cuda:0", "cuda:1", "cuda:0")),
    "devices": ({k: torch.device("cuda", v) for k, v in placed([1] * 6).items()}, ("cuda:0", "cuda:1")),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_plan_counts_bytes_and_crossings(name, folder, monkeypatch):
    device_map, devices = PLACEMENTS[name]
    monkeypatch.setattr(planning, "plan_placement", lambda *args: device_map)
    model, head = make("llama", sharp=False), HeadBytes(1000, 5000)
    size = sizes(model, context=100)
    found = plan("balanced", model, None, size, FIGURES, LINKS, head)
    assert found.devices == devices
    assert found.crossings == len(devices) - 1

    def index(module):
        entry = next(device_map[key] for key in sorted(device_map, key=len, reverse=True) if module.startswith(key))
        return entry if isinstance(entry, int) else entry.index

    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    table = VOCAB * HIDDEN * 4
    cache = 2 * 2 * 16 * 100 * 4  # keys and values, 2 heads of 16
    weights, read, cached = ({0: 0, 1: 0} for _ in range(3))
    for i in range(LAYERS):
        place = index(f"model.layers.{i}")
        weights[place] += layer
        read[place] += layer + cache
        cached[place] += cache
    weights[index("model.embed_tokens")] += table
    for module, count in (("model.norm", HIDDEN * 4), ("lm_head", table)):
        weights[index(module)] += count
        read[index(module)] += count
    last = index("lm_head")
    assert found.weights == {f"cuda:{i}": count for i, count in weights.items() if count}
    assert found.cache == {f"cuda:{i}": count for i, count in cached.items() if count}
    assert found.head == {f"cuda:{last}": 1000}
    assert sum(found.layers.values()) == LAYERS
    assert found.verify_seconds == pytest.approx(read[0] / 2e9 + read[1] / 1e9)
    assert found.draft_seconds == pytest.approx(5000 / (2e9, 1e9)[last])
    times = {("cuda:0", "cuda:1"): 3e-5, ("cuda:1", "cuda:0"): 5e-5}
    assert found.copy_seconds == pytest.approx(sum(times[pair] for pair in pairwise(devices)))
    assert found.round_seconds == pytest.approx(found.verify_seconds + found.copy_seconds + found.draft_seconds)
    assert found.problem == ""


def test_tied_weights_are_read_and_counted_once(monkeypatch):
    model = make("llama", tie_word_embeddings=True)
    monkeypatch.setattr(planning, "plan_placement", lambda *args: {"": 0})
    size = sizes(model, context=0)
    total = sum(p.numel() * 4 for p in model.parameters())
    found = plan("auto", model, None, size, FIGURES, LINKS)
    assert found.weights == {"cuda:0": total}
    assert found.verify_seconds == pytest.approx(total / 2e9)


def test_offloaded_weights_cross_the_host_link(monkeypatch):
    model = make("llama", sharp=False)
    size, layer = sizes(model, context=0), sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    monkeypatch.setattr(planning, "plan_placement", lambda *args: placed([0, 0, 0, 0, 0, "cpu"], lm_head=0, norm=0))
    found = plan("auto", model, None, size, FIGURES, LINKS)
    rest = 5 * layer + 4 * (VOCAB * HIDDEN + HIDDEN)
    assert found.verify_seconds == pytest.approx(rest / 2e9 + layer / 1e8)
    monkeypatch.setattr(planning, "plan_placement", lambda *args: placed([0, 0, 0, 0, 0, "disk"], lm_head=0, norm=0))
    found = plan("auto", model, None, size, FIGURES, LINKS)
    assert found.round_seconds is None
    assert "disk" in found.problem


def test_nothing_is_assumed_where_nothing_was_measured(monkeypatch):
    model = make("llama", sharp=False)
    monkeypatch.setattr(planning, "plan_placement", lambda *args: placed([0, 0, 0, 1, 1, 1]))
    size = sizes(model, 10)
    cases = [
        ({}, LINKS, "cuda:0 was not measured"),
        ({0: FIGURES[0], 1: GpuFigures(problem="in use")}, LINKS, r"cuda:1 was not measured (in use)"),
        (FIGURES, {(0, 1): Link(0, 1, None, False, 8, problem="lost")}, "no copy from cuda:0 to cuda:1"),
    ]
    for figures, links, problem in cases:
        found = plan("balanced", model, None, size, figures, links)
        assert found.round_seconds is None
        assert problem in found.problem
        assert found.weights.keys() == {"cuda:0", "cuda:1"}

    def refuse(*args):
        raise ValueError("cuda:0 has room for 3 GiB")

    monkeypatch.setattr(planning, "plan_placement", refuse)
    assert plan("auto", model, None, size, FIGURES, LINKS).problem == "cuda:0 has room for 3 GiB"


def test_a_placement_that_was_named(folder, monkeypatch):
    """In place of the strategies, with the head where it would be."""
    model, halves = make("llama", sharp=False), placed([0, 0, 0, 1, 1, 1])
    size = sizes(model, context=100)
    monkeypatch.setattr(planning, "plan_placement", lambda model, device_map, memory: device_map)
    monkeypatch.setattr(findings, "examine_machine", lambda rows: machine(figures=FIGURES, links=[*LINKS.values()]))
    setting = Setting(str(folder), context=100, options={"device_map": halves, "draft_device": "cuda:0"})
    monkeypatch.setattr(findings, "found_head", lambda *args: None)
    monkeypatch.setattr(findings, "head_bytes", lambda *args: HeadBytes(1000, 5000))
    (found,) = findings.examine(setting)[1].plans
    assert (found.strategy, found.devices, found.head) == ("as given", ("cuda:0", "cuda:1"), {"cuda:0": 1000})
    assert found.draft_seconds == pytest.approx(5000 / 2e9)
    by_lm_head = plan(halves, model, None, size, FIGURES, LINKS, HeadBytes(1000, 5000))
    assert by_lm_head.head == {"cuda:1": 1000}
    assert by_lm_head.verify_seconds == found.verify_seconds


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_layers_cut_over_ranks(overrides, folder, monkeypatch):
    model = make("llama", sharp=False, **overrides)
    size = sizes(model, context=100)
    found = plan_ranks(["cuda:0", "cuda:1"], model, 16, size, FIGURES, LINKS, HeadBytes(1000, 5000))
    table, parts = VOCAB * HIDDEN * 4, [(VOCAB + 1) // 2 * HIDDEN * 4, VOCAB // 2 * HIDDEN * 4]
    layers = sum(linear.weight.nbytes for linear in model.model.layers.modules() if isinstance(linear, torch.nn.Linear))
    each = [layers // 2 + table + (0 if overrides else part) for part in parts]
    assert found.weights == {"cuda:0": each[0], "cuda:1": each[1]}
    cache = LAYERS * 2 * 2 * 16 * 100 * 4 // 2
    assert found.cache == {"cuda:0": cache, "cuda:1": cache}
    assert (found.head, found.crossings) == ({"cuda:0": 1000}, 0)
    assert found.verify_seconds == pytest.approx((layers // 2 + parts[1] + cache) / 1e9), "the slower one's"
    assert found.copy_seconds == pytest.approx(2 * LAYERS * 16 * HIDDEN * 4 / 4e11)
    assert found.draft_seconds == pytest.approx(5000 / 2e9)
    large = plan_ranks(2, model, 16, size, FIGURES, LINKS, HeadBytes(1000, 5000, 10**9, 1))
    assert large.head == {"cuda:0": 1500, "cuda:1": 500}, "its part beside it"
    assert large.draft_seconds == pytest.approx(2500 / 1e9), "the slower one's"
    lost = {(0, 1): LINKS[0, 1]}
    assert "cuda:1 to cuda:0" in plan_ranks(2, model, 16, size, FIGURES, lost, HeadBytes()).problem
    assert "cuda:2 was not measured" in plan_ranks(3, model, 16, size, FIGURES, LINKS, HeadBytes()).problem
    other = make("gpt2", sharp=False)
    assert "is none of them" in plan_ranks(2, other, 16, sizes(other, 100), FIGURES, LINKS, HeadBytes()).problem
    monkeypatch.setattr(findings, "examine_machine", lambda rows: machine(figures=FIGURES, links=[*LINKS.values()]))
    found = findings.examine(Setting(str(folder), options={"tensor_parallel": 2}))
    assert [each.strategy for each in found[1].plans[-2:]] == ["sequential", "tensor_parallel=2"]
    said = "\n".join(lines(*found))
    assert re.search(r"^tensor_parallel=2 +0: 0.0 \+ 0.0 \(6\)   1: .* 0 +[\d.]+ ms", said, re.MULTILINE)
    assert "exchange the rows twice a layer" in said
    for options in ({"tensor_parallel": 2}, {"tensor_parallel": True}, {}):
        plans = findings.examine(Setting(str(folder), options=options))[1].plans
        assert [each.strategy for each in plans[-2:]] == ["sequential", "tensor_parallel=2"]
    for setting in ({"options": {"tensor_parallel": False}}, {"max_memory": {0: "1GiB"}}):
        assert findings.examine(Setting(str(folder), **setting))[1].plans[-1].strategy == "sequential"
    apart = {pair: Link(*pair, None, False, 8, 3e-5, 4e9, True) for pair in LINKS}
    found = plan_ranks(2, model, 16, size, FIGURES, apart, HeadBytes())
    assert found.problem == "cuda:0 and cuda:1 cannot reach each other's memory"


def test_packed_layers_cut_over_ranks(tmp_path, monkeypatch):
    model = make("llama", sharp=False, hidden_size=256, intermediate_size=512)
    write_config(model, tmp_path)
    monkeypatch.setattr(findings, "examine_machine", lambda rows: machine(figures=FIGURES, links=[*LINKS.values()]))

    def ranked(**options):
        setting = Setting(str(tmp_path), torch.bfloat16, 16, options={"tensor_parallel": 2, **options})
        return findings.examine(setting)[1].plans[-1]

    whole, packed = ranked(), ranked(target_bits=4)
    assert packed.problem == ""
    table = VOCAB * 256 * 2
    for device in ("cuda:0", "cuda:1"):
        left = [each.weights[device] - table - table // 2 for each in (packed, whole)]
        assert 0.2 < left[0] / left[1] < 0.35
    assert packed.verify_seconds < 0.5 * whole.verify_seconds
    ends = ranked(lm_head_bits=8)
    for device in ("cuda:0", "cuda:1"):  # what it computes with, and the whole embedding
        saved = whole.weights[device] - ends.weights[device]
        assert 0.4 * (table + table // 2) < saved < 0.5 * (table + table // 2)
    assert ends.verify_seconds < whole.verify_seconds
    assert ranked(draft_device="cuda:1").problem == "tensor_parallel does not go with draft_device yet"


def test_ranks_of_packed_weights(tmp_path):
    write_quantized(make("llama"), tmp_path, gptq())
    model, dense = read_model(Setting(str(tmp_path))).model, make("llama", sharp=False)
    packed, plain = (plan_ranks(2, each, 16, sizes(each, 100), FIGURES, LINKS, HeadBytes()) for each in (model, dense))
    assert not packed.problem
    assert all(packed.weights[gpu] < plain.weights[gpu] for gpu in plain.weights)


def test_weights_rounded_at_load(tmp_path, capsys):
    """In the plan, and where rounds are timed."""
    model = make("llama", sharp=False, hidden_size=256, intermediate_size=512)
    model.save_pretrained(tmp_path / "model")
    write_random_head(model, tmp_path / "head")
    bits = ["--target-bits", "8", "--lm-head-bits", "8"]
    arguments = ["doctor", "--model", str(tmp_path / "model"), "--dtype", "bfloat16", "--context", "256", "--json"]
    assert main([*arguments, *bits]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["packed"]
    assert found["weight_bytes"] < 0.6 * 2 * found["parameters"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*arguments, *bits, "--head", str(tmp_path / "head"), "--batch", "1"]) == 0
    trees = json.loads(capsys.readouterr().out)["model"]["trees"]
    assert any(trees["seconds"]["1"])


def test_options_of_loading_arrive(folder, monkeypatch, capsys):
    seen = {}
    for module, name in ((planning, "read_config"), (planning, "read_head"), (EaModel, "from_pretrained")):
        inner = getattr(module, name)

        def watched(*args, inner=inner, name=name, **options):
            seen[name] = (*args, options)
            return inner(*args, **options)

        monkeypatch.setattr(module, name, watched)
    hub = ["--revision", "v2", "--head-revision", "v3", "--local-files-only", "--cache-dir", str(folder)]
    assert main(["doctor", "--model", str(folder), "--head", str(folder), *hub, "--batch", "1"]) == 2
    assert seen["read_config"][1] == {"revision": "v2", "local_files_only": True, "cache_dir": str(folder)}
    assert seen["read_head"][-1].items() >= {"revision": "v3", "local_files_only": True}.items()
    assert "--head" not in capsys.readouterr().out


# -- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu(folder, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {version('torch')}" in out  # torch.__version__ may have a build's name behind it
    assert "No GPU: " in out
    assert "On the CPU everything works" in out
    assert main(["doctor", "--model", str(folder), "--json", "--context", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == found["links"] == found["model"]["plans"] == []
    assert found["healthy"]
    assert found["cpu"]["runs"]
    assert found["no_gpu"]
    assert found["model"]["weight_bytes"] == sum(p.numel() * 4 for p in make("llama", sharp=False).parameters())
    assert found["model"]["cache_bytes"] == LAYERS * 2 * 2 * 16 * 64 * 4
    assert found["model"]["head_bytes"] is None


def tree_table(out):
    """Of text: tree -> cells, behind the header."""
    rows = out.split("nodes/depth/top-k")[1].splitlines()
    cells = [row.split("  ") for row in rows[1:] if re.match(r"\d+/\d+/\d+", row)]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in cells}


def test_a_heads_drafts_in_a_table(folder, tmp_path, capsys):
    model = make("llama", sharp=False)
    write_random_head(model, tmp_path, draft_vocab_size=50)
    arguments = ["doctor", "--model", str(folder), "--head", str(tmp_path), "--tree", "24", "6", "6"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "config.json says nothing of its drafts" in out
    assert "--batch 1 8 loads the pair" in out
    note_acceptance(tmp_path, {0.0: [[0.5, 0.0]], 1.0: [[0.25, 0.0]]})
    assert main(arguments) == 0
    found = tree_table(capsys.readouterr().out)
    assert next(iter(found)) == "24/6/6", "none is more than what was given"
    assert float(found["4/3/1"][0]) == pytest.approx(1 + 0.5 + 0.25 + 0.125, abs=0.006)
    assert float(found["4/3/1"][1]) == pytest.approx(1 + 0.25 + 0.0625 + 0.0156, abs=0.006)
    assert found["1/0/1, plain decoding"] == ["1.00", "1.00"]


def test_rounds_of_a_pair_are_timed(tmp_path, capsys):
    model = make("llama")
    model.save_pretrained(tmp_path / "model")
    write_random_head(model, tmp_path / "head", draft_vocab_size=50)
    pair = ["doctor", "--model", str(tmp_path / "model"), "--head", str(tmp_path / "head"), "--context", "512"]
    assert main([*pair, "--batch", "1", "2"]) == 0
    found = tree_table(capsys.readouterr().out)
    assert sum(cells[1].endswith("*") for cells in found.values()) == 1, "one tree pays best"
    assert any(cells[1] == "-" for cells in found.values()), "others would not be chosen from"
    assert main([*pair, "--batch", "2", "--json"]) == 0
    trees = json.loads(capsys.readouterr().out)["model"]["trees"]
    assert len(trees["seconds"]["2"]) == len(trees["trees"]) == len(trees["tokens"]["0"])
    assert sum(took is not None for took in trees["seconds"]["2"]) >= 3
    assert not trees["measured"]


WRONG = {
    "no folder": (["--model", "/no/such/folder"], "no such folder"),
    "no config": (["--model", "{empty}"], "config.json"),
    "head alone": (["--head", "x"], "--model"),
    "memory alone": (["--max-memory", "1GiB"], "--model"),
    "dtype": (["--model", "{config}", "--dtype", "int8"], "--dtype int8: use bfloat16"),
    "context": (["--model", "{config}", "--context", "0"], "context=0"),
    "batch alone": (["--model", "{config}", "--batch", "4"], "--batch is about rounds with a draft head"),
    "batch": (["--model", "{config}", "--head", "x", "--batch", "0"], "batch=0"),
    "tree": (["--model", "{config}", "--tree", "1", "7", "10"], "total_token=1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, folder, tmp_path, capsys):
    arguments, message = WRONG[name]
    arguments = [each.format(empty=tmp_path, config=folder) for each in arguments]
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


GIB = 2**30
GPUS = [
    Gpu(0, "NVIDIA H100", "9.0", 80 * GIB, 79 * GIB, "GPU-a"),
    Gpu(1, "NVIDIA H100", "9.0", 80 * GIB, 50 * GIB, "GPU-b"),
]
RUNS = KernelCheck(True, 1.25)


def machine(**changes):
    settings = dict(
        versions={"python": "3.12", "triton": None, "driver": "580.1", "cuda": "13.0", "nccl": None}, gpus=GPUS,
        figures={0: GpuFigures(3.08e12, 55e9), 1: GpuFigures(problem="only 9 MiB are free, too little to measure")},
        checks={0: RUNS, 1: RUNS}, links=list(LINKS.values()),
    )  # fmt: skip
    return Machine(**(settings | changes))


def test_a_machine_with_gpus_in_words():
    out = "\n".join(lines(machine(), None))
    for part in (
        "triton (none)", "driver 580.1", "79.0 GiB", "3.08 TB/s", "55.0 GB/s", "compile and run (1.2 s)",
        "GPU 1: not measured: only 9 MiB are free", "GPU 1: 30.0 GiB are in use", "0 -> 1", "NV18", "30.0 us",
        "50.0 us", "400 GB/s",
    ):  # fmt: skip
        assert part in out, part
    assert "GPU 0: " not in out
    assert "NO" not in out
    assert machine().healthy


def test_what_is_broken_is_said_and_ends_in_exit_code_1(monkeypatch, capsys):
    torn = Link(0, 1, None, False, 8, 3e-5, 4e9, intact=False)
    broken = {
        "COPIES ARRIVE CHANGED": machine(links=[torn]),
        "GPU 1: the kernel does not run: no compiler": machine(
            checks={0: RUNS, 1: KernelCheck(False, 0.1, "no compiler")}
        ),
        "The CPU path fails": machine(gpus=[], links=[], cpu=KernelCheck(False, 0.1, "?"), no_gpu="none"),
    }
    for part, found in broken.items():
        assert not found.healthy
        monkeypatch.setattr("eagle_fast.doctor.command.examine", lambda setting, found=found: (found, None))
        assert main(["doctor"]) == 1
        assert part in capsys.readouterr().out
    slow = machine(links=[Link(0, 1, None, False, 8, 9e-5, 9e9, True), Link(1, 0, None, True, 8, problem="lost")])
    out = "\n".join(lines(slow, None))
    assert slow.healthy
    for part in ("unknown", "NO", "Without peer access", "1 -> 0: not measured: lost"):
        assert part in out, part


def test_plans_in_words_and_as_json(monkeypatch):
    model, setting = make("llama", sharp=False), Setting("some/model", head="some/head")
    size, head = sizes(model, 2048), HeadBytes(60 * GIB, GIB)
    maps = {
        "auto": {"": 0},
        "balanced": placed([0, 0, 0, 1, 1, 1]),
        "sequential": placed([0] * 5 + ["cpu"], lm_head=0, norm=0),
    }
    monkeypatch.setattr(planning, "plan_placement", lambda model, name, memory: maps[name])
    plans = [plan(name, model, None, size, FIGURES, LINKS, head) for name in maps]
    placements = Placements(setting, size, head, True, plans, unpacked="its bits is 3")
    out = list(lines(machine(), placements))
    (row,) = [line for line in out if line.startswith("balanced ")]
    assert row.split("  ")[0] == "balanced"
    assert "0: 0.0 + 0.0 (3)   1: 0.0 + 60.0 (3)" in row
    assert f"{plans[1].round_seconds * 1e3:.2f} ms, of it copies 0.030" in row
    assert "balanced: does not fit: 60.0 GiB on cuda:1, where 50.0 GiB are free" in out
    assert any(line.startswith("sequential: leaves weights on the cpu") for line in out)
    assert any(line.endswith("the sizes here are those of float32: its bits is 3.") for line in out)
    found = json.loads(json.dumps(as_json(machine(), placements)))
    assert [each["strategy"] for each in found["model"]["plans"]] == ["auto", "balanced", "sequential"]
    assert found["model"]["plans"][1]["crossings"] == 1
    assert found["model"]["plans"][1]["round_seconds"] == plans[1].round_seconds
    assert found["gpus"][0]["read"] == 3.08e12
    assert found["gpus"][1]["read"] is None
    assert found["gpus"][0]["kernel"]["runs"]
    assert (found["model"]["quantized"], found["model"]["packed"]) == (True, False)
    packed = Placements(setting, size, head, True, plans, "AWQ, 4 bits in groups of 128")
    said = "GiB packed (AWQ, 4 bits in groups of 128), the rest in float32"
    assert any(said in line for line in lines(machine(), packed))
    assert as_json(machine(), packed)["model"]["packed"]
    assert as_json(machine(), packed)["model"]["format"] == "AWQ, 4 bits in groups of 128"


# -- reports of the software -----------------------------------------------------------------------------------------

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-63\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tSYS\t0-63\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t0-63\t0\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""


def test_links_go_by_torchs_order_of_gpus(monkeypatch):
    """torch sees two of three GPUs, in another order than nvidia-smi."""
    matrix = parse_topology(TOPOLOGY)
    assert matrix["GPU0", "GPU1"] == matrix["GPU1", "GPU0"] == "NV18"
    assert (matrix["GPU2", "GPU0"], matrix["GPU2", "GPU1"]) == ("SYS", "PHB")
    monkeypatch.setattr(environment, "_run", lambda command: TOPOLOGY if "topo" in command else "0, u\n1, v\n2, w\n")
    found = [Gpu(0, "", "", 1, 1, "w"), Gpu(1, "", "", 1, 1, "v")]
    assert environment.link_types(found) == {(0, 1): "PHB", (1, 0): "PHB"}
    assert environment.link_types([Gpu(0, "", "", 1, 1, "unknown"), found[1]]) == {}
    monkeypatch.setattr(environment, "_run", lambda command: None)
    assert environment.link_types(found) == {}


def test_reasons_for_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build without CUDA" in environment.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in environment.why_no_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(environment, "_run", lambda command: None)
    assert "nvidia-smi finds no driver" in environment.why_no_gpu()
    monkeypatch.setattr(environment, "_run", lambda command: "NVIDIA H100\n")
    assert "CUDA 13.0) does not" in environment.why_no_gpu()


def test_a_kernel_that_fails_or_is_wrong(monkeypatch):
    cpu = torch.device("cpu")
    assert measure.kernel_check(cpu).runs

    def no_compiler(x, weight):
        raise OSError("no C compiler\nat all")

    monkeypatch.setattr(measure, "rms_norm", no_compiler)
    found = measure.kernel_check(cpu)
    assert (found.runs, found.problem) == (False, "OSError: no C compiler")
    for wrong in (lambda x, weight: x, lambda x, weight: x * torch.nan):
        monkeypatch.setattr(measure, "rms_norm", wrong)
        found = measure.kernel_check(cpu)
        assert not found.runs
        assert "is wrong by" in found.problem


# -- on GPUs ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_measurements_of_a_gpu(monkeypatch):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    found = measure.gpu_figures(0)
    assert found.problem == ""
    assert 1e11 < found.read < 2e13
    assert 1e9 < found.from_host < found.read
    assert torch.cuda.memory_reserved(0) <= before
    check = measure.kernel_check(torch.device("cuda", 0))
    assert (check.runs, check.problem) == (True, "")
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "ref")
    assert "turns the kernels off" in measure.kernel_check(torch.device("cuda", 0)).problem
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**20, 80 * GIB))
    assert "only 10 MiB are free" in measure.gpu_figures(0).problem
    (gpu, *_) = environment.gpus()
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 0 < gpu.free_bytes <= gpu.total_bytes


@pytest.mark.multi_gpu
def test_measurements_of_a_link():
    torch.cuda.empty_cache()
    before = [torch.cuda.memory_reserved(index) for index in (0, 1)]
    for pair in ((0, 1), (1, 0)):
        found = measure.link(*pair, small_bytes=2**20)
        assert found.intact
        assert 1e-7 < found.small_seconds < 1e-2
        assert 1e9 < found.rate < 2e12
    assert all(torch.cuda.memory_reserved(index) <= before[index] for index in (0, 1))
    kinds = environment.link_types(environment.gpus())
    assert kinds.get((0, 1)) == kinds.get((1, 0))


@pytest.mark.gpu
def test_the_whole_of_it_on_gpus(folder, capsys):
    assert main(["doctor", "--model", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["gpus"]) == torch.cuda.device_count()
    plans = {each["strategy"]: each for each in found["model"]["plans"]}
    assert plans["auto"]["crossings"] == 0
    assert plans["auto"]["round_seconds"] > 0
    plans.pop("tensor_parallel=2", None)  # embedding twice
    for each in plans.values():
        assert sum(each["weights"].values()) == found["model"]["weight_bytes"]
        assert sum(each["layers"].values()) == LAYERS
