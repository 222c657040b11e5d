"""What `tensor_parallel` would give: every layer over the two GPUs with the most room.

round >= most over GPUs of (its weights + its keys and values) / read bandwidth
       + 2 sums a layer, of fp32 rows pushed over the link
       + passes * head / read bandwidth of the first GPU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

from transformers import PreTrainedModel

from eagle_fast.doctor.environment import Gpu
from eagle_fast.doctor.measure import GpuFigures, Link
from eagle_fast.doctor.plan import HeadBytes, Plan, Sizes, read_rate
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.devices import MOST_RANKS
from eagle_fast.target.ranks import cut_bytes, cuts_for

NAME = f"tensor_parallel={MOST_RANKS}"
WIDE = 4  # bytes of a number that is pushed


def rank_plan(
    model: PreTrainedModel,
    size: Sizes,
    gpus: Sequence[Gpu],
    figures: Mapping[int, GpuFigures],
    links: Mapping[tuple[int, int], Link],
    head: HeadBytes,
    num_nodes: int,
) -> Plan | None:
    """None where there are fewer GPUs. num_nodes: of a tree."""
    if len(gpus) < MOST_RANKS:
        return None
    chosen = sorted(gpu.index for gpu in sorted(gpus, key=lambda gpu: -gpu.free_bytes)[:MOST_RANKS])
    try:
        whole, cuts = cut_bytes(model, cuts_for(model, 1))[0], cuts_for(model, MOST_RANKS)
    except ValueError as error:
        return Plan(NAME, problem=str(error))
    pairs = list(permutations(chosen, 2))
    apart = [pair for pair in pairs if pair in links and not links[pair].peer]
    if apart:
        return Plan(NAME, problem=f"cuda:{apart[0][0]} and cuda:{apart[0][1]} cannot reach each other's memory")
    devices, anatomy = [f"cuda:{index}" for index in chosen], Anatomy(model)
    everywhere = sum(size.weights.values()) - whole  # norms
    weights = [each + everywhere for each in cut_bytes(model, cuts)]
    cached = sum(size.cache.values())
    cache = [cached * len(share.kv) // anatomy.num_kv_heads for share in cuts.heads]
    given = Plan(
        NAME, tuple(devices), dict(zip(devices, weights, strict=True)), dict(zip(devices, cache, strict=True)),
        {devices[0]: head.resident} if head.resident else {}, dict.fromkeys(devices, anatomy.num_layers),
        sums=2 * anatomy.num_layers,
    )  # fmt: skip
    looked_up = 0 if size.unread is None else size.weights[size.unread]
    try:
        times = [
            (weight - looked_up + rows) / read_rate(device, figures)
            for device, weight, rows in zip(devices, weights, cache, strict=True)
        ]
        pushed = num_nodes * size.hidden_size * WIDE / min(_rate(*pair, links) for pair in pairs)
        drafted = head.read / read_rate(devices[0], figures)
    except LookupError as error:
        return replace(given, problem=f"no time: {error.args[0]}")
    return replace(given, verify_seconds=max(times), copy_seconds=given.sums * pushed, draft_seconds=drafted)


def _rate(source: int, target: int, links: Mapping[tuple[int, int], Link]) -> float:
    """Bytes a second."""
    found = links.get((source, target))
    if found is None or found.rate is None:
        raise LookupError(f"no copy from cuda:{source} to cuda:{target} was measured")
    return found.rate
