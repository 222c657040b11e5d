"""The rooms of the house: who may import whom, and the names that modules had before there were rooms."""

import ast
import importlib
from pathlib import Path

import pytest

from eagle_fast.old_names import PLACES

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "eagle_fast"
# room -> rooms of this project that it may import; "face" is what lies beside the rooms
BELOW = {
    "kernels": set(),
    "layers": {"kernels"},
    "head": {"kernels", "layers"},
    "target": {"kernels", "layers"},
    "decoding": {"kernels", "layers", "head", "target"},
    "face": {"kernels", "layers", "head", "target", "decoding", "doctor", "train", "shell"},
    "doctor": {"kernels", "layers", "head", "target", "decoding", "face"},
    "train": {"kernels", "layers", "head", "target", "decoding", "face"},
    "shell": {"kernels", "layers", "head", "target", "decoding", "face"},
}
EVERYWHERE = {"eagle_fast.config", "eagle_fast.messages"}  # import nothing of ours but each other


def room_of(name):
    """The room of an imported module of ours, None for others."""
    first, *rest = name.split(".")
    if first == "eagle_fast_kernels":
        return "kernels"
    if first != "eagle_fast":
        return None
    return rest[0] if rest and rest[0] in BELOW else "face"


def imports(path):
    """The modules of ours that a file imports, wherever in it."""
    package = "eagle_fast_kernels" if path.parent.name == "kernels" else None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{package}.{node.module}" if node.level else node.module


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_import_what_lies_below_them(path):
    inside = path.relative_to(ROOT).parts
    own = "kernels" if inside[0] == "kernels" else inside[1] if inside[1] in BELOW else "face"
    for name in imports(path):
        room = room_of(name)
        if room not in (None, own) and name not in EVERYWHERE:
            assert room in BELOW[own], f"{path.name} is in {own}, which does not import {room}: {name}"


def test_there_are_files_in_every_room():
    found = {path.relative_to(ROOT).parts[1 if path.is_relative_to(PACKAGE) else 0] for path in FILES}
    assert set(BELOW) - {"face"} <= found


@pytest.mark.parametrize("name", PLACES)
def test_old_names_give_the_same_objects(name):
    old = importlib.import_module(f"eagle_fast.{name}")
    for place in PLACES[name]:
        for key, value in vars(importlib.import_module(f"eagle_fast.{place}")).items():
            if not key.startswith("__") and getattr(value, "__module__", "").startswith("eagle_fast"):
                assert getattr(old, key) is value


def test_an_old_name_of_one_module_is_that_module():
    from eagle_fast import round as old
    from eagle_fast.decoding import round as now

    assert old is now
    assert now.__name__ == now.__spec__.name == "eagle_fast.decoding.round"


def test_names_that_never_were_stay_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"eagle_fast\.rounds"):
        importlib.import_module("eagle_fast.rounds")


def test_tests_import_no_tests():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], path
