"""`eagle.model` of SafeAILab/EAGLE at import: modules of ours under its names, beside whatever else a checkout holds.

`eagle` and `model` are packages here that lie over those of a checkout or an installation: `eagle.evaluation`, say, is
the checkout's, `eagle.model.ea_model` ours, and a module that is neither is an error that says what there is.
"""

from __future__ import annotations

import functools
import runpy
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from eagle_fast.upstream.children import hand_on
from eagle_fast.upstream.loops import OWN_ROUNDS
from eagle_fast.upstream.names import FUNCTIONS, modules

PACKAGES = ("eagle", "model")


class Upstream(ModuleType):
    """A module of ours under a name of SafeAILab/EAGLE. A function that is replaced in it would never be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FUNCTIONS:
            raise AttributeError(f"{self.__name__}.{name} is replaced: {OWN_ROUNDS}")
        super().__setattr__(name, value)


class Finder(MetaPathFinder, Loader):
    """Asked first, of all names below `eagle` and `model`."""

    def __init__(self, accept_lengths: bool = False):
        self.accept_lengths = accept_lengths
        self.contents = modules(accept_lengths)

    def find_spec(self, fullname, path=None, target=None):
        top, _, rest = fullname.partition(".")
        if top not in PACKAGES or (top == "model" and not self._is_eagles(rest)):
            return None
        if fullname in self.contents and (rest.startswith("model") or is_ours(sys.modules.get(top)) or not rest):
            is_package = fullname in {name.rpartition(".")[0] for name in self.contents}
            spec = ModuleSpec(fullname, self, is_package=is_package, origin=__file__)
            if is_package:
                spec.submodule_search_locations = folders(fullname)
            return spec
        return self._others(fullname, path)

    def _is_eagles(self, rest: str) -> bool:
        """Whether `model` is, or would be, EAGLE's: it holds its ea_model, at most one folder down, or is nowhere."""
        if rest:
            return is_ours(sys.modules.get("model"))
        found = PathFinder.find_spec("model")
        if found is None:
            return True
        places = map(Path, found.submodule_search_locations or [])
        return any(next(place.glob(pattern), None) for place in places for pattern in ("ea_model.py", "*/ea_model.py"))

    def _others(self, fullname: str, path) -> ModuleSpec | None:
        """A module of the checkout, but for files beside those of ours: they are parts of another engine."""
        parent, _, name = fullname.rpartition(".")
        if not is_ours(sys.modules.get(parent)):
            return None
        found = PathFinder.find_spec(fullname, path)
        beside = f"{parent}.ea_model" in self.contents and not _is_folder(found)
        engine = name.startswith("model") if parent == "eagle" else beside
        if found is not None and not engine:
            return found
        there = [name for name, contents in self.contents.items() if contents and name.startswith(f"{parent}.")]
        raise ModuleNotFoundError(
            f"{fullname}: `{parent}` is eagle_fast.compat here and has {', '.join(there)}. A script that needs other "
            "parts of EAGLE or of a fork needs that package",
            name=fullname,
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Upstream(spec.name, f"Names of SafeAILab/EAGLE's {spec.name}, from eagle_fast.compat.")

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.contents[module.__name__])
        if module.__name__.endswith(".choices"):
            vars(module).update(choices(module.__name__))


def folders(package: str) -> list[str]:
    """Folders of a package on the path, for what it has besides ours."""
    top, _, rest = package.partition(".")
    found = PathFinder.find_spec(top)
    places = [] if found is None else list(found.submodule_search_locations or [])
    inside = [str(Path(place, *rest.split("."))) if rest else place for place in places]
    return [place for place in inside if Path(place).is_dir()]


def choices(name: str) -> dict[str, Any]:
    """Trees by name, of the file that a checkout has in the place of this module."""
    package = name.rpartition(".")[0]
    for place in [*folders(package), *folders(f"eagle.{package}")]:
        file = Path(place, "choices.py")
        if file.is_file():
            return {key: value for key, value in runpy.run_path(str(file)).items() if not key.startswith("__")}
    return {}


def install(*, accept_lengths: bool = False, quiet: bool = False) -> None:
    """Make `eagle.model` importable, in this process and in those that multiprocessing spawns; a second time changes
    nothing. quiet: a package that is hidden is meant to be."""
    if _installed() is not None:
        return
    loaded = next((name for name in ("eagle.model", "eagle.model.ea_model") if name in sys.modules), None)
    if loaded is not None:
        raise ImportError(
            f"`{loaded}` is imported already, from {_place(sys.modules[loaded].__spec__)}: import eagle_fast.compat "
            "before it, or leave out the one of them that you don't want"
        )
    hidden = PathFinder.find_spec("eagle")
    if hidden is not None and not quiet:
        warnings.warn(
            f"eagle_fast.compat hides the package `eagle` at {_place(hidden)}: `eagle.model` is eagle_fast now. "
            "To use that package, don't import eagle_fast.compat",
            stacklevel=3,
        )
    sys.meta_path.insert(0, Finder(accept_lengths))
    hand_on(_install_alike)


def _installed() -> Finder | None:
    return next((each for each in sys.meta_path if isinstance(each, Finder)), None)


def _install_alike() -> Callable[[], None] | None:
    """What another process calls to find what this one finds."""
    finder = _installed()
    return None if finder is None else functools.partial(install, accept_lengths=finder.accept_lengths, quiet=True)


def is_ours(module: ModuleType | None) -> bool:
    return isinstance(module, Upstream)


def _is_folder(spec: ModuleSpec | None) -> bool:
    return spec is not None and spec.submodule_search_locations is not None


def _place(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "an unknown place"
    return spec.origin or ", ".join(spec.submodule_search_locations or []) or "an unknown place"
