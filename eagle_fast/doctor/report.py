"""The doctor's findings as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eagle_fast.doctor.findings import Machine, Placements
from eagle_fast.doctor.measure import KernelCheck, Link
from eagle_fast.doctor.plan import Plan
from eagle_fast.doctor.trees import Trees

IN_USE = 2 * 2**30  # more than a context of this process takes: somebody else's


def lines(machine: Machine, placements: Placements | None) -> Iterator[str]:
    """All of it."""
    yield from _versions(machine.versions)
    yield ""
    if machine.cpu is not None:
        yield from _cpu(machine.no_gpu, machine.cpu)
    else:
        yield from _gpus(machine)
    if machine.links:
        yield ""
        yield from _links(machine.links)
    if placements is not None:
        yield ""
        yield from _plans(placements, {f"cuda:{gpu.index}": gpu.free_bytes for gpu in machine.gpus})
        if placements.trees is not None:
            yield ""
            yield from _trees(placements.trees)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _versions(versions: dict[str, str | None]) -> Iterator[str]:
    yield ", ".join(
        f"{name} {versions[name] or '(none)'}" for name in versions if name not in ("cuda", "nccl", "driver")
    )
    yield (
        f"driver {versions['driver'] or '(none found)'}, torch's CUDA {versions['cuda'] or '(none)'}, "
        f"NCCL {versions['nccl'] or '(none)'} (not needed: one process drives all GPUs)"
    )


def _cpu(reason: str, check: KernelCheck) -> Iterator[str]:
    yield f"No GPU: {reason}."
    if check.runs:
        yield "On the CPU everything works, in plain PyTorch: decoding, training, `eagle-fast demo`; one operation was"
        yield "tried, and is right. Use device_map=None, 'cpu' or 'auto' and dtype=torch.float32: rounds then have the"
        yield "trees that pay here. Bandwidths, copies and compiled kernels cannot be measured."
    else:
        yield f"The CPU path fails as well: {check.problem}"


def _gpus(machine: Machine) -> Iterator[str]:
    rows = [["GPU", "", "memory", "free", "reads", "from the host", "kernels"]]
    for gpu in machine.gpus:
        measured, check = machine.figures[gpu.index], machine.checks[gpu.index]
        rows.append([
            str(gpu.index), f"{gpu.name} ({gpu.capability})",
            f"{gib(gpu.total_bytes)} GiB", f"{gib(gpu.free_bytes)} GiB",
            f"{measured.read / 1e12:.2f} TB/s" if measured.read else "not measured",
            f"{measured.from_host / 1e9:.1f} GB/s" if measured.from_host else "not measured",
            f"compile and run ({check.seconds:.1f} s)" if check.runs else "FAIL",
        ])  # fmt: skip
    yield from table(rows)
    for gpu in machine.gpus:
        if problem := machine.figures[gpu.index].problem:
            yield f"GPU {gpu.index}: not measured: {problem}"
        if not machine.checks[gpu.index].runs:
            yield f"GPU {gpu.index}: the kernel does not run: {machine.checks[gpu.index].problem}"
        used = gpu.total_bytes - gpu.free_bytes
        if used > IN_USE:
            yield f"GPU {gpu.index}: {gib(used)} GiB are in use, by other programs too: set max_memory by what is free"


def _links(links: Sequence[Link]) -> Iterator[str]:
    size = links[0].small_bytes
    rows = [["from -> to", "link", "peer access", f"{size / 1e6:.2f} MB", "256 MiB"]]
    for link in links:
        rows.append([
            f"{link.source} -> {link.target}", link.kind or "unknown", "yes" if link.peer else "NO",
            f"{link.small_seconds * 1e6:.1f} us" if link.small_seconds else "not measured",
            f"{link.rate / 1e9:.0f} GB/s" if link.rate else "not measured",
        ])  # fmt: skip
    yield from table(rows)
    for link in links:
        if link.problem:
            yield f"{link.source} -> {link.target}: not measured: {link.problem}"
        if link.intact is False:
            yield (
                f"{link.source} -> {link.target}: COPIES ARRIVE CHANGED. Peer access is broken on this machine (an "
                "IOMMU or PCIe access control may be in the way): use one GPU until it is mended"
            )
    if not all(link.peer for link in links):
        yield "Without peer access copies go through the host: right, but slower, as measured above."


def _plans(placements: Placements, free: dict[str, int]) -> Iterator[str]:
    setting, size, head, plans = placements.setting, placements.size, placements.head, placements.plans
    dtype = str(size.dtype).removeprefix("torch.")
    yield (
        f"{setting.model}: {size.parameters / 1e9:.2f} B parameters, {gib(sum(size.weights.values()))} GiB "
        f"{f'packed ({placements.packed}), the rest in {dtype}' if placements.packed else f'in {dtype}'}, "
        f"{len(size.cache)} layers; keys and values of {setting.context} tokens: {gib(sum(size.cache.values()))} GiB; "
        + (f"head: {gib(head.resident)} GiB" if head.resident else "no head named (--head)")
    )
    if placements.unpacked:
        yield f"The checkpoint is quantized; the sizes here are those of {dtype}: {placements.unpacked}."
    if not plans:
        yield "There is no GPU to place it on."
        return
    rows = [["strategy", "GiB of weights + cache and head (layers), by GPU", "crossings", "a round, at least"]]
    for plan in plans:
        rows.append([plan.strategy, _memory(plan) or "-", str(plan.crossings), _time(plan)])
    yield from table(rows)
    yield (
        "A round reads the weights"
        + (", the head's once per level," if head.resident else " (the head's are not counted)")
        + " and the keys and values once, at the"
    )
    yield "measured bandwidth, and copies the hidden rows at each crossing; launches and attention come on top."
    if any(plan.strategy.startswith("tensor_parallel") for plan in plans):
        yield "With tensor_parallel the GPUs read their parts at the same time, and exchange the rows twice a layer."
    yield from _problems(plans, free)


def _trees(trees: Trees) -> Iterator[str]:
    yield "Tokens that a round is worth, by " + (
        "what the head's config.json says of its drafts (acceptance)."
        if trees.measured
        else "what is usual: the head's config.json says nothing of its drafts (acceptance)."
    )
    yield from table(trees.rows())
    if trees.seconds:
        yield "Rounds were timed at a short context; tokens/s are those of the first temperature. * is what pays best."
    else:
        yield "What pays depends on the time that a round takes here: --batch 1 8 loads the pair and times it."


def _problems(plans: Sequence[Plan], free: dict[str, int]) -> Iterator[str]:
    """One line for each problem, with the strategies that have it."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        texts = [plan.problem] if plan.problem else []
        if offloaded := [device for device in ("cpu", "disk") if plan.weights.get(device)]:
            texts.append(f"leaves weights on the {' and the '.join(offloaded)}, to be fetched for every round")
        for device in plan.weights:
            needed = _needed(plan, device)
            if needed > free.get(device, needed):
                texts.append(f"does not fit: {gib(needed)} GiB on {device}, where {gib(free[device])} GiB are free")
        for text in texts:
            found.setdefault(text, []).append(plan.strategy)
    return (f"{', '.join(strategies)}: {text}" for text, strategies in found.items())


def _needed(plan: Plan, device: str) -> int:
    return sum(counts.get(device, 0) for counts in (plan.weights, plan.cache, plan.head))


def _memory(plan: Plan) -> str:
    parts = []
    for device, count in plan.weights.items():
        rest = _needed(plan, device) - count
        parts.append(f"{device.removeprefix('cuda:')}: {gib(count)} + {gib(rest)} ({plan.layers.get(device, 0)})")
    return "   ".join(parts)


def _time(plan: Plan) -> str:
    if plan.round_seconds is None or plan.copy_seconds is None:
        return "not known"
    return f"{plan.round_seconds * 1e3:.2f} ms, of it copies {plan.copy_seconds * 1e3:.3f}"
