"""Versions and GPUs, as the installed software reports them."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata

import torch

PACKAGES = ("eagle-fast", "torch", "triton", "transformers", "accelerate")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees. Bytes as its driver counts them, with this process's own context in use."""

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int
    uuid: str


def versions() -> dict[str, str | None]:
    """Version of everything that matters, None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda, "nccl": _nccl(), "driver": _driver()}


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not hasattr(torch._C, "_nccl_version"):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _driver() -> str | None:
    rows = nvidia_smi("--query-gpu=driver_version")
    return rows[0][0] if rows else None


def gpus() -> list[Gpu]:
    """Every GPU that torch sees; makes a CUDA context on each."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(index, properties.name, capability, total, free, f"GPU-{properties.uuid}"))
    return found


def why_no_gpu() -> str:
    """What keeps torch from seeing a GPU, as far as can be told."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} decides what torch sees"
    if nvidia_smi("--query-gpu=name") is None:
        return "nvidia-smi finds no driver and no GPU"
    return (
        f"nvidia-smi finds a GPU, but torch {torch.__version__} (CUDA {torch.version.cuda}) does not: driver too old?"
    )


def link_types(found: list[Gpu]) -> dict[tuple[int, int], str]:
    """How nvidia-smi says that two GPUs are connected ("NV18", "PIX", "SYS", ...), by torch's indices.

    Empty where nvidia-smi is not there or counts other GPUs.
    """
    rows = nvidia_smi("--query-gpu=index,uuid")
    table = _run(["nvidia-smi", "topo", "-m"])
    if not rows or not table:
        return {}
    matrix = parse_topology(table)
    by_uuid = {uuid: index for index, uuid in rows}
    place = {gpu.index: f"GPU{by_uuid[gpu.uuid]}" for gpu in found if gpu.uuid in by_uuid}
    pairs = ((a, b) for a in place for b in place if a != b)
    return {(a, b): matrix[place[a], place[b]] for a, b in pairs if (place[a], place[b]) in matrix}


def parse_topology(table: str) -> dict[tuple[str, str], str]:
    """The matrix that `nvidia-smi topo -m` prints: ("GPU0", "GPU1") -> "NV18"."""
    lines = [line.replace("\x1b[4m", "").replace("\x1b[0m", "").split() for line in table.splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line), [])
    columns = [name for name in header if name.startswith("GPU") and name[3:].isdigit()]
    rows = [line for line in lines if line[:1] and line[0] in columns and "X" in line]
    return {(row[0], column): link for row in rows for column, link in zip(columns, row[1:], strict=False)}


def nvidia_smi(query: str) -> list[list[str]] | None:
    """The rows of one nvidia-smi query; None where it is not installed or fails."""
    output = _run(["nvidia-smi", query, "--format=csv,noheader"])
    return None if output is None else [[cell.strip() for cell in row] for row in csv.reader(output.splitlines())]


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
