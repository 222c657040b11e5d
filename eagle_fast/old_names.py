"""Modules under the names that they had before the code had rooms: `eagle_fast.round` is found as `decoding.round`.

An old name gives the module that has taken its place; where two have, one with the names of both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PLACES = {  # old module -> where its names are now
    "attention": ("layers.attention", "target.interface"),
    "cache": ("layers.slab", "target.interface"),
    "checkpoint": ("head.checkpoint",),
    "draft": ("decoding.draft",),
    "experts": ("target.experts",),
    "fused": ("target.fused",),
    "generation": ("decoding.generation",),
    "graph": ("decoding.graph",),
    "head_config": ("head.config",),
    "head_files": ("head.files",),
    "head_inference": ("head.inference",),
    "head_layer": ("head.layer",),
    "head_names": ("head.names",),
    "head_rope": ("head.rope",),
    "head_vocabulary": ("head.vocabulary",),
    "idle": ("decoding.states",),
    "linear": ("layers.linear",),
    "old_options": ("loading",),
    "placement": ("target.placement",),
    "probe": ("target.probe",),
    "processors": ("decoding.processors",),
    "reports": ("decoding.reports",),
    "request": ("decoding.request",),
    "rope": ("target.longrope",),
    "round": ("decoding.round",),
    "sampling": ("decoding.sampling",),
    "shards": ("target.shards",),
    "transfers": ("layers.transfers",),
    "tree": ("decoding.tree",),
    "twin": ("target.twin",),
    "validate": ("decoding.validate",),
}


class OldNames(MetaPathFinder, Loader):
    """Asked last, after every module that is there."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "eagle_fast" and name in PLACES else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [import_module(f"eagle_fast.{place}") for place in PLACES[module.__name__.rpartition(".")[2]]]
        if len(homes) == 1:
            sys.modules[module.__name__] = homes[0]  # which is then what the import gives
        for home in homes:
            vars(module).update({name: value for name, value in vars(home).items() if not name.startswith("__")})


def install() -> None:
    """Let old names be found; a second time changes nothing."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
