"""What went wrong where a checkpoint could not be loaded: a sentence that names the argument, the file and the remedy.

transformers and the libraries below it raise errors of many kinds, some without the name of a file, some pages long.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from safetensors import safe_open

from eagle_fast.loading_options import UnknownOption
from eagle_fast.messages import shown

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"
LONGEST = 300
HIDDEN = ("token", "proxies")  # may hold secrets

_HUB = (  # the first that is among an error's causes
    (hub.GatedRepoError, "is gated: ask for access on its page on the hub, then log in or pass token="),
    (hub.RevisionNotFoundError, "has no such revision: look at its branches and tags on the hub"),
    (hub.RepositoryNotFoundError, "is not on the hub: check the name, and pass token= if it is private"),
    (hub.HFValidationError, "is neither a folder nor a name that the hub could have: give 'owner/name' or a folder"),
    (
        (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError),
        "is not a folder, and is neither in the hub's cache nor could it be fetched: check the name and the network, "
        "or give a folder",
    ),
    (hub.EntryNotFoundError, "lacks a file that is needed to load it: is it a whole checkpoint?"),
)


@contextmanager
def loading(name: str, path: str, options: dict[str, Any], *, tokenizer: bool = False) -> Iterator[None]:
    """Around calls of transformers that load the checkpoint given as argument `name`: their errors as ValueErrors.

    options: those of from_pretrained. TypeError for one that neither the model nor its config knows. Out of memory
    stays what it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown:
            raise UnknownOption(unknown[1], rest="the rest goes to from_pretrained of transformers") from error
        folder = Path(path) / str(options.get("subfolder") or "")
        reason = explain(error, folder, options, tokenizer=tokenizer)
        raise ValueError(f"{name}={path!r} {reason}") from error


def explain(error: BaseException, folder: Path, options: dict[str, Any], *, tokenizer: bool = False) -> str:
    """The rest of a sentence about a checkpoint that `error` kept from loading with these options."""
    gguf_file = options.get("gguf_file")
    causes = list(_causes(error))
    denied = next((each for each in causes if isinstance(each, PermissionError)), None)
    if denied is not None:
        return f"cannot be read: no permission for {denied.filename or folder}"
    if folder.is_dir() and not tokenizer:
        damage = _damage_of_gguf(folder / str(gguf_file)) if gguf_file else find_damage(folder)
        if damage:
            return damage
    for kinds, sentence in _HUB:
        if any(isinstance(each, kinds) for each in causes):
            return sentence
    if tokenizer:
        return (
            f"cannot be loaded ({first_sentence(error)}): load a tokenizer yourself, and pass tokenizer= where one is"
        )
    given = said(options)
    if "mismatched" in str(error) or "size mismatch" in str(error):
        also = f", or {given}," if given else ""
        return f"has tensors of other shapes than its config.json{also} says: is the config of another model?"
    what = first_sentence(error)
    beside = f", and {'is' if len(options) == 1 else 'are'} {given}" if given else ""
    if isinstance(error, (OSError, ValueError, ImportError)):
        return f"cannot be loaded: {what}" + (f" (with {given})" if given else "")
    if gguf_file:
        return f"cannot be loaded ({type(error).__name__}: {what}): is {gguf_file} whole?"
    return f"cannot be loaded ({type(error).__name__}: {what}): is its config.json right{beside}?"


def said(options: dict[str, Any]) -> str:
    """Options as they were given, those without secrets."""
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items() if name not in HIDDEN)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_sentence(error: BaseException) -> str:
    """What an error says, without its lists and pages."""
    text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."


# -- folders -----------------------------------------------------------------------------------------------------------


def find_damage(folder: Path) -> str:
    """What of a checkpoint's folder is missing or cannot be read, as the rest of a sentence; "" if nothing is."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"cannot be read: no permission for {folder}"
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
        return f"has no config.json, which says the model_type and the sizes; the folder holds {found}"
    problem = _not_json(folder / "config.json")
    if problem:
        return problem
    present = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if present is None:
        found = ", ".join(sorted(each.name for each in folder.iterdir())[:8])
        return f"has no weights ({', '.join(WEIGHTS)}); the folder holds {found}"
    if not present.endswith(".json"):
        return _damage_of(folder / present)
    return _damage_of_index(folder / present)


def _not_json(file: Path) -> str:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is damaged: {file.name} is not JSON ({first_sentence(error)}); download it again"
    return "" if isinstance(content, dict) else f"is damaged: {file.name} holds no JSON object; download it again"


def _damage_of_gguf(file: Path) -> str:
    if not file.is_file():
        found = ", ".join(sorted(each.name for each in file.parent.glob("*.gguf"))[:8]) or "none"
        return f"has no file {file.name}, which gguf_file= names; its GGUF files: {found}"
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    return (
        ""
        if start.startswith(b"GGUF")
        else f"is damaged: {file.name} is no GGUF file, and gguf_file= names it; download it again"
    )


def _damage_of_index(index: Path) -> str:
    problem = _not_json(index)
    if problem:
        return problem
    names = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        return f"is damaged: {index.name} has no weight_map with names of files; download it again"
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            return f"is damaged: {index.name} names {shard!r}, which is no file of the folder; download it again"
        if not (index.parent / shard).is_file():
            return f"is incomplete: {index.name} names {shard}, which is not there; download it again"
        problem = _damage_of(index.parent / shard)
        if problem:
            return f"{problem} ({index.name} names it)"
    return ""


def _damage_of(file: Path) -> str:
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"is incomplete: {file.name} is a Git LFS pointer; run git lfs pull, or download it again"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return ""
        torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch and safetensors have many, all of which mean the same here
        return f"is damaged: {file.name} cannot be read ({first_sentence(error)}); download it again"
    return ""
