"""What is installed, under which names, and what an import does.

`kernels` is the name of a Hugging Face package that transformers imports. A package or module of ours of that name
would take its place wherever Python runs in the repository root: installed, ours is `eagle_fast_kernels`.
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run_python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_ours_is_called_kernels():
    """Folders that Python may meet on its path are no packages, and no module takes the name."""
    for folder in ("kernels", "tests", "bench"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py makes {folder} a package"
    ours = [path for folder in ("eagle_fast", "kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(ours) > 10
    assert not [path for path in [*ours, *ROOT.glob("*.py")] if path.stem == "kernels"]


def test_transformers_works_in_the_repository_root():
    code = """
import sys; assert sys.path[0] == ""
from packaging.version import InvalidVersion
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_kernels_available
config = AutoConfig.for_model("llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                              num_attention_heads=1, num_key_value_heads=1)
try:
    available = is_kernels_available()
except InvalidVersion:  # transformers 5.4 asks for the version of a folder that happens to have the name
    available = False
print(type(AutoModelForCausalLM.from_config(config)).__name__, available)
"""
    name, available = run_python(code, ROOT).split()
    assert name == "LlamaForCausalLM"
    installed = importlib.util.find_spec("kernels")
    assert available == "False" or (installed is not None and installed.origin is not None)


def test_import_elsewhere_touches_neither_network_nor_gpu(tmp_path):
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("the import opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
import eagle_fast, eagle_fast_kernels.launch
import torch
assert not torch.cuda.is_initialized()
print(eagle_fast.__file__)
print(eagle_fast_kernels.launch.__file__)
"""
    package, launch = run_python(code, tmp_path).splitlines()
    assert Path(package).parent.name == "eagle_fast"
    assert Path(launch).name == "launch.py"


def test_wheel_holds_both_packages(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build leaves files beside pyproject.toml
    for folder in ("eagle_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], cwd=source, check=True, timeout=300)

    (wheel,) = tmp_path.glob("eagle_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eagle_fast").rglob("*.py")}
    expected |= {f"eagle_fast_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules == expected, "a package is missing from, or too many in, tool.setuptools.packages"
    assert "License-Expression: Apache-2.0" in metadata
