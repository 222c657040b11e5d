"""Before a target is trusted: what its twin computes is held against what the user's model computes.

R rows, H hidden size, T tree nodes, V vocabulary.

The same few tokens run through both, as a prompt, a tree, a compaction and a second tree. The user's model, with its
own attention, its hooks and whatever else it has, decodes both paths of the tree token by token. The outputs of every
layer are compared, and the logits. This is done twice: at the start of a text, and at its position DEEP, where windows,
chunks, temperatures and rotary settings bite. Nobody computes the rows in front: they are made up, and the same for
both.

How far two results may be apart is measured: the rows run through the user's model once more in a wider precision, and
the twin may be twice as far from that as the user's model is. Hooks and forwards that were put on the model are held
against themselves in that precision, token by token and all rows at once: there, no rounding hides what they look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.transfers import Transfers
from eagle_fast.messages import warn_user
from eagle_fast.target.anatomy import UnsupportedModel, decoder_layers, expert_weights
from eagle_fast.target.fused import FusedLayer
from eagle_fast.target.interface import PrefixCache, cache_argument
from eagle_fast.target.made_up import make_up
from eagle_fast.target.reference import in_precision
from eagle_fast.target.shards import connect
from eagle_fast.target.target import Target
from eagle_fast.target.twin import evaluating, has_accelerate_hooks, is_compiled, twin

DEEP = 8500
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-14}  # of a row's length, at least
WITHOUT_WIDER = 16  # roundings by which results may be apart where no wider precision can be computed
PROMPT, NODES, AFTER = 8, 5, 2  # rows: of the prompt, of the tree, of the second tree behind its accepted path
PARENTS = (-1, 0, 0, 1, 2)
ACCEPTED, OTHER = (0, 1, 3), (0, 2, 4)
DECODED = len(ACCEPTED) + AFTER
# where the twin's rows, in their order, are in the texts of the user's model: prompt, a path, what comes after it
TEXT = [0] * PROMPT + [0, 0, 1, 0, 1] + [0] * AFTER
PLACE = [*range(PROMPT), *(PROMPT + depth for depth in (0, 1, 1, 2, 2)), *range(PROMPT + 3, PROMPT + 3 + AFTER)]
MOST_NODES = 63


def checked_target(
    model: PreTrainedModel, feature_layers: tuple[int, ...], draft_device: torch.device, num_nodes: int
) -> Target:
    """A `Target` that passed `check_target`, in eval mode whatever the mode of the model.

    Its layers are fused, or all stock where only stock code computes what the model does.
    """
    for fuse in (True, False):
        target = Target(model, feature_layers, draft_device, fuse=fuse)
        target.model.eval()
        try:
            check_target(target, num_nodes)
        except UnsupportedModel as error:
            if not any(isinstance(layer, FusedLayer) for layer in target.decoder_layers):
                raise
            reason = str(error)
        else:
            break
    if not fuse:
        warn_user(f"layers are not fused, which is slower: {reason}")
    return target


def check_target(target: Target, num_nodes: int = NODES) -> None:
    """Raises UnsupportedModel, which names the module, where the twin of a target computes something else than the
    user's model does. num_nodes: how many each tree has; more than NODES change no result.

    Offloaded models are not checked, whose every forward takes seconds.
    """
    if not target.offloaded:
        with torch.no_grad(), target.turn(), evaluating(target.stock):
            _Check(target, min(max(num_nodes, NODES), MOST_NODES)).run()


class Outputs(NamedTuple):
    """What a model computed of R rows."""

    layers: list[Tensor]  # [R, H] each
    logits: Tensor  # [R - PROMPT, V]: those of the nodes


class _Check:
    def __init__(self, target: Target, num_nodes: int):
        self.target, self.num_nodes = target, num_nodes
        self.model = _runnable(target)
        found = decoder_layers(target.stock, target.anatomy.num_layers)
        assert found is not None, "a target was made of it"
        self.names = [f"{found[0]}.{index} ({type(layer).__name__})" for index, layer in enumerate(found[1])]
        self.names.append("what follows the layers")
        self.routed = any(expert_weights(module) for module in target.stock.modules())
        count = PROMPT + NODES + AFTER
        ids = 5 + torch.arange(count) * 37 % (min(target.vocab_size, 1000) - 5)
        self.prompt, self.nodes, self.after = ids.to(target.device)[None].split([PROMPT, NODES, AFTER], 1)
        self.deep = self._depth()
        self.cache = target.new_cache(1, -(-(self.deep + PROMPT + len(ACCEPTED) + num_nodes) // 64) * 64)

    def run(self) -> None:
        """Both passes."""
        if self.target.touched:
            self._check_rows()
        stock = self._of_the_model(self.model, 0, token_by_token=True)
        self._compare(self._of_the_twin(0), stock, 0)
        self._make_up()
        stock = self._of_the_model(self.model, self.deep)
        self._compare(self._of_the_twin(self.deep), stock, self.deep)

    # -- what is computed ------------------------------------------------------------------------------------------

    def _of_the_model(self, model: Any, start: int, token_by_token: bool = False) -> Outputs:
        """What a stock model says of the rows behind `start` others, in the twin's order: see `_rows`."""
        paths = torch.stack([self.nodes[0, list(path)] for path in (ACCEPTED, OTHER)])
        texts = torch.cat([self.prompt.expand(2, -1), paths, self.after.expand(2, -1)], 1)
        texts = texts[: 1 if start else 2].to(self.target.input_device)
        cache = PrefixCache(self.cache.slab, start)
        parts = texts.split([PROMPT, *[1] * DECODED], 1) if token_by_token else [texts]
        layers = decoder_layers(model, self.target.anatomy.num_layers)
        assert layers is not None
        logits = []
        with _outputs(layers[1]) as found:
            for part in parts:
                positions = torch.arange(cache.length, cache.length + part.shape[1], device=part.device)
                positions = positions.expand(len(texts), -1)
                out = model(input_ids=part, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
                logits.append(out.logits)
                cache.length += part.shape[1]
        rows = _rows(start)
        at = [TEXT[row] for row in rows], [PLACE[row] for row in rows]
        return Outputs([torch.cat(each, 1)[at] for each in found], torch.cat(logits, 1)[at][PROMPT:])

    def _of_the_twin(self, start: int) -> Outputs:
        """What the twin says of a prompt behind `start` other rows, and of both trees: verify, compact, verify."""
        target, cache = self.target, self.cache
        length = torch.tensor([start + PROMPT], device=target.device)
        with _outputs(target.decoder_layers) as found:
            target.choose_frequencies(cache, length)
            target.prefill(self.prompt, start, cache)
            first = target.verify(*self._tree(self.nodes, PARENTS, length), cache)
            path = torch.tensor([ACCEPTED], device=target.device)
            cache.slab.compact(path, torch.full_like(length, len(ACCEPTED)), length, target.transfers)
            target.transfers.forget()
            second = target.verify(*self._tree(self.after, range(-1, AFTER - 1), length + len(ACCEPTED)), cache)
        counts, rows = (PROMPT, NODES, AFTER), _rows(start)
        layers = [torch.cat([out[0, :n] for out, n in zip(each, counts, strict=True)])[rows] for each in found]
        logits = torch.cat([first.logits[0, :NODES], second.logits[0, :AFTER]])
        return Outputs(layers, logits[[row - PROMPT for row in rows if row >= PROMPT]])

    def _tree(self, tokens: Tensor, parents: Any, lengths: Tensor) -> tuple[Tensor, TreeStep]:
        """(tokens [1, T], step) of a tree whose first nodes are given; the rest are children of the root."""
        parents = [*parents, *[0] * (self.num_nodes - tokens.shape[1])]
        seen: list[int] = []
        for node, parent in enumerate(parents):
            seen.append(1 << node | (seen[parent] if node else 0))
        depths = torch.tensor([[bits.bit_count() - 1 for bits in seen]], device=lengths.device)
        more = tokens[:, :1].expand(-1, self.num_nodes - tokens.shape[1])
        ancestors = torch.tensor(seen, device=lengths.device).view(1, -1, 1)
        return torch.cat([tokens, more], 1), TreeStep(lengths, ancestors, depths)

    def _make_up(self) -> None:
        bindings = self.target.bindings
        make_up(self.cache.slab, self.deep, [b.window for b in bindings], [b.chunk for b in bindings], PROMPT)

    def _depth(self) -> int:
        """Position of the deep pass: DEEP, or what learned positions and a quarter of the memory left allow."""
        target, room = self.target, PROMPT + DECODED + self.num_nodes
        depth = DEEP if target.max_positions is None else min(DEEP, target.max_positions - room)
        for device in {shape.device for shape in target.layer_shapes}:
            if device.type == "cuda":
                row = sum(shape.token_bytes for shape in target.layer_shapes if shape.device == device)
                depth = min(depth, torch.cuda.mem_get_info(device)[0] // 4 // row)
        return max(depth, PROMPT)

    # -- how far apart ---------------------------------------------------------------------------------------------

    def _compare(self, twin: Outputs, stock: Outputs, start: int) -> None:
        """UnsupportedModel where the twin is off by more than a rounding and by more than the model's own error."""
        found = self._distances(twin, stock)
        rounding = self._rounding(stock)
        if any(self._typical(rows) > rounding for rows in found):
            for name, rows, own in zip(self.names, found, self._own_errors(start, rounding), strict=True):
                # twice as far from the wider precision as the model itself: three times that from the model
                bound = rounding + 3 * own
                if self._typical(rows) > bound:
                    raise UnsupportedModel(_message(name, rows, bound, start))

    def _rounding(self, stock: Outputs) -> float:
        dtype = stock.layers[0].dtype
        tf32 = stock.logits.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return ROUNDING[torch.float16 if tf32 and dtype == torch.float32 else dtype]

    def _own_errors(self, start: int, rounding: float) -> list[float]:
        """How far the model's results, of each layer and then the logits, are from those of a wider precision."""
        stock = self._of_the_model(self.model, start)
        try:
            wide = self._of_the_model(in_precision(self.model, WIDER[stock.layers[0].dtype]), start)
        except (RuntimeError, TypeError, ValueError):  # packed weights, or no memory for it
            return [rounding * WITHOUT_WIDER / 3] * len(self.names)
        return [self._typical(rows) for rows in self._distances(stock, wide)]

    def _check_rows(self) -> None:
        """UnsupportedModel where the user's own hooks and forwards make something else of rows that come together."""
        wide = in_precision(self.model, WIDER.get(self.target.dtype, torch.float64))
        try:
            alone, together = (self._of_the_model(wide, 0, token_by_token=each) for each in (True, False))
        except (RuntimeError, TypeError, ValueError):
            return  # what they do in the model's own precision was compared
        for name, rows in zip(self.names, self._distances(together, alone), strict=True):
            if self._typical(rows) > ROUNDING[torch.float32]:
                raise UnsupportedModel(_message(name, rows, ROUNDING[torch.float32], 0))

    def _distances(self, ours: Outputs, theirs: Outputs) -> list[list[float]]:
        """Of each layer's rows and of the logits', relative to their length; nothing of rows that overflow."""
        pairs = [*zip(ours.layers, theirs.layers, strict=True)]
        pairs.append((ours.logits, theirs.logits))
        return [distance.tolist() for distance in [_distance(*pair) for pair in pairs]]

    def _typical(self, distances: list[float]) -> float:
        """The largest; where rows are routed to experts the median, as a rounding may send a row elsewhere."""
        return sorted(distances)[len(distances) // 2] if self.routed else max(distances)


def _rows(start: int) -> list[int]:
    """Those of the twin's rows that are compared: all at the start of a text, else the accepted path's."""
    return [row for row, text in enumerate(TEXT) if not (start and text)]


def _runnable(target: Target) -> PreTrainedModel:
    """The user's model itself, if it can run as it is: not one to be compiled first, nor one over several devices whose
    inputs nobody moves."""
    model = target.stock
    if is_compiled(model):
        return twin(model)
    if len(target.devices) > 1 and not has_accelerate_hooks(model):
        model = twin(model)
        connect(model, Transfers(), target.devices)
    return model


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.double()
    apart = (ours.to(theirs.device).double() - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=float("inf")).where(theirs.isfinite().all(-1), 0.0)


def _message(name: str, rows: list[float], bound: float, start: int) -> str:
    worst = max(range(len(rows)), key=rows.__getitem__) - len(rows)
    row = _rows(start)[worst]
    part = "a prompt" if row < PROMPT else "a tree" if row < PROMPT + NODES else "a tree after a compaction"
    return (
        f"{name} computes something else in {part} at position {start + PLACE[row]} than in the model itself: its "
        f"output is off by {rows[worst]:.2g} of its length, rounding explains {bound:.2g}. What a row becomes must "
        "depend on its own text and position alone: is there a hook, a forward or an attention function that looks "
        "at the number of rows, at the last one, or at earlier calls?"
    )


@contextmanager
def _outputs(layers: nn.ModuleList) -> Iterator[list[list[Tensor]]]:
    """In this block, the hidden states that each layer returns are kept."""
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(index):
        return lambda module, args, out: found[index].append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
