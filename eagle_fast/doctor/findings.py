"""Examine a machine, and a model on it: everything that the doctor says, before it is put in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.doctor.environment import Gpu, gpus, link_types, versions, why_no_gpu
from eagle_fast.doctor.measure import SMALL_BYTES, GpuFigures, KernelCheck, Link, gpu_figures, kernel_check, link
from eagle_fast.doctor.plan import (
    HeadBytes,
    Plan,
    Setting,
    Sizes,
    device_name,
    found_head,
    head_bytes,
    plan,
    read_model,
    sizes,
)
from eagle_fast.doctor.plan_ranks import model_to_cut, plan_ranks
from eagle_fast.doctor.trees import Trees, examine_trees
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.devices import MOST_RANKS
from eagle_fast.target.placement import STRATEGIES


@dataclass(frozen=True)
class Machine:
    """What is there. figures and checks by GPU index; without a GPU, why, and how the CPU's path does."""

    versions: dict[str, str | None]
    gpus: list[Gpu] = field(default_factory=list)
    figures: dict[int, GpuFigures] = field(default_factory=dict)
    checks: dict[int, KernelCheck] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    no_gpu: str = ""
    cpu: KernelCheck | None = None

    @property
    def healthy(self) -> bool:
        """Every kernel ran and every copy arrived as it was."""
        checks = [*self.checks.values(), *([self.cpu] if self.cpu else [])]
        return all(check.runs for check in checks) and all(each.intact is not False for each in self.links)


@dataclass(frozen=True)
class Placements:
    """A model's sizes and where each strategy puts it."""

    setting: Setting
    size: Sizes
    head: HeadBytes
    quantized: bool  # the checkpoint is
    plans: list[Plan]
    packed: str = ""  # the format of weights that are read packed
    unpacked: str = ""  # why the sizes of a quantized one are not its packed ones
    trees: Trees | None = None  # of a head that was named


def examine(setting: Setting | None) -> tuple[Machine, Placements | None]:
    """Measure the machine; with a setting, plan its model as well. Raises ValueError for a model that can't be read."""
    if setting is None:
        return examine_machine(SMALL_BYTES), None
    model, packed, unpacked = read_model(setting)
    found = found_head(setting, model)
    size, head = sizes(model, setting.context), head_bytes(setting, model, found)
    machine = examine_machine(setting.tree.total_token * size.row_bytes)
    plans = _plans(setting, model, size, head, machine) if machine.gpus else []
    trees = None if found is None else examine_trees(setting, found.config)
    quantized = Anatomy(model).is_quantized
    return machine, Placements(setting, size, head, quantized, plans, packed, unpacked, trees)


def _plans(setting: Setting, model: PreTrainedModel, size: Sizes, head: HeadBytes, machine: Machine) -> list[Plan]:
    """Of the device_map that was given, or of each strategy; and of the ranks that were, or of two."""
    links = {(each.source, each.target): each for each in machine.links}
    maps, ranks, there = (setting.options.get(name) for name in ("device_map", "tensor_parallel", "draft_device"))
    home = None if there is None else device_name(there)
    found = [
        plan(each, model, setting.max_memory, size, machine.figures, links, head, home)
        for each in (STRATEGIES if maps is None else [maps])
    ]
    if ranks is None and maps is None and setting.max_memory is None and len(machine.gpus) >= MOST_RANKS:
        ranks = MOST_RANKS
    if ranks is True:
        ranks = len(machine.gpus)
    if ranks:
        rows = setting.tree.total_token
        try:
            found.append(plan_ranks(ranks, model_to_cut(setting), rows, size, machine.figures, links, head))
        except ValueError as error:
            found.append(Plan("tensor_parallel", problem=str(error)))
    return found


def examine_machine(small_bytes: int) -> Machine:
    """Everything measured, one GPU after the other. small_bytes: of the copies whose latency is timed."""
    found = gpus()
    if not found:
        return Machine(versions(), no_gpu=why_no_gpu(), cpu=kernel_check(torch.device("cpu")))
    indices = [gpu.index for gpu in found]
    kinds = link_types(found) if len(indices) > 1 else {}
    return Machine(
        versions(),
        found,
        checks={index: kernel_check(torch.device("cuda", index)) for index in indices},
        figures={index: gpu_figures(index) for index in indices},
        links=[link(a, b, kinds.get((a, b)), small_bytes) for a in indices for b in indices if a != b],
    )


def as_json(machine: Machine, placements: Placements | None) -> dict[str, Any]:
    """Plain values: bytes, seconds, bytes per second; None where something was not measured."""
    plain = asdict(machine) | {"healthy": machine.healthy}
    figures, checks = plain.pop("figures"), plain.pop("checks")
    plain["gpus"] = [gpu | figures[gpu["index"]] | {"kernel": checks[gpu["index"]]} for gpu in plain["gpus"]]
    if placements is None:
        return plain
    setting, size = placements.setting, placements.size
    plain["model"] = {
        "name": setting.model,
        "dtype": str(size.dtype).removeprefix("torch."),
        "parameters": size.parameters,
        "weight_bytes": sum(size.weights.values()),
        "cache_bytes": sum(size.cache.values()),
        "head_bytes": placements.head.resident or None,
        "context": setting.context,
        "tree": asdict(setting.tree),
        "quantized": placements.quantized,
        "packed": bool(placements.packed),
        "format": placements.packed or None,
        "plans": [
            asdict(each) | {"crossings": each.crossings, "round_seconds": each.round_seconds}
            for each in placements.plans
        ],
        "trees": placements.trees and placements.trees.as_json(),
    }
    return plain
