"""Scripts written for SafeAILab/EAGLE against `eagle_fast.compat`: its README's, its evaluation loop, its chat window.

The calls are those of the scripts, the code around them is ours. Every text is compared with stock `generate`.
"""

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
    with pytest.raises(ModuleNotFoundError, match=r"eagle\.model\.cnets: .*eagle\.model\.ea_model"):
        importlib.import_module("eagle.model.cnets")
    from eagle.model.kv_cache import initialize_past_key_values

    with pytest.raises(NotImplementedError, match="naivegenerate"):
        initialize_past_key_values(object())
    with pytest.raises(SystemExit, match="usage"):
        compat.run_script([])


@pytest.fixture
def without(monkeypatch):
    """As before `import eagle_fast.compat`; what a test installs is taken away again."""
    for name in compat.MODULES:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if type(each).__name__ != "_Absent"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in compat.MODULES:
        sys.modules.pop(name, None)


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
    other = types.ModuleType("eagle")
    other.__spec__ = ModuleSpec("eagle", None, origin="/somewhere/eagle/__init__.py")
    monkeypatch.setitem(sys.modules, "eagle", other)
    with pytest.raises(ImportError, match=r"imported already, from /somewhere/eagle/__init__.py"):
        compat.install()
    assert sys.modules["eagle"] is other
