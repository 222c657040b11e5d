"""What is installed, under which names and in which versions, and what an import does.

`kernels` is the name of a Hugging Face package that transformers imports. A package or module of ours of that name
would take its place wherever Python runs in the repository root: installed, ours is `eagle_fast_kernels`.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


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


# -- versions --------------------------------------------------------------------------------------------------------


def promised():
    """Requirement by name: everything that pyproject.toml asks for, extras and the build included."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = found["project"]["dependencies"] + found["build-system"]["requires"]
    lines += [line for extra in found["project"]["optional-dependencies"].values() for line in extra]
    requirements = {}
    for each in map(Requirement, lines):
        name = canonicalize_name(each.name)
        if name in requirements:  # numpy is asked for by the package and, more narrowly, by its tests
            each.specifier &= requirements[name].specifier
        requirements[name] = each
    return requirements


def lower_bound(requirement):
    (bound,) = {Version(each.version) for each in requirement.specifier if each.operator == ">="}
    return bound


def pins(text, python, folder=ROOT):
    """Version by name, of requirements' lines: exact ones, for one version of Python."""
    found = {}
    for line in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-c "):
            other = folder / line.split()[1]
            more = pins(other.read_text(encoding="utf-8"), python, other.parent)
        elif not line:
            continue
        else:
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", f"{line} leaves the version open"
            applies = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
            more = {canonicalize_name(requirement.name): Version(only.version)} if applies else {}
        assert not found.keys() & more.keys(), f"{line}: pinned twice"
        found |= more
    return found


def make_variable(name):
    (value,) = re.findall(rf"^{name} [:?]?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return value


def torch_pins(variable):
    words = re.findall(r"[a-z]+==[\d.]+", make_variable(variable))
    return pins("\n".join(words), "3.12")


def test_a_release_of_tomorrow_is_not_installed():
    requirements = promised()
    for name in ("torch", "triton", "transformers"):
        assert {each.operator for each in requirements[name].specifier} == {">=", "<"}, requirements[name]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("file", ["oldest", "between", "held"])
def test_what_make_installs_is_held_to_promised_versions(file, python):
    requirements = promised()
    held = pins(f"-c constraints/{file}.txt", python)
    held |= torch_pins("OLDEST_TORCH" if file == "oldest" else "TORCH")
    assert requirements.keys() <= held.keys()
    for name, requirement in requirements.items():
        assert requirement.specifier.contains(held[name]), f"{requirement}, but {file} has {held[name]}"


def test_the_oldest_versions_are_the_lower_bounds():
    requirements = promised()
    tools = pins("-c constraints/common.txt", "3.12").keys()
    oldest = pins("-c constraints/oldest.txt", "3.12")
    tested = requirements.keys() - tools - {"torch", "triton"}
    assert {"transformers", "accelerate", "huggingface-hub", "safetensors", "numpy", "einops"} <= tested
    assert {name: oldest[name] for name in tested} == {name: lower_bound(requirements[name]) for name in tested}
    for name, version in torch_pins("OLDEST_TORCH").items():
        assert version.release[:2] == lower_bound(requirements[name]).release, f"{name}: a patch release of the bound"


def test_the_readme_names_the_promised_versions():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    requirements = promised()
    held, oldest = (pins(f"-c constraints/{file}.txt", "3.12") for file in ("held", "oldest"))
    for name in ("transformers", "huggingface_hub", "accelerate"):
        key = canonicalize_name(name)
        row = [Version(cell) for cell in rows[name]]
        assert row[:2] == [oldest[key], held[key]]
        assert requirements[key].specifier.contains(row[2])
    row = [
        dict(zip(("torch", "triton"), map(Version, cell.split(", ")), strict=True))
        for cell in rows["PyTorch with its Triton"]
    ]
    assert row[:2] == [torch_pins("OLDEST_TORCH"), torch_pins("TORCH")]
    for name, version in row[2].items():
        assert requirements[name].specifier.contains(version)
        assert not requirements[name].specifier.contains(f"{version.major}.{version.minor + 1}"), "the newest in range"


def test_every_test_that_depends_on_versions_is_there():
    for name in make_variable("VERSION_TESTS").split():
        assert len(list((ROOT / "tests").rglob(f"test_{name}.py"))) == 1, f"VERSION_TESTS in the Makefile: {name}"
