"""The rounds of one state as graphs: one for each tree that it has run under, in memory that they share.

Only one of them runs at a time, and what a round leaves lies in the state, so a graph may write over all that another
has computed on the way. A tree costs its graph when it is first used, and nothing before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.cost import Timer
from eagle_fast.decoding.draft import MOST_WAITING
from eagle_fast.decoding.graph import GraphedStep, GraphPools, SideStreams
from eagle_fast.decoding.rank_graphs import RankGraphs
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.tree import Tree

Accept = Callable[[Tree, torch.Tensor], torch.Tensor]


class RoundSteps:
    """Launches rounds of `state`, under any of its trees.

    streams: for steps that are never launched at the same time; by default it has its own.
    """

    def __init__(self, state: Round, streams: SideStreams | None = None):
        self.state, self.streams, self.pools = state, streams or SideStreams(), GraphPools()
        self.of_trees: dict[TreeConfig, GraphedStep] = {}
        self.release: GraphedStep | None = None

    def __call__(
        self, tree: TreeConfig | None = None, timer: Timer | None = None, accept: Accept | None = None
    ) -> None:
        """Launch a round under a tree, by default the state's first.

        timer: told when the round begins and ends. accept: where the host chooses the tokens, see `Round.step`.
        """
        view = self._prepare(tree or self.state.tree)
        if timer is not None:
            timer.start()
        if accept is None:
            self.of(view.tree)()
        else:
            view.step(accept)
        if timer is not None:
            timer.stop()

    def of(self, tree: TreeConfig) -> GraphedStep:
        """The step under a tree."""
        if tree not in self.of_trees:
            self.of_trees[tree] = self._graphed(self.state.under(tree).step)
        return self.of_trees[tree]

    def is_ready(self, tree: TreeConfig) -> bool:
        """Whether a round under this tree takes the time that it will always take: its graph was captured, or there is
        none to capture."""
        step = self.of(tree)
        return step.eager or step.graph is not None

    @property
    def graphs(self) -> list[torch.cuda.CUDAGraph]:
        """What was captured."""
        return [step.graph for step in self._all() if step.graph is not None]

    @property
    def num_bytes(self) -> int:
        """What the captures reserved, on all devices."""
        return sum(step.num_bytes for step in self._all())

    def close(self) -> None:
        """Let go of the graphs and their memory: a round under way has to end first."""
        for step in self._all():
            step.close()
        self.of_trees, self.release, self.pools = {}, None, GraphPools()

    def _all(self) -> list[GraphedStep]:
        return [*self.of_trees.values(), *([self.release] if self.release else [])]

    def _graphed(self, step: Callable[[], None]) -> GraphedStep:
        links = self.state.target.links
        if links is not None:
            return RankGraphs(step, links, self.state.devices, self.streams, self.pools)
        return GraphedStep(step, self.state.devices, self.streams, self.pools)

    def _prepare(self, tree: TreeConfig) -> Round:
        """The state under this tree, with the head where such a round begins."""
        state = self.state
        view, waiting = state.under(tree), state.waiting
        if waiting is None:
            return view
        if waiting.rounds and (view.tree != ROOT_ALONE or waiting.rounds >= MOST_WAITING):
            self.release = self.release or self._graphed(state.release)
            self.release()
            waiting.rounds = 0
        if view.tree == ROOT_ALONE:
            state.postpone()
        return view
