"""Scripts written for SafeAILab/EAGLE against `eagle_fast.compat`: its README's, its evaluation loop, its chat window.

The calls are those of the scripts, the code around them is ours. Every text is compared with stock `generate`.
"""

import ast
import importlib
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from chatty import END, make_tokenizer
from often_right import write_often_right_head
from transformers import AutoModelForCausalLM
from zoo import make

import eagle_fast
import eagle_fast.compat as compat

END_OF_TURN = 77
NEW = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(target with tokenizer, head) as paths, saved as from the hub."""
    root = tmp_path_factory.mktemp("pair")
    model = make("llama")
    model.generation_config.eos_token_id = END
    model.save_pretrained(root / "target")
    make_tokenizer(end_of_turn=END_OF_TURN).save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return str(root / "target"), str(root / "head")


@pytest.fixture(scope="module")
def stock(folders):
    target = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    return lambda ids, **more: target.generate(
        ids.cpu(), attention_mask=torch.ones_like(ids).cpu(), do_sample=False, **{"max_new_tokens": NEW, **more}
    )


def as_tensor(input_ids, model):
    """What scripts write as torch.as_tensor(input_ids).cuda(), where there is a GPU."""
    return torch.as_tensor(input_ids).to(model.base_model.device)


# -- the scripts -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_readme(folders, stock):
    from eagle.model.ea_model import EaModel

    model = EaModel.from_pretrained(
        base_model_path=folders[0],
        ea_model_path=folders[1],
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        device_map="auto",
        total_token=-1,
    )
    model.eval()
    input_ids = as_tensor(model.tokenizer(["w5 w17 w40"]).input_ids, model)
    output_ids = model.eagenerate(input_ids, temperature=0.5, max_new_tokens=NEW)
    assert output_ids.shape[1] == 3 + NEW
    assert model.tokenizer.decode(output_ids[0]).split()[:3] == ["w5", "w17", "w40"]
    assert torch.equal(model.eagenerate(input_ids, max_new_tokens=NEW).cpu(), stock(input_ids))


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate"])
def test_the_evaluation_loop(method, folders, stock):
    """Two turns with a chat template under inference_mode, the cut at stop tokens, names from star imports."""
    scope: dict = {}
    exec("from eagle.model.kv_cache import initialize_past_key_values\nfrom eagle.model.utils import *", scope)
    assert scope["prepare_logits_processor"](temperature=0.0) == []
    assert [type(each).__name__ for each in scope["prepare_logits_processor"](temperature=0.7, top_p=0.9, top_k=5)] == [
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    ]  # fmt: skip
    model = importlib.import_module("eagle.model.ea_model").EaModel.from_pretrained(
        base_model_path=folders[0], ea_model_path=folders[1], total_token=60, depth=5, top_k=10,
        torch_dtype=scope["torch"].float32, low_cpu_mem_usage=True, device_map="auto", use_eagle3=True,
    )  # fmt: skip
    tokenizer = model.get_tokenizer()
    model.eval()
    assert not model.training

    @scope["torch"].inference_mode()
    def answer(messages):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        input_ids = tokenizer([prompt], add_special_tokens=False).input_ids
        output_ids, new_token, idx = getattr(model, method)(
            as_tensor(input_ids, model), temperature=0.0, log=True, is_llama3=True, max_new_tokens=NEW
        )
        assert int(new_token) == output_ids.shape[1] - len(input_ids[0])
        assert 0 <= int(idx) < NEW
        expected = stock(torch.as_tensor(input_ids), eos_token_id=[tokenizer.eos_token_id, END_OF_TURN])
        assert torch.equal(output_ids.cpu(), expected)
        output_ids = output_ids[0][len(input_ids[0]) :]
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
        found = [i for i, token in enumerate(output_ids) if token in stops]
        output = tokenizer.decode(output_ids[: found[0]] if found else output_ids, spaces_between_special_tokens=False)
        for special in tokenizer.special_tokens_map.values():
            output = output.replace(special, "")
        return output.strip()

    messages = [{"role": "user", "content": "w9 w30"}]
    messages.append({"role": "assistant", "content": answer(messages)})
    messages.append({"role": "user", "content": "w64"})
    assert answer(messages)


@pytest.mark.parametrize("method", ["ea_generate", "naive_generate"])
def test_the_chat_window(method, folders, stock):
    """It reads token number `seen` of each yield, so every yield must be longer than the one before."""
    from eagle.model.ea_model import EaModel

    model = EaModel.from_pretrained(
        base_model_path=folders[0], ea_model_path=folders[1], total_token=60, torch_dtype=torch.float32,
        low_cpu_mem_usage=True, load_in_4bit=False, load_in_8bit=False, device_map="auto", use_eagle3=True,
    )  # fmt: skip
    input_ids = as_tensor(model.tokenizer(["w9 w30 w31"]).input_ids, model)
    seen, last = input_ids.shape[1], None
    for output_ids in getattr(model, method)(input_ids, temperature=0.0, top_p=0.0, max_new_tokens=NEW, is_llama3=True):
        assert model.tokenizer.decode(output_ids[0, seen])
        seen, last = output_ids.shape[1], output_ids
    assert torch.equal(last.cpu(), stock(input_ids, eos_token_id=END_OF_TURN))


def test_habits_of_other_scripts(folders, stock):
    """Paths, a torch.device, more nodes than the default, frozen parameters, ids and limits by position."""
    model = compat.EaModel.from_pretrained(
        base_model_path=Path(folders[0]), ea_model_path=Path(folders[1]), torch_dtype="float32",
        device_map=torch.device("cpu"), total_token=128,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = model.get_tokenizer()("w5 w6", return_tensors="pt").input_ids.to(next(model.parameters()).device)
    with torch.no_grad():
        out = model.eagenerate(ids.clone(), 0.0, 0.0, 0.0, NEW, ids.shape[1] + NEW + 128 + 32, False, False)
    assert torch.equal(out, stock(ids))


@pytest.mark.parametrize("method", ["eagenerate", "naivegenerate", "ea_generate", "naive_generate"])
def test_use_distributed_is_accepted(method, folders):
    model = pair(folders)
    ids = torch.tensor([[5, 17, 40]])
    out, same = (getattr(model, method)(ids, max_new_tokens=4, **more) for more in ({}, {"use_distributed": True}))
    if method.endswith("_generate"):
        out, same = list(out)[-1], list(same)[-1]
    assert torch.equal(out, same)
    with pytest.raises(TypeError, match="distributed"):
        model.eagenerate(ids, distributed=True)


def pair(folders, **options):
    return eagle_fast.setup_multi_gpu_inference(
        model_path=folders[0], ea_model_path=folders[1], device_map="cpu", **options
    )


def test_options_in_the_words_of_older_transformers(folders, monkeypatch):
    seen = {}

    def load(path, device_map, options, *others):
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr("eagle_fast.model.load_target", load)
    for given, expected in (("load_in_8bit", "load_in_8bit"), ("load_in_4bit", "load_in_4bit")):
        with pytest.raises(InterruptedError):
            pair(folders, **{given: True, "torch_dtype": "float16"})
        assert getattr(seen["quantization_config"], expected)
        assert seen.keys() == {"quantization_config", "dtype"}
        assert seen["dtype"] == "float16"
        seen.clear()
    with pytest.raises(ValueError, match=r"\['load_in_8bit'\] beside quantization_config"):
        pair(folders, load_in_8bit=True, quantization_config=object())
    with pytest.raises(ValueError, match="dtype and torch_dtype are the same"):
        pair(folders, dtype="float16", torch_dtype="float32")


def test_settings_that_upstream_takes_as_off(folders, stock):
    model = pair(folders)
    ids = torch.tensor([[5, 17, 40]])
    expected = stock(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({"top_p": None, "top_k": None}, {"temperature": 1e-6}, {"temperature": 1e-5}):
            assert torch.equal(model.eagenerate(ids, max_new_tokens=NEW, **settings), expected)
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": NEW}
    sampled = model.eagenerate(ids, top_p=None, top_k=None, min_p=None, **options)
    assert torch.equal(sampled, model.eagenerate(ids, **options))


def test_a_tokenizer_without_end_of_turn(folders, stock):
    model = pair(folders)
    model.tokenizer = make_tokenizer()
    ids = torch.tensor([[9, 30, 31]])
    with pytest.warns(UserWarning, match=r"no <\|eot_id\|>"):
        out = model.eagenerate(ids, max_new_tokens=NEW, is_llama3=True)
    assert torch.equal(out, stock(ids))


def test_use_eagle3_false_beside_an_eagle3_head(folders, stock):
    with pytest.warns(UserWarning, match="use_eagle3=False, but"):
        model = pair(folders, use_eagle3=False)
    assert model.use_eagle3
    assert torch.equal(model.eagenerate(torch.tensor([[5, 17]]), max_new_tokens=NEW), stock(torch.tensor([[5, 17]])))


# -- the two functions -----------------------------------------------------------------------------------------------


def guide_scripts():
    """The two scripts that docs/multi-gpu.md shows."""
    guide = (Path(__file__).parent.parent.parent / "docs" / "multi-gpu.md").read_text()
    blocks = [block.partition("```")[0] for block in guide.split("```python\n")[1:]]
    scripts = [block for block in blocks if "from eagle.model" in block]
    assert len(scripts) == 2
    return scripts


CUSTOM = {
    "model.embed_tokens": 0, **{f"model.layers.{i}": int(i > 2) for i in range(6)}, "model.norm": 1, "lm_head": 1,
}  # fmt: skip
SPREAD = [
    pytest.param(number, device_map, marks=pytest.mark.multi_gpu, id=f"{number}-{name}")
    for number in (0, 1)
    for name, device_map in {"balanced": "balanced", "balanced_low_0": "balanced_low_0", "custom": CUSTOM}.items()
]


@pytest.mark.parametrize(("number", "device_map"), [(0, "auto"), (1, "cpu"), (1, None), *SPREAD])
def test_scripts_of_the_guide_run_unchanged(number, device_map, folders, stock, tmp_path, monkeypatch, capsys):
    """Other names of the pair, the device and the prompt; nothing else."""
    script = guide_scripts()[number]
    changes = {
        '"meta-llama/Llama-2-7b-chat-hf"': repr(folders[0]), '"path/to/eagle/model"': repr(folders[1]),
        'device_map="balanced"': f"device_map={device_map!r}", "Once upon a time": "w5 w85",
        "Your prompt here": "w5 w85",
    }  # fmt: skip
    for old, new in changes.items():
        script = script.replace(old, new)
    file = tmp_path / "script.py"
    file.write_text(script + ("" if number == 0 else "\nprint(output_text)\n"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    compat.run_script([str(file), "--flag"])
    assert sys.argv == [str(file), "--flag"]
    expected = stock(torch.tensor([[5, 85]]), max_new_tokens=512)
    assert 20 < expected.shape[1] < 2 + 512, "the text should end at its stop token"
    text = make_tokenizer(end_of_turn=END_OF_TURN).decode(expected[0], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"
    assert text.startswith("w5 w85 ")
    assert not torch.distributed.is_initialized()


def test_a_text_and_its_options(folders, stock):
    text = eagle_fast.run_multi_gpu_inference(
        folders[0], folders[1], "w5 w17", True, 16, 3, 4, 1.0, 0.0, 0.0, 6, 64, "cpu", dtype=torch.float32
    )
    assert text == make_tokenizer().decode(stock(torch.tensor([[5, 17]]), max_new_tokens=6)[0])
    sampled = {"temperature": 1.0, "sampling_top_k": 3, "min_p": 0.01, "seed": 5, "max_new_tokens": 24}
    texts = [
        eagle_fast.run_multi_gpu_inference(*folders, "w5 w17", device_map="cpu", **sampled | {"seed": seed})
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    model, ids = (
        eagle_fast.setup_multi_gpu_inference(folders[0], "cpu", ea_model_path=folders[1]),
        torch.tensor([[5, 17]]),
    )
    plain = model.naivegenerate(ids, temperature=1.0, top_k=3, min_p=0.01, seed=5, max_new_tokens=24)
    assert texts[0] == make_tokenizer().decode(plain[0], skip_special_tokens=True)
    with pytest.raises(ValueError, match="seed=-1"):
        eagle_fast.run_multi_gpu_inference("no such folder", "none", "w5", seed=-1)
    with pytest.raises(ValueError, match="input_text is a list: pass a str"):
        eagle_fast.run_multi_gpu_inference(*folders, ["w5"], device_map="cpu")
    with pytest.raises(ValueError, match="ea_model_path=None"):
        eagle_fast.setup_multi_gpu_inference(folders[0], "cpu")


def test_chosen_settings_arrive(folders):
    model = pair(folders, use_eagle3=True, total_token=20, depth=4, top_k=5, threshold=1.0)
    assert model.tree == eagle_fast.TreeConfig(20, 4, 5)
    assert model.device_map == {"": torch.device("cpu")}


# -- the names -------------------------------------------------------------------------------------------------------


def test_names_are_the_packages_own():
    import eagle.model.multi_gpu_inference as inference
    from eagle.model import ea_model

    assert ea_model.EaModel is eagle_fast.EaModel
    assert ea_model.setup_multi_gpu_inference is eagle_fast.setup_multi_gpu_inference
    assert inference.run_multi_gpu_inference is eagle_fast.run_multi_gpu_inference


def test_what_is_absent_says_what_is_there():
    for name in ("eagle.model.cnets", "eagle.model.utils_alpha"):
        with pytest.raises(ModuleNotFoundError, match=rf"{name}: .*eagle\.model\.ea_model"):
            importlib.import_module(name)
    with pytest.raises(SystemExit, match="usage"):
        compat.run_script([])


def test_rounds_cannot_be_driven_or_hooked_from_outside():
    from eagle.model import ea_model, kv_cache, utils

    for module, name in ((utils, "tree_decoding"), (ea_model, "evaluate_posterior"), (kv_cache, "KVCache")):
        with pytest.raises(NotImplementedError, match=rf"{name}: .*return_dict_in_generate=True"):
            getattr(module, name)(1, 2)
        with pytest.raises(AttributeError, match=rf"{name} is replaced: .* nothing calls it"):
            setattr(module, name, lambda *args: None)
    utils.counter = 0  # a script's own


@pytest.fixture
def without(monkeypatch):
    """As before `import eagle_fast.compat`; what a test imports is taken away again."""

    def ours(name):
        return name.partition(".")[0] in ("eagle", "model", "evaluation")

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if type(each).__name__ != "Finder"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    for name in [name for name in sys.modules if ours(name)]:
        del sys.modules[name]


@pytest.mark.parametrize("package", [True, False], ids=["package", "folder"])
def test_an_installed_package_is_not_hidden_silently(package, without, tmp_path):
    (tmp_path / "eagle").mkdir()
    if package:
        (tmp_path / "eagle" / "__init__.py").write_text("raise AssertionError('must not run')")
    sys.path.insert(0, str(tmp_path))
    with pytest.warns(UserWarning, match=f"hides the package `eagle` at .*{tmp_path.name}"):
        compat.install()
    assert importlib.import_module("eagle.model.ea_model").EaModel is eagle_fast.EaModel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.install()  # again: nothing to say


def test_an_imported_package_stays(without, monkeypatch):
    """Where its model is imported already; the rest of it may be, as with `python -m eagle.evaluation...`."""
    names = ("eagle", "eagle.model")
    others = {name: types.ModuleType(name) for name in names}
    for name, module in others.items():
        module.__spec__ = ModuleSpec(name, None, origin=f"/somewhere/{name.replace('.', '/')}/__init__.py")
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=r"imported already, from /somewhere/eagle/model/__init__.py"):
        compat.install()
    assert {name: sys.modules[name] for name in names} == others
    others["eagle"].__path__ = []
    monkeypatch.delitem(sys.modules, "eagle.model")
    compat.install()
    assert importlib.import_module("eagle.model.ea_model").EaModel is eagle_fast.EaModel
    assert sys.modules["eagle"] is others["eagle"]


# -- how a script is started -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
{imports}
ids = torch.tensor([[5, 17, 40]])
ea = EaModel.from_pretrained(
    base_model_path=sys.argv[1], ea_model_path=sys.argv[2], torch_dtype=torch.float32, device_map="cpu"
)
print(ea.eagenerate(ids, max_new_tokens=12)[0].tolist(), sys.argv[0])
"""
RELATIVE = """
from ..model.ea_model import EaModel
from ..model.utils import *
from ..model.kv_cache import initialize_past_key_values
from ..model.choices import a_tree
from .helper import NOTHING
"""
INSIDE = "from model.ea_model import EaModel\nfrom model.utils import *\nfrom model.choices import *\nassert a_tree"


