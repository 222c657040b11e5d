"""The command as a whole: help that teaches, versions, and the options of loading."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from shell_pairs import eagle_fast

from eagle_fast import EaModel, loading_arguments
from eagle_fast.cli import COMMANDS, main
from eagle_fast.pairs import smollm2_head
from eagle_fast.shell import slash
from eagle_fast.shell.screen import Screen

LOADERS = ("chat", "generate", "bench")


def helped(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_examples(name, capsys):
    text = helped(name, capsys)
    examples = re.findall(rf"^    .*\beagle-fast {name}\b.*$", text, re.MULTILINE)
    assert examples, "an example is a line that begins with four spaces"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", LOADERS)
def test_examples_can_be_parsed(name, capsys, monkeypatch):
    """Every option that an example names is one."""
    text = helped(name, capsys)
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", text.split("options:")[1]))
    examples = "\n".join(re.findall(rf"^    .*\beagle-fast {name}\b.*$", text, re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", examples)) <= options


@pytest.mark.parametrize("name", LOADERS)
def test_loading_options_are_those_of_from_pretrained(name, capsys):
    text = helped(name, capsys)
    for option in ("model", "head", "device-map", "max-memory", "dtype", "target-bits", "lm-head-bits", "adaptive",
                   "draft-int8", "draft-device", "trust-remote-code", "revision", "tree", "load",
                   "tensor-parallel"):  # fmt: skip
        assert f"--{option}" in text


def test_python_m_and_versions():
    done = eagle_fast("--version")
    assert done.returncode == 0
    version = importlib.metadata.version
    assert done.stdout.startswith(f"eagle-fast {version('eagle-fast')} (torch {version('torch')}, transformers ")
    listed = eagle_fast("--help").stdout
    assert all(re.search(rf"^  {name} ", listed, re.MULTILINE) for name in COMMANDS)
    assert eagle_fast("nonsense").returncode == eagle_fast().returncode == 2


@pytest.fixture
def loaded(monkeypatch):
    """Call with arguments of `generate`: what from_pretrained is given."""
    given = {}

    def from_pretrained(**options):
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(EaModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading_arguments, "smollm2_target", lambda: "made here")

    def load(*arguments):
        given.clear()
        assert main(["generate", "w5", *arguments]) == 2
        return dict(given)

    return load


def test_options_arrive(loaded):
    assert loaded("--model", "a/b", "--head", "c/d") == {
        "base_model_path": "a/b", "ea_model_path": "c/d", "device_map": "auto", "max_memory": None, "total_token": 60,
        "depth": 7, "top_k": 10,
    }  # fmt: skip
    found = loaded(
        *("--model", "a/b", "--head", "c/d", "--device-map", '{"": 1}', "--max-memory", "7GiB, 8GiB"),
        *("--dtype", "float16", "--tree", "8", "3", "2", "--target-bits", "4", "--lm-head-bits", "8", "--no-adaptive"),
        *("--draft-int8", "--trust-remote-code", "--head-revision", "v2", "--load", "rope_theta=5e5"),
        *("--load", "variant=fp16", "--load", "feature-layers=[1, 2, 3]"),
    )
    assert found == {
        "base_model_path": "a/b", "ea_model_path": "c/d", "device_map": {"": 1}, "max_memory": {0: "7GiB", 1: "8GiB"},
        "dtype": torch.float16, "total_token": 8, "depth": 3, "top_k": 2, "target_bits": 4, "lm_head_bits": 8,
        "adaptive": False, "draft_int8": True, "trust_remote_code": True, "ea_revision": "v2", "rope_theta": 5e5,
        "variant": "fp16", "feature_layers": [1, 2, 3],
    }  # fmt: skip
    assert loaded("--model", "a/b", "--head", "c/d", "--device-map", "1")["device_map"] == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [("2", 2), ("all", True), ("off", False), ("0,1", ["cuda:0", "cuda:1"]), ("cpu, cpu", ["cpu", "cpu"])],
)
def test_ranks_as_they_are_written(said, expected, loaded):
    found = loaded("--model", "a/b", "--head", "c/d", "--tensor-parallel", said)
    assert found["tensor_parallel"] == expected
    assert found["device_map"] == "auto"


@pytest.mark.parametrize("said", ["0,", "both", ""])
def test_ranks_that_are_none(said, loaded, capsys):
    assert loaded("--model", "a/b", "--head", "c/d", "--tensor-parallel", said) == {}
    assert f"--tensor-parallel {said}: use a number of GPUs" in capsys.readouterr().err


def test_an_error_about_ranks_names_the_option(capsys):
    assert main(["generate", "w5", "--model", "a/b", "--head", "c/d", "--tensor-parallel", "1"]) == 2
    assert "--tensor-parallel 1: give the number of GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("named", [[], ["--model", "smollm2"]])
def test_without_names_it_is_the_pair_of_the_demo(named, loaded):
    found = loaded(*named, "--device-map", "cpu")
    assert (found["base_model_path"], found["ea_model_path"]) == ("made here", str(smollm2_head()))
    assert found["dtype"] == torch.float32
    assert loaded(*named, "--dtype", "bfloat16")["dtype"] == torch.bfloat16
    if named:
        assert loaded(*named, "--head", "c/d")["ea_model_path"] == "c/d"


@pytest.mark.parametrize(("named", "missing"), [(["--head", "c/d"], "--model"), (["--model", "a/b"], "--head")])
def test_half_a_pair_is_refused(named, missing, loaded, capsys):
    assert loaded(*named) == {}
    assert f"name it with {missing}" in capsys.readouterr().err


def test_the_page_about_the_shell_names_every_command():
    page = (Path(__file__).resolve().parent.parent.parent / "docs" / "shell.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^\| `/(\w+).*?` \|", page, re.MULTILINE) == list(slash.COMMANDS)


def test_a_text_does_not_drive_the_terminal(capsys):
    terminal, pipe = Screen(colors=True), Screen()
    terminal.answers = Console(force_terminal=True)
    terminal.write("a\x1b[2Jb")
    pipe.write("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\u241b[2Jb" + "a\x1b[2Jb"
