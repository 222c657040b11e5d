"""`python -m eagle_fast.compat`: a script for SafeAILab/EAGLE, or a module of it, as it is."""

from __future__ import annotations

import ast
import builtins
import os
import re
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from eagle_fast.upstream.finder import install

USAGE = """usage: python -m eagle_fast.compat [--accept-lengths] SCRIPT [ARGUMENTS]
       python -m eagle_fast.compat [--accept-lengths] -m PACKAGE.MODULE [ARGUMENTS]

Runs a script that was written for SafeAILab/EAGLE on eagle_fast, as `python SCRIPT` or `python -m PACKAGE.MODULE`
would.

  --accept-lengths  eagenerate(log=True) returns a fourth value, as in HASS: how many drafted tokens each round accepted

    cd EAGLE
    python -m eagle_fast.compat -m eagle.evaluation.gen_ea_answer_llama3chat --base-model-path ... --ea-model-path ...
    python -m eagle_fast.compat eagle/application/webui.py --base-model-path ... --ea-model-path ..."""
FOURTH = (
    "eagenerate(log=True) returns three values, as EAGLE's does; the script expects four, as HASS's "
    "gives: run it with python -m eagle_fast.compat --accept-lengths"
)
NOT_SOURCE = (".pyc", ".pyz", ".zip")


def run_script(arguments: Sequence[str]) -> None:
    """Run a script or a module with these arguments, those of `python -m eagle_fast.compat`."""
    accept_lengths = list(arguments[:1]) == ["--accept-lengths"]
    rest = list(arguments[1:] if accept_lengths else arguments)
    if rest[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    as_module = rest[:1] == ["-m"]
    rest = rest[1:] if as_module else rest
    if not rest or rest[0].startswith("-"):
        raise SystemExit(USAGE)
    install(accept_lengths=accept_lengths, quiet=True)
    here = str(Path.cwd())
    sys.argv = list(rest)
    try:
        if as_module:
            sys.path[0] = here
            if not _is_there(rest[0]):
                _stop(f"there is no module {rest[0]} in {here}, nor on the path")
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            return
        script = Path(rest[0]).resolve()
        if not os.access(script, os.R_OK):
            _stop(f"SCRIPT={rest[0]!r} is not there, or cannot be read")
        sys.path[0] = str(script.parent)
        sys.path.insert(1, here)
        if script.is_dir() or script.suffix in NOT_SOURCE:
            runpy.run_path(rest[0], run_name="__main__")
            return
        package = _package_of(script)
        if package is None:
            _run_file(os.path.abspath(rest[0]))
            return
        top, name = package
        sys.path.insert(2, str(top))
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except ValueError as error:
        if not accept_lengths and re.search(r"expected 4, got 3", str(error)):
            raise ValueError(FOURTH) from error
        raise


def _stop(reason: str) -> None:
    print(f"eagle_fast.compat: {reason}", file=sys.stderr)
    raise SystemExit(2)


def _is_there(module: str) -> bool:
    """Whether there is such a module; errors of the packages around it come out as they are."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(f"{error.name}."):
            raise
        return False


def _run_file(path: str) -> None:
    """As `python SCRIPT`: `__file__` is absolute, sys.argv[0] as it was given, and `__main__` stays when it ends."""
    main = ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=builtins, __loader__=SourceFileLoader("__main__", path))
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _package_of(script: Path) -> tuple[Path, str] | None:
    """(the folder of the top package, the script's name as a module) of a script that imports from its own package."""
    levels = [node.level for node in ast.walk(ast.parse(script.read_bytes())) if isinstance(node, ast.ImportFrom)]
    depth = max(levels, default=0)
    if depth == 0:
        return None
    top = script.parents[depth]
    while (top / "__init__.py").is_file():
        top = top.parent
    return top, ".".join(script.relative_to(top).with_suffix("").parts)
