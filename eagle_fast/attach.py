"""`eagle-fast attach`: a model's folder with a draft head in it, all of links."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.validate import check_adaptive
from eagle_fast.head.checkpoint import check_folder, read_head
from eagle_fast.loading import known_path
from eagle_fast.loading_arguments import given
from eagle_fast.loading_errors import find_damage, loading
from eagle_fast.loading_target import read_config
from eagle_fast.target.anatomy import Anatomy

HEAD = "eagle_head"
HOOK = '''"""The draft head in {head}, through transformers' custom_generate: written by `eagle-fast attach`."""

from eagle_fast.attached import hook

generate = hook("{head}", {options})
'''
NOT_FETCHED = ["*.gguf", "original/*", "*.onnx", "*.msgpack", "*.h5"]
NOT_LINKED = (".git", ".cache", "custom_generate", HEAD)


def run(args: argparse.Namespace) -> int:
    options = given(args)
    told: dict[str, Any] = {name: options.pop(name) for name in ("draft_int8", "adaptive") if name in options}
    attach(args.model, args.head, args.folder, TreeConfig(*args.tree), told, options)
    print(f"{args.folder}: load it with trust_remote_code=True, `transformers serve` with --trust-remote-code")
    return 0


def attach(
    model: str,
    head: str,
    folder: str | Path,
    tree: TreeConfig | None = None,
    options: dict[str, Any] | None = None,
    hub: dict[str, Any] | None = None,
) -> None:
    """Write the folder. ValueError for a model, a head or a place that won't do.

    options: draft_int8 and adaptive, as from_pretrained takes them; hub: revision, ea_revision, cache_dir and
    local_files_only, for names on the hub.
    """
    tree = tree or TreeConfig()
    check_adaptive((options or {}).get("adaptive"), tree)
    own = dict(hub or {})
    revisions = {"model": own.pop("revision", None), "head": own.pop("ea_revision", None)}
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"FOLDER={str(place)!r} is there already: give another name, or remove it first")
    source = _local("MODEL", model, own | {"revision": revisions["model"]})
    drafter = _local("HEAD", head, own | {"revision": revisions["head"]})
    damage = find_damage(source)
    if damage:
        raise ValueError(f"MODEL={model!r} {damage}")
    _check_head(model, source, str(drafter))
    told = asdict(tree) | (options or {})
    text = HOOK.format(head=HEAD, options=", ".join(f"{name}={value!r}" for name, value in told.items()))
    try:
        _write(place, source, drafter, text)
    except OSError as error:
        raise ValueError(f"FOLDER={str(place)!r} cannot be written: {error}") from error


def _check_head(model: str, source: Path, drafter: str) -> None:
    """ValueError for folders that are no target and a head for it, which would be found out when they are loaded."""
    check_folder(drafter)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if any("eagle" in str(each).lower() for each in settings.get("architectures") or []):
        raise ValueError(f"MODEL={model!r} is a draft head: name the target first, then its head")
    if "auto_map" in settings:
        return  # code of the folder's own says what its sizes are
    config = read_config(str(source), {}, "MODEL")
    assert config is not None, "no gguf_file was named"
    anatomy = Anatomy(config)
    read_head(
        drafter, target_hidden_size=anatomy.hidden_size, target_vocab_size=anatomy.vocab_size,
        num_target_layers=anatomy.num_layers,
    )  # fmt: skip


def _write(place: Path, source: Path, drafter: Path, hook: str) -> None:
    (place / HEAD).mkdir(parents=True)
    (place / "custom_generate").mkdir()
    for target, into in ((source, place), (drafter, place / HEAD)):
        for each in sorted(target.iterdir()):
            if each.name not in NOT_LINKED:
                (into / each.name).symlink_to(each.absolute())
    (place / "custom_generate" / "generate.py").write_text(hook, encoding="utf-8")


def _local(name: str, path: str, hub: dict[str, Any]) -> Path:
    path = known_path(name, path)
    if Path(path).is_dir():
        return Path(path)
    with loading(name, path, hub):
        return Path(snapshot_download(path, ignore_patterns=NOT_FETCHED, **hub))
