"""Where a model would go, what it takes there, and how long a round would take at least.

    round >= sum over shards of (weights + keys and values) / read bandwidth    verification reads each once
           + passes * head / read bandwidth                                    drafting, if a head is named
           + copies of the hidden rows, one for each change of device on the way from the embedding to the lm_head

Bandwidths and copies are the measured ones; where one is missing there is no time. Weights on the CPU are read over the
host link in every round. Experts of a mixture are all counted: the rows of a tree meet most of them. Shapes come from
config.json alone, on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from eagle_fast.config import TreeConfig
from eagle_fast.doctor.measure import GpuFigures, Link
from eagle_fast.head import HeadCheckpoint, read_head
from eagle_fast.loading import CONFIG_OPTIONS, HEAD_OPTIONS, HUB_OPTIONS, known_path, modern_options
from eagle_fast.loading_packed import packing_of
from eagle_fast.loading_target import read_config
from eagle_fast.target.anatomy import Anatomy, decoder_layers
from eagle_fast.target.ends import are_tied, ends
from eagle_fast.target.formats.arriving import num_parameters
from eagle_fast.target.packing import Bits, Packing
from eagle_fast.target.placement import place_of, plan_placement, skeleton


@dataclass(frozen=True)
class Setting:
    """What is to be placed. context: tokens in the cache; head: a head's folder or hub name, if there is one;
    batches: numbers of sequences whose rounds are to be timed; options: all else that from_pretrained would be told."""

    model: str
    dtype: torch.dtype | None = None
    context: int = 2048
    tree: TreeConfig = field(default_factory=TreeConfig)
    head: str | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    batches: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def some(self, names: Collection[str]) -> dict[str, Any]:
        """Of the options, those of these names that were given."""
        return {name: self.options[name] for name in names if name in self.options}

    @property
    def trusted(self) -> bool:
        return bool(self.options.get("trust_remote_code"))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, by the module that a device_map may name, in the order of a forward."""

    parameters: int
    dtype: torch.dtype
    hidden_size: int
    path: tuple[str, ...]  # embedding, decoder layers, lm_head
    weights: dict[str, int]  # every parameter's bytes, tied ones once
    cache: dict[str, int]  # a layer's keys and values
    unread: str | None  # the parameter of which a forward reads a few rows: an embedding that is no lm_head

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """What one strategy gives; the head lies beside the lm_head.

    Bytes by device ("cuda:0", "cpu", "disk"); seconds None: see problem.
    """

    strategy: str
    devices: tuple[str, ...] = ()  # along the way from the embedding to the lm_head, repeats left out
    weights: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    head: dict[str, int] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)  # number of decoder layers
    verify_seconds: float | None = None
    copy_seconds: float | None = None
    draft_seconds: float | None = None
    problem: str = ""

    @property
    def crossings(self) -> int:
        return max(len(self.devices) - 1, 0)

    @property
    def round_seconds(self) -> float | None:
        """Their sum; without a head's name, that of verifying alone."""
        if self.verify_seconds is None or self.copy_seconds is None or self.draft_seconds is None:
            return None
        return self.verify_seconds + self.copy_seconds + self.draft_seconds


class Shape(NamedTuple):
    """model: without its weights, on the meta device. packed: the format of those that are read packed; unpacked: why a
    quantized model has no packed sizes."""

    model: PreTrainedModel
    packed: str = ""
    unpacked: str = ""


def read_model(setting: Setting) -> Shape:
    """Of a hub name, or of a folder with a config.json. Raises ValueError."""
    config, packing, reason = read_packing(setting)
    if packing is not None:
        return Shape(packing.model, packing.name)
    return Shape(skeleton(config, trust_remote_code=setting.trusted), unpacked=reason)


def read_packing(setting: Setting) -> tuple[PreTrainedConfig, Packing | None, str]:
    """(the config; how weights are packed here, if they are; why they are not, where the file's are). Raises
    ValueError."""
    path, options = known_path("--model", setting.model), modern_options(dict(setting.options))
    config = read_config(path, setting.some(CONFIG_OPTIONS), "--model")
    assert config is not None, "no gguf_file is among the options"
    config.dtype = setting.dtype or config.dtype or torch.bfloat16
    bits = Bits(options.get("target_bits"), options.get("lm_head_bits"))
    return config, *packing_of(config, path, options, bits, f"--model {path!r}", None)


def sizes(model: PreTrainedModel, context: int) -> Sizes:
    """Sizes of a model, which may be on the meta device, and of the keys and values of `context` tokens."""
    anatomy = Anatomy(model)
    found = decoder_layers(model, anatomy.num_layers)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers: eagle_fast does not support it")
    layers = [f"{found[0]}.{index}" for index in range(anatomy.num_layers)]
    embedding, lm_head = ends(model)
    name_of = {module: name for name, module in model.named_modules()}
    table = f"{name_of[embedding]}.{'words' if hasattr(embedding, 'words') else 'weight'}"
    return Sizes(
        parameters=num_parameters(model),
        dtype=model.dtype,
        hidden_size=anatomy.hidden_size,
        path=(name_of[embedding], *layers, name_of[lm_head]),
        weights={name: weight.numel() * weight.element_size() for name, weight in model.named_parameters()},
        cache=dict.fromkeys(layers, anatomy.kv_bytes(model.dtype) * context),
        unread=None if are_tied(embedding, lm_head) else table,
    )


