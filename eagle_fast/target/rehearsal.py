"""The same few tokens through a user's model and through the twin of its target, at the start of a text and deep in it.

R rows, H hidden size, T tree nodes, V vocabulary, L tokens of a text.

The twin runs a prompt, a tree of two paths, a compaction and a second tree behind the path that was accepted. The
user's model runs both paths as texts, token by token or in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.transfers import Transfers
from eagle_fast.target.anatomy import decoder_layers, expert_weights
from eagle_fast.target.interface import PrefixCache, cache_argument
from eagle_fast.target.made_up import make_up
from eagle_fast.target.shards import connect
from eagle_fast.target.target import Target
from eagle_fast.target.twin import has_accelerate_hooks, is_compiled, twin

DEEP = 8500
PROMPT, NODES, AFTER = 8, 5, 3  # rows: of the prompt, of the tree, of the second tree behind its accepted path
PARENTS = (-1, 0, 0, 1, 2)
ACCEPTED, OTHER = (0, 1, 3), (0, 2, 4)
DECODED = len(ACCEPTED) + AFTER
PARTS = range(PROMPT), range(PROMPT, PROMPT + NODES), range(PROMPT + NODES, PROMPT + NODES + AFTER)
# where the twin's rows, in their order, are in the texts of the user's model: prompt, a path, what comes after it
TEXT = [0] * PROMPT + [0, 0, 1, 0, 1] + [0] * AFTER
PLACE = [*range(PROMPT), *(PROMPT + depth for depth in (0, 1, 1, 2, 2)), *range(PROMPT + 3, PROMPT + 3 + AFTER)]
MOST_NODES = 63


class Outputs(NamedTuple):
    """What a model computed of R rows."""

    layers: list[Tensor]  # [R, H] each
    logits: Tensor  # [R - PROMPT, V]: those of the nodes
    texts: list[Tensor]  # of a stock model, the layers' rows as its texts have them: [B, L, H] each


class Rehearsal:
    """Runs both. `deep` is the position of the deep pass, before which `make_up` is called.

    num_nodes: of the trees, from NODES to MOST_NODES. model: the user's, or what can run in its place. routed: whether
    its rows are sent to experts.
    """

    def __init__(self, target: Target, num_nodes: int):
        self.target, self.num_nodes = target, min(max(num_nodes, NODES), MOST_NODES)
        self.model = _runnable(target)
        self.routed = any(expert_weights(module) for module in target.stock.modules())
        count = PROMPT + NODES + AFTER
        ids = 5 + torch.arange(count) * 37 % (min(target.vocab_size, 1000) - 5)
        self.prompt, self.nodes, self.after = ids.to(target.device)[None].split([PROMPT, NODES, AFTER], 1)
        self.deep = depth_for(target, DEEP, PROMPT + DECODED + self.num_nodes)
        self.cache = target.new_cache(1, -(-(self.deep + PROMPT + len(ACCEPTED) + self.num_nodes) // 64) * 64)

    def make_up(self) -> None:
        make_up(self.cache.slab, self.deep, self.target.bindings, PROMPT)

    def of_the_model(
        self, model: Any, start: int, token_by_token: bool = False, stock: Outputs | None = None,
        off_by: Callable[[Tensor], Tensor] | None = None,
    ) -> Outputs:  # fmt: skip
        """What a stock model says of the rows behind `start` others, in the twin's order: see `rows_at`.

        stock: what the model itself says, of which each layer's output is the next layer's input where rows are routed
        to experts: else one row sent elsewhere by a rounding would be off in all layers from there on. off_by: what
        hidden states become on their way to the next layer.
        """
        paths = torch.stack([self.nodes[0, list(path)] for path in (ACCEPTED, OTHER)])
        texts = torch.cat([self.prompt.expand(2, -1), paths, self.after.expand(2, -1)], 1)
        texts = texts[: 1 if start else 2].to(self.target.input_device)
        cache = PrefixCache(self.cache.slab, start)
        parts = texts.split([PROMPT, *[1] * DECODED], 1) if token_by_token else [texts]
        layers = decoder_layers(model, self.target.anatomy.num_layers)
        assert layers is not None
        logits = []
        forced = stock if self.routed else None

        def passed_on(layer: int, part: int, hidden: Tensor) -> Tensor:
            hidden = hidden if forced is None else forced.texts[layer]
            return hidden if off_by is None else off_by(hidden)

        with layer_outputs(layers[1], passed_on) as found:
            for part in parts:
                out = model(input_ids=part, use_cache=True, **{cache_argument(model): cache})  # counts positions itself
                logits.append(out.logits)
                cache.length += part.shape[1]
        rows = rows_at(start)
        at = [TEXT[row] for row in rows], [PLACE[row] for row in rows]
        outputs = [torch.cat(each, 1) for each in found]
        return Outputs([each[at] for each in outputs], torch.cat(logits, 1)[at][PROMPT:], outputs)

    def of_the_twin(self, start: int, stock: Outputs) -> Outputs:
        """What the twin says of a prompt behind `start` other rows, and of both trees: verify, compact, verify.

        stock: see `of_the_model`.
        """
        target, cache = self.target, self.cache
        length = torch.tensor([start + PROMPT], device=target.device)

        def force(layer: int, part: int, hidden: Tensor) -> Tensor:
            if not self.routed:
                return hidden
            hidden, first = hidden.clone(), (0, PROMPT, PROMPT + NODES)[part]
            for place, row in enumerate(rows_at(start)):
                if first <= row < first + (PROMPT, NODES, AFTER)[part]:
                    hidden[0, row - first] = stock.layers[layer][place]
            return hidden

        with layer_outputs(target.decoder_layers, force) as found:
            target.choose_frequencies(cache, length)
            target.prefill(self.prompt, start, cache)
            first = target.verify(*self._tree(self.nodes, PARENTS, length), cache)
            path = torch.tensor([ACCEPTED], device=target.device)
            cache.slab.compact(path, torch.full_like(length, len(ACCEPTED)), length, target.transfers)
            target.transfers.forget()
            second = target.verify(*self._tree(self.after, range(-1, AFTER - 1), length + len(ACCEPTED)), cache)
        counts, rows = (PROMPT, NODES, AFTER), rows_at(start)
        layers = [torch.cat([out[0, :n] for out, n in zip(each, counts, strict=True)])[rows] for each in found]
        logits = torch.cat([first.logits[0, :NODES], second.logits[0, :AFTER]])
        return Outputs(layers, logits[[row - PROMPT for row in rows if row >= PROMPT]], [])

    def _tree(self, tokens: Tensor, parents: Any, lengths: Tensor) -> tuple[Tensor, TreeStep]:
        """(tokens [1, T], step) of a tree whose first nodes are given; the rest are children of the root."""
        parents = [*parents, *[0] * (self.num_nodes - tokens.shape[1])]
        more = tokens[:, :1].expand(-1, self.num_nodes - tokens.shape[1])
        return torch.cat([tokens, more], 1), TreeStep(lengths, *masks_of(parents, lengths.device))


def masks_of(parents: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ancestors [1, T, 1], depths [1, T]) of a tree of up to MOST_NODES; -1 is the root's parent."""
    seen: list[int] = []
    for node, parent in enumerate(parents):
        seen.append(1 << node | (seen[parent] if node else 0))
    depths = torch.tensor([[bits.bit_count() - 1 for bits in seen]], device=device)
    return torch.tensor(seen, device=device).view(1, -1, 1), depths


