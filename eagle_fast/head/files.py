"""Files of a draft-head checkpoint: where they are, and reading them without running anything they contain."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

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

    Raises ValueError if the name can only be a path and no folder is there.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if folder.exists():
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

    folder = download("config.json", "*.safetensors", "*.safetensors.index.json")
    if not list(folder.glob("*.safetensors")):  # pickled weights only where there are no others
        folder = download("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
    return folder


def can_only_be_a_path(name: str) -> bool:
    """Whether this is no name on the Hugging Face hub, which is 'name' or 'owner/name'."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain JSON: transformers' config classes drop or rename keys that heads rely on."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"no config.json in {folder}: a draft head needs config.json beside its weights")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download the head again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not a JSON object: download the head again")
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, on the CPU."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _read_shards(folder, name) if name.endswith(".json") else _read_file(folder / name)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _read_file(others[0])
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
    raise ValueError(f"no weights in {folder}: looked for {', '.join(_WEIGHTS)}, one *.safetensors; found {found}")


def _read_shards(folder: Path, index: str) -> dict[str, torch.Tensor]:
    names = json.loads((folder / index).read_text(encoding="utf-8")).get("weight_map", {})
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
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as plain tensors; damaged, a Git LFS pointer, or a pickle with code? ({error})"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, not a dictionary of tensors")
    return {str(name): tensor for name, tensor in tensors.items()}
