"""A step over ranks as one CUDA graph for each, captured together and launched by one thread.

The ranks' kernels wait for each other inside the graphs, so no edge leads from one to the other, and none of them may
run without the rest: their launches are one step.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from eagle_fast.decoding.graph import GraphedStep, GraphPools, SideStreams, abandon, nothing_collected
from eagle_fast.layers.links import Links
from eagle_fast.messages import warn_user


class RankGraphs(GraphedStep):
    """See `GraphedStep`. devices: one for each rank, in rank order. links: between them. what: to say of it."""

    def __init__(
        self, step: Callable[[], None], links: Links, devices: Sequence[torch.device],
        streams: SideStreams | None = None, pools: GraphPools | None = None, *, what: str = "rounds",
    ):  # fmt: skip
        super().__init__(step, devices, streams, pools)
        self.links, self.others, self.what = links, list[torch.cuda.CUDAGraph](), what

    def close(self) -> None:
        super().close()
        self.others = []

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with self.links.whole():
            for each in (graph, *self.others):
                each.replay()

    def _capture(self) -> None:
        pools = self.pools = self.pools or GraphPools()
        graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in self.devices]  # made executable when all have ended
        handles = [pools.handle(device) for device in self.devices]
        gc.collect()
        for device in self.devices:
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.links.settle()
        begun = 0
        try:
            with nothing_collected(), self._side_streams():
                try:
                    for graph, stream, handle in zip(graphs, self.streams, handles, strict=True):
                        with torch.cuda.stream(stream):
                            # relaxed: beginning one must not forbid this thread to begin the next
                            graph.capture_begin(handle, capture_error_mode="relaxed")
                        begun += 1
                    before = self._reserved()
                    self.step()
                    reserved = self._reserved() - before
                except BaseException:
                    self._end(graphs[:begun], handles)
                    begun = 0
                    raise
                self._end(graphs, handles)
            for graph, device in zip(graphs, self.devices, strict=True):
                with torch.cuda.device(device):
                    graph.instantiate()
        except BaseException as error:
            pools.renew_home()  # also after an interrupt: torch takes no pool again whose graphs are gone
            for device in self.devices:
                torch.cuda.synchronize(device)
            if not isinstance(error, RuntimeError):
                raise
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            self.eager = True
            reason = str(error).strip().splitlines()[0]
            warn_user(f"{self.what} run without CUDA graphs, which is slower: {reason}")
        else:
            self.graph, self.others, self.num_bytes = graphs[0], graphs[1:], max(reserved, 0)

    def _end(self, graphs: Sequence[torch.cuda.CUDAGraph], handles: Sequence[object]) -> None:
        """End captures; RuntimeError, after all have ended, where one failed."""
        failed: RuntimeError | None = None
        for graph, stream, handle in zip(graphs, self.streams, handles, strict=False):
            try:
                with torch.cuda.stream(stream), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # of a step that only rank 0 has
                    graph.capture_end()
            except RuntimeError as error:
                failed = failed or error
                with suppress(RuntimeError):
                    abandon(handle, stream.device)
        if failed is not None:
            raise failed