def checkout(folder, script):
    """A checkout of EAGLE, with a model that must not be imported."""
    for package in ("eagle", "eagle/model", "eagle/evaluation"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("")
    (folder / "eagle/model/ea_model.py").write_text("raise AssertionError('must not run')")
    (folder / "eagle/model/choices.py").write_text("a_tree = [[0], [1], [0, 0]]")
    (folder / "eagle/evaluation/helper.py").write_text("NOTHING = 0")
    (folder / "eagle/evaluation/script.py").write_text(script)


@pytest.mark.parametrize(
    ("imports", "inside", "start"),
    [
        (RELATIVE, ".", ["-m", "eagle.evaluation.script"]),
        (RELATIVE, ".", ["eagle/evaluation/script.py"]),
        (RELATIVE, "eagle/evaluation", ["script.py"]),
        (INSIDE, "eagle", ["-m", "evaluation.script"]),
        (INSIDE, "eagle", ["evaluation/script.py"]),
    ],
)
def test_scripts_start_as_their_readme_says(imports, inside, start, folders, stock, without, tmp_path, capsys, request):
    checkout(tmp_path, SCRIPT.format(imports=imports))
    request.getfixturevalue("monkeypatch").chdir(tmp_path / inside)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.run_script([*start, *folders])
    text, _, name = capsys.readouterr().out.strip().rpartition(" ")
    assert text == str(stock(torch.tensor([[5, 17, 40]]))[0].tolist())
    assert Path(name).name == "script.py"


def test_other_modules_called_model_are_left_alone(without, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.py").write_text("NAME = 'mine'")
    (tmp_path / "script.py").write_text("from eagle.model.ea_model import EaModel\nimport model\nprint(model.NAME)")
    monkeypatch.chdir(tmp_path)
    compat.run_script(["script.py"])
    assert capsys.readouterr().out == "mine\n"


def test_help_and_wrong_starts(capsys):
    compat.run_script(["--help"])
    assert "eagle.evaluation" in capsys.readouterr().out
    for wrong in (["--flag"], ["-m"], ["--accept-lengths"]):
        with pytest.raises(SystemExit, match="usage"):
            compat.run_script(wrong)


# -- loops of plain decoding, and results of branches and forks -------------------------------------------------------


def test_a_loop_of_plain_decoding(folders, stock):
    """As in EAGLE's gen_baseline_answer scripts: one cache for all prompts, zeroed before each."""
    scope: dict = {}
    exec("from eagle.model.utils import *\nfrom eagle.model.kv_cache import initialize_past_key_values", scope)
    model = pair(folders)
    buffers = scope["generate_tree_buffers"]([[0], [1], [0, 0], [0, 1]], device="cpu")
    assert buffers["retrieve_indices"].tolist() == [[0, 1, 3], [0, 1, 4], [0, 2, -1]]
    assert buffers["tree_attn_mask"][0, 0, 4].tolist() == [1, 1, 0, 0, 1]
    assert buffers["tree_position_ids"].tolist() == [0, 1, 1, 2, 2]
    cache, _, lengths = scope["initialize_past_key_values"](model.base_model)
    for prompt in ([[5, 17, 40]], [[9, 30]]):
        ids = torch.tensor(prompt)
        model.ea_layer.reset_kv()
        lengths.zero_()
        scope["reset_tree_mode"](model)
        with torch.inference_mode():
            outputs = model.base_model(ids, past_key_values=cache, use_cache=True)
            for _ in range(NEW):
                token = outputs.logits[:, -1:].argmax(-1)
                outputs = model.base_model(token, past_key_values=cache, use_cache=True)
                ids = torch.cat([ids, token], -1)
        assert torch.equal(ids, stock(torch.tensor(prompt), eos_token_id=130))
        scope["reset_past_key_values"](cache)
        assert cache.get_seq_length() == 0
    with pytest.raises(AttributeError, match="zero_"):
        lengths.tolist()


def loaded(folders, name):
    return importlib.import_module(name).EaModel.from_pretrained(
        base_model_path=folders[0], ea_model_path=folders[1], device_map="cpu", torch_dtype=torch.float32
    )


def test_batches_of_version_1(folders, stock):
    """The mask by position, and lists of ids without padding."""
    ids = torch.tensor([[0, 9, 30], [5, 17, 40]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = [stock(row[kept.bool()][None])[0].tolist() for row, kept in zip(ids, mask, strict=True)]
    for module in ("eagle.modelbsne1.ea_model", "model.ea_model"):
        model = loaded(folders, module)
        assert model.eagenerate(ids, mask, temperature=0.0, max_new_tokens=NEW) == expected
        texts, counts, last, seconds = model.naivegenerate(ids, mask, 0.0, max_new_tokens=NEW, log=True)
        assert texts == expected
        assert counts == [len(text) - len(row[kept.bool()]) for text, row, kept in zip(texts, ids, mask, strict=True)]
        assert [each + 1 for each in last] == counts
        assert all(each > 0 for each in seconds)
    assert torch.equal(model.eagenerate(ids[1:], max_new_tokens=NEW), stock(ids[1:]))
    with pytest.warns(UserWarning, match="tree_choices is not used"):
        model.eagenerate(ids[1:], max_new_tokens=2, tree_choices=[[0]])


def test_any_model_of_version_1(folders, stock):
    from eagle.modeling_eagle import EAGLE

    target = AutoModelForCausalLM.from_pretrained(folders[0])
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer(["w5 w17 w40", "w9 w30"], return_tensors="pt", padding=True)
    texts = EAGLE(target, folders[1]).generate(**inputs, max_new_tokens=NEW, temperature=0.0)
    assert texts == [stock(torch.tensor([row]))[0].tolist() for row in ([5, 17, 40], [9, 30])]
    assert EAGLE(target, folders[1]).generate(torch.tensor([[9, 30]]), max_new_tokens=NEW) == texts[1]


def test_accept_lengths(folders, stock, without, tmp_path, monkeypatch, capsys):
    """HASS counts drafted tokens, Spec-Bench all of a round, and its rounds from one."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(imports="import torch\nfrom eagle.model.ea_model import EaModel")
        + "a, b, c, d = ea.eagenerate(ids, max_new_tokens=12, log=True)\nprint(a[0].tolist(), b, c, d, sep='; ')"
    )
    expected = stock(torch.tensor([[5, 17, 40]]))[0].tolist()
    with pytest.raises(ValueError, match="--accept-lengths"):
        compat.run_script([str(script), *folders])
    for name in [name for name in sys.modules if name.startswith("eagle.")] + ["eagle"]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if type(each).__name__ != "Finder"])
    capsys.readouterr()
    compat.run_script(["--accept-lengths", str(script), *folders])
    ids, new, last, lengths = (ast.literal_eval(part) for part in capsys.readouterr().out.splitlines()[1].split("; "))
    assert ids == expected
    assert new == sum(lengths) + len(lengths) == len(expected) - 3
    assert last == len(lengths) - 1
    ids, new, rounds, lengths = loaded(folders, "model.eagle3.ea_model").eagenerate(
        torch.tensor([[5, 17, 40]]), max_new_tokens=12, log=True
    )
    assert ids[0].tolist() == expected
    assert (new, rounds) == (sum(lengths), len(lengths))