def depth_for(target: Target, most: int, room: int, sequences: int = 1) -> int:
    """A position up to `most`, as deep as learned positions, with `room` rows behind it, and a quarter of the memory
    left for the rows of so many sequences allow."""
    depth = most if target.max_positions is None else min(most, target.max_positions - room)
    for device in {shape.device for shape in target.layer_shapes}:
        if device.type == "cuda":
            row = sum(shape.token_bytes for shape in target.layer_shapes if shape.device == device)
            depth = min(depth, torch.cuda.mem_get_info(device)[0] // 4 // (row * sequences))
    return max(depth, PROMPT)


def rows_at(start: int) -> list[int]:
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


@contextmanager
def layer_outputs(
    layers: nn.ModuleList, passed_on: Callable[[int, int, Tensor], Tensor] = lambda layer, forward, hidden: hidden
) -> Iterator[list[list[Tensor]]]:
    """In this block, the hidden states that each layer returns are kept, one for each forward.

    passed_on: of a layer's index, the forward's and these hidden states, what goes on to the next layer.
    """
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int):
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            found[index].append(hidden)
            following = passed_on(index, len(found[index]) - 1, hidden)
            if following is hidden:
                return None
            following = following.to(hidden.dtype)
            return (following, *out[1:]) if isinstance(out, tuple) else following

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
