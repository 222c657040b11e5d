"""What tensor_parallel would give: every layer cut over several GPUs, which read their parts at the same time.

round >= the slowest rank's weights, keys and values / read bandwidth
       + two exchanges of the rows a layer, in float32, at the bandwidth between the GPUs
       + passes * head / read bandwidth, on the first of them, or of its parts on all where cutting it pays
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from eagle_fast.doctor.measure import GpuFigures, Link
from eagle_fast.doctor.plan import HeadBytes, Plan, Setting, Sizes, device_name, rate_of, read_packing
from eagle_fast.head.cut import pays
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.target.ends import are_tied, ends
from eagle_fast.target.formats.arriving import make_room
from eagle_fast.target.placement import skeleton
from eagle_fast.target.ranks import cut_bytes, cuts_for, stored_bytes

WIDE = 4  # bytes of a number that is exchanged


def model_to_cut(setting: Setting) -> PreTrainedModel:
    """On the meta device, with room for weights that are packed. Raises ValueError."""
    config, packing, reason = read_packing(setting)
    beside = sorted(setting.some(("device_map", "draft_device")))
    if beside:
        raise ValueError(f"tensor_parallel does not go with {', '.join(beside)} yet")
    if packing is None and Anatomy(config).is_quantized:
        raise ValueError(f"its weights are packed, and {reason}")
    model = skeleton(config, trust_remote_code=setting.trusted)
    if packing is not None:
        make_room(model, packing.format, packing.asked.lm_head_bits)
    return model


def plan_ranks(
    ranks: int | Sequence[str],
    model: PreTrainedModel,
    rows: int,
    size: Sizes,
    figures: Mapping[int, GpuFigures],
    links: Mapping[tuple[int, int], Link],
    head: HeadBytes,
) -> Plan:
    """Of a number of GPUs, or of these. model: as `model_to_cut` gives it; rows: of a round, that are exchanged."""
    places = [device_name(each) for each in (range(ranks) if isinstance(ranks, int) else ranks)]
    called = f"tensor_parallel={len(places)}"
    try:
        cuts = cuts_for(model, len(places))
    except ValueError as error:
        return Plan(called, problem=str(error))
    anatomy, whole = Anatomy(model), sum(size.cache.values())
    weights = dict(zip(places, cut_bytes(model, cuts), strict=True))
    cache = {
        place: whole * len(share.kv) // anatomy.num_kv_heads for place, share in zip(places, cuts.heads, strict=True)
    }
    parts = len(places) if pays(head.each, head.layers, len(places)) else 1
    heads = {places[0]: head.resident} if head.resident else {}
    if parts > 1:  # beside the whole one
        heads = {place: heads.get(place, 0) + head.resident // parts for place in places}
    given = Plan(called, (), weights, cache, heads, dict.fromkeys(places, anatomy.num_layers))
    embedding, lm_head = ends(model)
    table = stored_bytes(embedding)
    read = dict.fromkeys(places, -table)  # a few rows of the embedding are read, and where it is tied a part as lm_head
    for place, share in zip(places, cuts.vocabulary, strict=True):
        part = table * len(share) // lm_head.out_features if are_tied(embedding, lm_head) else 0
        read[place] += weights[place] + cache[place] + part
    exchanged = 2 * anatomy.num_layers * rows * size.hidden_size * WIDE
    pairs = [(a, b) for a in places for b in places if a != b]
    apart = [pair for pair in pairs if (found := _link(*pair, links)) is not None and not found.peer]
    if apart:
        return replace(given, problem=f"{' and '.join(apart[0])} cannot reach each other's memory")
    try:
        return replace(
            given,
            verify_seconds=max(count / rate_of(place, figures) for place, count in read.items()),
            copy_seconds=exchanged / min(_link_rate(*pair, links) for pair in pairs),
            draft_seconds=max(
                (head.read / parts / rate_of(place, figures) for place in places[:parts] if head.read), default=0.0
            ),
        )
    except LookupError as error:
        return replace(given, problem=f"no time: {error.args[0]}")


def _link(source: str, target: str, links: Mapping[tuple[int, int], Link]) -> Link | None:
    return links.get((int(source.partition(":")[2] or 0), int(target.partition(":")[2] or 0)))


def _link_rate(source: str, target: str, links: Mapping[tuple[int, int], Link]) -> float:
    """Bytes a second from one GPU to another."""
    found = _link(source, target, links)
    if found is None or found.rate is None:
        raise LookupError(f"no copy from {source} to {target} was measured")
    return found.rate
