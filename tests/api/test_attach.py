"""`eagle-fast attach`: folders that tools of transformers load by themselves, and what they decode then."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from chatty import END, make_tokenizer
from often_right import write_often_right_head
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from zoo import make

from eagle_fast import TreeConfig
from eagle_fast.attach import attach
from eagle_fast.cli import main

NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target with tokenizer, head) as paths."""
    root = tmp_path_factory.mktemp("pair")
    model = make("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    model.save_pretrained(root / "target")
    make_tokenizer().save_pretrained(root / "target")
    write_often_right_head(model, root / "head")
    return root / "target", root / "head"


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    place = tmp_path_factory.mktemp("attached") / "both"
    assert main(["attach", *map(str, pair), str(place), "--tree", "16", "3", "4"]) == 0
    return place


@pytest.fixture
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def plain(pair):
    return AutoModelForCausalLM.from_pretrained(pair[0])


IDS = torch.tensor([[5, 17, 40]])


def rounds(model):
    """Of the model's last call: it leaves a state behind."""
    held = vars(model).get("_eagle_fast")
    return 0 if held is None or held.model is None else len(held.model.states.idle)


def test_nothing_is_copied(folder, pair):
    files = [each for each in folder.rglob("*") if each.is_file() and "custom_generate" not in each.parts]
    assert len(files) > 5
    for each in files:
        assert each.is_symlink()
        assert each.resolve().parent in pair


def test_generate_of_the_model_speculates_with_the_same_text(loaded, plain):
    expected = plain.generate(IDS, max_new_tokens=NEW)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=NEW), expected)
    assert torch.equal(loaded.generate(input_ids=IDS, max_new_tokens=NEW, do_sample=False), expected)
    assert rounds(loaded)
    decoder = loaded._eagle_fast.model
    assert decoder.tree == TreeConfig(16, 3, 4)
    result = loaded.generate(IDS, max_new_tokens=NEW, return_dict_in_generate=True)
    assert sum(result.statistics.new_tokens) == NEW
    torch.manual_seed(3)
    sampled = loaded.generate(IDS, max_new_tokens=NEW, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=NEW, do_sample=True), sampled)
    assert loaded._eagle_fast.model is decoder


def test_a_program_may_go_elsewhere_after_loading(folder, plain, tmp_path, monkeypatch):
    """The folder was named from where the program was."""
    (tmp_path / "named from here").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("named from here", trust_remote_code=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(model.generate(IDS, max_new_tokens=NEW), plain.generate(IDS, max_new_tokens=NEW))
    assert rounds(model)


def test_without_trust_it_is_the_plain_model(folder, plain):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.generate(IDS, max_new_tokens=NEW), plain.generate(IDS, max_new_tokens=NEW))
    assert not rounds(model)


def test_what_the_head_is_of_no_use_for_is_decoded_without(loaded, plain):
    options = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False}
    with pytest.warns(UserWarning, match=r"decoded without the head: beam_search \(num_beams=2\)"):
        found = loaded.generate(IDS, **options)
    assert torch.equal(found, plain.generate(IDS, **options))


def test_options_of_the_command(pair, tmp_path, monkeypatch):
    """What is said of decoding stands in the folder; names on the hub are fetched with their options."""
    fetched = {}

    def snapshot(name, **options):
        fetched[name] = options
        return str(pair[name == "its/head"])

    monkeypatch.setattr("eagle_fast.attach.snapshot_download", snapshot)
    hub = ["--revision", "v2", "--head-revision", "v3", "--cache-dir", "here", "--local-files-only"]
    decoding = ["--no-adaptive", "--no-draft-int8", "--tree", "8", "3", "2"]
    assert main(["attach", "its/model", "its/head", str(tmp_path / "both"), *hub, *decoding]) == 0
    for name, revision in (("its/model", "v2"), ("its/head", "v3")):
        options = {"revision": revision, "cache_dir": "here", "local_files_only": True}
        assert fetched[name].items() >= options.items()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both", trust_remote_code=True)
    model.generate(IDS, max_new_tokens=2)
    assert model._eagle_fast.model.tree == TreeConfig(8, 3, 2)
    assert not model._eagle_fast.model.adaptive


def test_an_error_on_the_way_is_not_decoded_again(loaded):
    def fails(ids, scores, **kwargs):
        raise ValueError("mine")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="mine"):
            loaded.generate(IDS, max_new_tokens=NEW, stopping_criteria=[fails])


def test_a_copy_has_a_decoder_of_its_own(loaded):
    text = loaded.generate(IDS, max_new_tokens=NEW)
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    other.generate(IDS, max_new_tokens=NEW)
    assert other._eagle_fast.model.base_model is other
    assert torch.equal(loaded.generate(IDS, max_new_tokens=NEW), text)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_by_name(folder, plain):
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = pipe("w5 w17 w40", max_new_tokens=NEW, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert found == plain.generate(IDS, max_new_tokens=NEW)[0].tolist()
    assert tokenizer.decode(found).startswith("w5 w17 w40")
    assert rounds(pipe.model)


def test_generate_of_another_repository_still_runs(loaded, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(model, **options): return 'theirs'")
    assert loaded.generate(IDS, custom_generate=str(tmp_path), trust_remote_code=True) == "theirs"


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("full", "FOLDER=.* is there already"),
        ("no target", "MODEL='/no/such': there is no such folder"),
        ("empty target", "has no config.json"),
        ("empty head", "no config.json in"),
        ("another target", "draft head .*: .*128"),
        ("the head first", "is a draft head: name the target first"),
        ("two targets", "draft head .*target"),
        ("tree", "total_token=1: use 2"),
        ("fixed and free", "total_token=-1 .* and adaptive=False holds it fixed"),
        ("no folder", "FOLDER=.* cannot be written: "),
    ],
)
def test_what_cannot_be_attached(which, message, pair, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    if which == "another target":
        make("llama", hidden_size=128).save_pretrained(tmp_path / "wide")
    target, head, place = pair[0], pair[1], tmp_path / "new"
    given = {
        "full": [target, head, folder], "no target": ["/no/such", head, place],
        "empty target": [tmp_path / "empty", head, place], "empty head": [target, tmp_path / "empty", place],
        "another target": [tmp_path / "wide", head, place], "the head first": [head, target, place],
        "two targets": [target, target, place],
        "no folder": [target, head, Path(head) / "config.json" / "new"],
        "tree": [target, head, place, "--tree", "1", "7", "10"],
        "fixed and free": [target, head, place, "--tree", "-1", "7", "10", "--no-adaptive"],
    }[which]  # fmt: skip
    assert main(["attach", *map(str, given)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_ea_generate_in_the_place_of_the_models(pair, plain):
    """`base.generate = ea.generate` does not call itself."""
    from eagle_fast import EaModel

    expected = plain.generate(IDS, max_new_tokens=NEW)
    decoder = EaModel.from_pretrained(base_model_path=plain, ea_model_path=pair[1])
    plain.generate = decoder.generate
    assert torch.equal(plain.generate(IDS, max_new_tokens=NEW), expected)
    assert decoder.states.idle
    with pytest.raises(ValueError, match="FOLDER"):
        attach(str(pair[0]), str(pair[1]), pair[0])
