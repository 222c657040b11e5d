"""Names of a package that are imported when they are first asked for (PEP 562), so that importing it is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_on_demand(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """`__getattr__` of a package. places: name -> the module that it is in, "" for a module of the package itself."""

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places[name]
        value = getattr(import_module(place), name) if place else import_module(f"{package}.{name}")
        setattr(sys.modules[package], name, value)
        return value

    return find
