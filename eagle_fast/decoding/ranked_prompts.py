"""Prompts over ranks as CUDA graphs: launched one by one, their layers take the host longer than they take the GPUs.

C tokens of a prompt, W of a graph, F feature width.

There is a graph for each of a few widths. A prompt is run as the next wider one, whatever follows it in there: its own
rows see nothing of that. So are the first prompts of a width, which are run without a graph: the bits of a prompt's
rows depend on its length alone. A graph fills a cache of its own, from which the rows are copied to where they belong,
so it serves every sequence of every state.

Longer prompts keep the GPUs about as busy as the host, and what follows rows of an earlier call stands somewhere else
every time: both are run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle_fast.decoding.graph import GraphPools, SideStreams
from eagle_fast.decoding.rank_graphs import RankGraphs

NARROWEST, WIDEST = 64, 2048  # W


class RankedPrompts:
    """Runs prompts through a target over ranks. Their graphs share memory: one runs at a time."""

    def __init__(self, target: Any, streams: SideStreams):
        self.target, self.streams, self.pools = target, streams, GraphPools()
        self.of_widths: dict[int, WidePrompt] = {}

    def __call__(self, tokens: Tensor, start: int, cache: Any) -> Sequence[Tensor]:
        """`RankedTarget.prefill_everywhere` of one sequence: tokens [1, C]; the features [1, C, F] stay until the
        next."""
        count = tokens.shape[1]
        if start or count > WIDEST:
            return self.target.prefill_everywhere(tokens, start, cache)
        return self.of(count)(tokens, cache)

    def of(self, count: int) -> WidePrompt:
        """What runs prompts of so many tokens."""
        width = max(1 << (count - 1).bit_length(), NARROWEST)
        if width not in self.of_widths:
            self.of_widths[width] = WidePrompt(self.target, width, self.streams, self.pools)
        return self.of_widths[width]

    def close(self) -> None:
        """Let go of the graphs and all memory: a prompt under way has to end first."""
        for each in self.of_widths.values():
            each.graphs.close()
        self.of_widths, self.pools = {}, GraphPools()


class WidePrompt:
    """Prompts of up to `width` tokens."""

    def __init__(self, target: Any, width: int, streams: SideStreams, pools: GraphPools):
        self.target, self.cache = target, target.new_cache(1, width)
        self.tokens = torch.zeros(1, width, dtype=torch.long, device=target.device)
        self.features: Sequence[Tensor] = ()
        self.graphs = RankGraphs(self._run, target.links, target.devices, streams, pools, what="prompts")

    def __call__(self, tokens: Tensor, cache: Any) -> Sequence[Tensor]:
        """See `RankedPrompts`."""
        count = tokens.shape[1]
        self.tokens[:, :count].copy_(tokens)
        self.graphs()
        cache.slab.copy_prefix(self.cache.slab, count)
        return [each[:, :count] for each in self.features]

    def _run(self) -> None:
        self.features = self.target.prefill_everywhere(self.tokens, 0, self.cache)
