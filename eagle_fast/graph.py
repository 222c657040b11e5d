"""A step as one CUDA graph.

The step must read and write only tensors whose addresses stay, and never wait for the device. It runs eagerly first (as
real rounds, which compile kernels and warm libraries up), then is captured once and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

WARMUP_STEPS = 2


class GraphedStep:
    """Calls `step`, from the third call on by replaying a graph of it. On a CPU it just calls it."""

    def __init__(self, step: Callable[[], None], device: torch.device):
        self.step, self.device = step, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.eager = device.type != "cuda"

    def __call__(self) -> None:
        self.calls += 1
        if not self.eager and self.graph is None and self.calls > WARMUP_STEPS:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.eager:
            self.step()
        else:
            self._warm_up()

    def _warm_up(self) -> None:
        """Run for real on a side stream, as a capture will."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            # without a stream of this device, a capture on a second device records nothing and says nothing
            stream = torch.cuda.Stream(self.device)
            # thread_local: other threads may copy and synchronise meanwhile
            captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            with torch.cuda.device(self.device), captured:
                self.step()
        except RuntimeError as error:
            self.eager = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"rounds run without a CUDA graph, which is slower: {reason}", stacklevel=2)
            torch.cuda.synchronize(self.device)
        else:
            self.graph = graph