class HeadBytes(NamedTuple):
    """Of a draft head in the target's dtype: what lies in memory, what a round reads of it, and what a pass, over so
    many layers."""

    resident: int = 0
    read: int = 0
    each: int = 0
    layers: int = 0


def found_head(setting: Setting, model: PreTrainedModel) -> HeadCheckpoint | None:
    """The head that was named. Raises ValueError for one that cannot be read, or is for another model."""
    if setting.head is None:
        return None
    anatomy = Anatomy(model)
    return read_head(
        setting.head,
        target_hidden_size=anatomy.hidden_size,
        target_vocab_size=anatomy.vocab_size,
        num_target_layers=anatomy.num_layers,
        revision=setting.options.get("ea_revision"),
        **setting.some((*HEAD_OPTIONS, *HUB_OPTIONS)),
    )


def head_bytes(setting: Setting, model: PreTrainedModel, found: HeadCheckpoint | None) -> HeadBytes:
    """A round reads an absorb and one pass a level, each with its lm_head; fc in the absorb alone."""
    if found is None:
        return HeadBytes()
    numbers = {name: tensor.numel() for name, tensor in found.tensors.items()}
    once = sum(count for name, count in numbers.items() if name.startswith("fc."))
    each = sum(numbers.values()) - once - numbers.get("embed_tokens.weight", 0)
    if not found.config.own_lm_head:
        each += Anatomy(model).hidden_size * found.config.draft_vocab_size
    item, passes = model.dtype.itemsize, setting.tree.depth + 1
    return HeadBytes(
        sum(numbers.values()) * item, (each * passes + once) * item, each * item, found.config.num_layers
    )  # fmt: skip


def plan(
    strategy: Any,
    model: PreTrainedModel,
    max_memory: Mapping[int | str, int | str] | None,
    size: Sizes,
    figures: Mapping[int, GpuFigures],
    links: Mapping[tuple[int, int], Link],
    head: HeadBytes = HeadBytes(),  # noqa: B008  # immutable
    home: str | None = None,
) -> Plan:
    """One placement with its memory and, from figures and links, its times.

    strategy: or any other device_map. home: the head's device; None: that of the lm_head.
    """
    called = strategy if isinstance(strategy, str) else "as given"
    try:
        placed = plan_placement(model, strategy, None if max_memory is None else dict(max_memory))
    except ValueError as error:  # no GPU, or none that is large enough
        return Plan(called, problem=str(error))
    device_map = {name: device_name(device) for name, device in placed.items()}
    on_the_way = [place_of(device_map, name) for name in size.path]
    first, *of_layers, last = on_the_way
    devices = (first, *(after for before, after in pairwise(on_the_way) if after != before))
    home = last if home is None else home
    given = Plan(
        called, devices, _by_device(size.weights, device_map), _by_device(size.cache, device_map),
        {home: head.resident} if head.resident else {},
        {device: of_layers.count(device) for device in dict.fromkeys(of_layers)},
    )  # fmt: skip
    read = _by_device({name: count for name, count in size.weights.items() if name != size.unread}, device_map)
    cached = [(device, count) for device, count in given.cache.items() if device.startswith("cuda")]
    try:
        return replace(
            given,
            verify_seconds=sum(count / rate_of(device, figures) for device, count in [*read.items(), *cached]),
            copy_seconds=sum(_copy_seconds(before, after, links) for before, after in pairwise(devices)),
            draft_seconds=head.read / rate_of(home, figures) if head.read else 0.0,
        )
    except LookupError as error:
        return replace(given, problem=f"no time: {error.args[0]}")


def device_name(device: torch.device | int | str) -> str:
    """'cuda:0', 'cpu' or 'disk', however a device_map spells it."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return "disk" if device == "disk" else str(torch.device(device))


def _by_device(counts: Mapping[str, int], device_map: Mapping[str, str]) -> dict[str, int]:
    total: dict[str, int] = {}
    for name, count in counts.items():
        device = place_of(device_map, name)
        total[device] = total.get(device, 0) + count
    return total


def rate_of(device: str, figures: Mapping[int, GpuFigures]) -> float:
    """Bytes a second at which a round reads what lies on a device."""
    if device == "disk":
        raise LookupError("the disk's speed is not measured")
    if device == "cpu":
        rates = [each.from_host for each in figures.values() if each.from_host]
        if not rates:
            raise LookupError("no copy from the host was measured")
        return min(rates)
    found = figures.get(int(device.partition(":")[2] or 0))
    if found is None or found.read is None:
        raise LookupError(f"{device} was not measured" + (f" ({found.problem})" if found and found.problem else ""))
    return found.read


def _copy_seconds(source: str, target: str, links: Mapping[tuple[int, int], Link]) -> float:
    """A copy of the hidden rows. To and from the CPU it is left out: the weights that move there dwarf it."""
    if not (source.startswith("cuda") and target.startswith("cuda")):
        return 0.0
    found = links.get((int(source[5:]), int(target[5:])))
    if found is None or found.small_seconds is None:
        raise LookupError(f"no copy from {source} to {target} was measured")
    return found.small_seconds
