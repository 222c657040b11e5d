"""The command as a whole: help that teaches, versions, and the options of loading."""

import importlib.metadata
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from shell_pairs import COMMAND, ENVIRONMENT, eagle_fast, write_pair

from eagle_fast import EaModel, loading_arguments
from eagle_fast.cli import COMMANDS, main
from eagle_fast.commands import loading
from eagle_fast.loading_options import transformers_options
from eagle_fast.pairs import smollm2_head
from eagle_fast.shell import slash
from eagle_fast.shell.screen import Screen

LOADERS = ("chat", "generate", "bench", "web")  # a pair, with all that can be said of it
OF_HUB = {"--revision", "--cache-dir", "--local-files-only"}
OF_TARGET = {"--device-map", "--dtype", "--target-bits", "--lm-head-bits", "--load"}
OF_HEAD = {"--draft-int8", "--tree"}
PLACED = {"--max-memory", "--tensor-parallel", "--draft-device"}
OF_PAIR = OF_HUB | OF_TARGET | OF_HEAD | PLACED | {"--model", "--head", "--head-revision", "--trust-remote-code"}
TAKEN = {  # command -> options of loading that make sense there
    **dict.fromkeys(LOADERS, OF_PAIR | {"--adaptive", "--attn-implementation"}),
    "doctor": OF_PAIR, "train": OF_HUB | OF_TARGET | {"--model", "--trust-remote-code", "--attn-implementation"},
    "demo": OF_TARGET | OF_HEAD | PLACED | {"--adaptive"}, "attach": OF_HUB | OF_HEAD | {"--head-revision"},
}  # fmt: skip


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


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_parsed(name, capsys, monkeypatch):
    """Every option that an example names is one."""
    text = helped(name, capsys)
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", text.split("options:")[1]))
    examples = "\n".join(re.findall(rf"^    .*\beagle-fast {name}\b.*$", text, re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", examples)) <= options


def test_every_command_is_looked_at():
    assert TAKEN.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", TAKEN)
def test_loading_options_are_those_of_from_pretrained(name, capsys):
    options = set(re.findall(r"(?<![\w-])--[a-z0-9-]+", helped(name, capsys)))
    assert options >= TAKEN[name]
    own = {f"--{each.replace('_', '-')}" for each in loading.OPTIONS}
    known = {*inspect.signature(EaModel.from_pretrained).parameters, *transformers_options()}
    for each in own & options - {"--model", "--head", "--head-revision", "--tree", "--load"}:
        assert each.removeprefix("--").replace("-", "_") in known | {"cache_dir", "local_files_only", "revision"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_there_at_once(arguments):
    """Without torch and transformers, which take seconds."""
    code = f"""
import sys
from eagle_fast.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(*({{"torch", "transformers", "rich"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_names_of_the_package_are_imported_when_they_are_asked_for():
    code = """
import sys
import eagle_fast
assert "torch" not in sys.modules
assert {*eagle_fast.__all__} <= {*dir(eagle_fast)}
from eagle_fast import TreeConfig
assert "torch" not in sys.modules
assert eagle_fast.TreeConfig is TreeConfig
assert not hasattr(eagle_fast, "no_such_name")
from eagle_fast import *
assert EaModel is eagle_fast.model.EaModel is vars(eagle_fast)["EaModel"]
import eagle_fast.train
assert eagle_fast.train.train.__module__ == "eagle_fast.train.run"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_and_versions():
    done = eagle_fast("--version")
    assert done.returncode == 0
    version = importlib.metadata.version
    assert done.stdout.startswith(f"eagle-fast {version('eagle-fast')} (torch {version('torch')}, transformers ")
    listed = eagle_fast("--help").stdout
    assert all(re.search(rf"^  {name} ", listed, re.MULTILINE) for name in COMMANDS)
    assert eagle_fast("nonsense").returncode == eagle_fast().returncode == 2


@pytest.mark.parametrize(
    ("arguments", "redirected", "code"),
    [
        (["--help"], ">/dev/full", 2), (["generate", "w5"], ">/dev/full", 2),
        (["chat"], ">/dev/full", 2), (["generate"], "<&-", 2), (["chat"], "<&-", 0),
    ],
)  # fmt: skip
def test_streams_that_cannot_be_used_are_a_sentence(arguments, redirected, code, tmp_path):
    """A full disk; a stdin that is closed, which holds nothing."""
    pair = write_pair(tmp_path) if arguments[-1] != "--help" else []
    command = shlex.join([*COMMAND, *arguments, *pair])
    done = subprocess.run(
        f"echo w5 | {command} {redirected}", shell=True, capture_output=True, text=True,
        env=os.environ | ENVIRONMENT, timeout=300, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == code, done.stderr
    assert code == 0 or re.search("^eagle-fast.*: .", done.stderr, re.MULTILINE)


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
        "base_model_path": "a/b", "ea_model_path": "c/d", "device_map": "auto",
        "total_token": 60, "depth": 7, "top_k": 10,
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
    assert loaded("--model", "a/b", "--head", "c/d", "--tensor-parallel", "2")["tensor_parallel"] == 2
    found = loaded("--model", "a/b", "--head", "c/d", "--tensor-parallel", "cuda:1, cuda:3")
    assert found["tensor_parallel"] == ["cuda:1", "cuda:3"]
    for said, value in (("all", True), ("off", False)):
        assert loaded("--model", "a/b", "--head", "c/d", "--tensor-parallel", said)["tensor_parallel"] is value


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


def test_a_pipe_is_shown_no_bars(capsys):
    """Of transformers, while a command loads something: stderr is no terminal here."""
    bars = transformers.utils.logging
    bars.enable_progress_bar()
    with loading_arguments.as_written():
        pass
    assert not bars.is_progress_bar_enabled()
