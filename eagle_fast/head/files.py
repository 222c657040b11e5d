"""Files of a draft-head checkpoint: where they are, and reading them without running anything they contain."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from eagle_fast.messages import listed

# The first kind that is there is read: one file, or an index that names its shards.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_folder(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is, without a look at the network; any other name is downloaded from the Hugging Face hub.

    Raises ValueError if the name can only be a path and no folder is there, or if the hub does not give the head.
    """
    if not isinstance(path_or_repo, (str, os.PathLike)) or not str(path_or_repo):
        raise ValueError(f"path_or_repo={path_or_repo!r}: give a local folder or a hub name like 'owner/name'")
    name = str(path_or_repo)
    local = os.path.expanduser(name)
    if os.path.isdir(local):
        return Path(local)
    if os.path.exists(local):
        raise ValueError(f"{name} is a file: give the folder that holds the head's config.json and weights")
    if can_only_be_a_path(name):
        raise ValueError(f"there is no folder {name}: give a local folder or a hub name like 'owner/name'")

    def download(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        )

    try:
        folder = download("config.json", "*.safetensors", "*.safetensors.index.json")
        if not list(folder.glob("*.safetensors")):  # pickled weights only where there are no others
            folder = download("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
    except Exception as error:  # of the hub, of the network, of the disk: the client has no class for all
        raise ValueError(
            f"there is no such folder, and the Hugging Face hub does not give it: {_reason(error)}. Check the name "
            "(ea_model_path); a private or gated head needs token=, another branch revision= (ea_revision=), and "
            "without a network it must be in the cache"
        ) from error
    return folder


def can_only_be_a_path(name: str) -> bool:
    """Whether this is no name on the Hugging Face hub, which is 'name' or 'owner/name'."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain JSON: transformers' config classes drop or rename keys that heads rely on."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ValueError(f"no config.json in {folder}: a draft head needs config.json beside its weights")
    return _read_object(file)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {_reason(error)}; is it a file that you may read?") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): download the head again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object: download the head again")
    return content


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, on the CPU."""
    for name in _WEIGHTS:
        if os.path.lexists(folder / name):
            return _read_shards(folder, name) if name.endswith(".json") else _read_file(folder / name)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _read_file(others[0])
    found = listed(sorted(os.listdir(folder)), 12) or "nothing"
    raise ValueError(f"no weights in {folder}: looked for {', '.join(_WEIGHTS)}, one *.safetensors; found {found}")


def _read_shards(folder: Path, index: str) -> dict[str, torch.Tensor]:
    names = _read_object(folder / index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError(f"{folder / index} has no weight_map from tensors to files: download the head again")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"{folder / index} names the file {shard!r}, which is not there: download the head again")
        tensors |= _read_file(folder / shard)
    return tensors


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)  # tensors only: a pickle runs no code
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {_reason(error)}; is it a file that you may read?") from error
    except Exception as error:  # a damaged pickle raises anything; torch's advice for code is to run it
        why = "more than tensors" if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise ValueError(
            f"{file} cannot be read as plain tensors; damaged, a Git LFS pointer, or a pickle with code? "
            f"({why}) Download the head again"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, not a dictionary of tensors")
    return {str(name): tensor for name, tensor in tensors.items()}


def _reason(error: Exception, most: int = 300) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}"
