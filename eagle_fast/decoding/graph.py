"""A step as one CUDA graph, over one device or several.

The step must read and write only tensors whose addresses stay, and never wait for a device. It runs eagerly first (as
real rounds, which compile kernels and warm libraries up), then is captured once and replayed.

One graph may span devices: streams of the others are forked off the capturing stream by events and joined to it at the
end, and copies between devices become edges of the graph. The host launches it once, as on one device. What the step
allocates on other devices comes from memory pools that live as long as the graph, as CUDAGraph's own does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from eagle_fast.messages import warn_user

WARMUP_STEPS = 2


class SideStreams:
    """A stream of each device to warm up and capture on, the same for all steps that take turns.

    cuBLAS keeps a workspace, 32 MB on Hopper, for every stream that a thread has ever used it on: with a stream for
    every step, memory would grow until all of the 32 that torch has for a device were used by every thread.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, devices: Sequence[torch.device]) -> list[torch.cuda.Stream]:
        """Those of the devices, each a stream of that very device: on any other, a capture records nothing and says
        nothing."""
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
        return [self._streams[device] for device in devices]


class GraphPools:
    """Memory that graphs are captured into, a pool of each device: for steps of which one runs at a time, and which
    leave nothing in it."""

    def __init__(self) -> None:
        self._home: Any = None
        self._handles: dict[torch.device, Any] = {}
        self._others: dict[torch.device, torch.cuda.MemPool] = {}

    def home(self) -> Any:
        """The pool of the device that a graph is launched on."""
        self._home = self._home or torch.cuda.graph_pool_handle()
        return self._home

    def renew_home(self) -> None:
        """After a capture that failed: the next one gets a pool of its own."""
        self._home, self._handles = None, {}

    def handle(self, device: torch.device) -> Any:
        """The pool of a device whose graph is its own."""
        if device not in self._handles:
            self._handles[device] = torch.cuda.graph_pool_handle()
        return self._handles[device]

    def of(self, device: torch.device) -> torch.cuda.MemPool:
        """The pool of another device."""
        if device not in self._others:
            with torch.cuda.device(device):  # a pool is one device's
                self._others[device] = torch.cuda.MemPool()
        return self._others[device]


class GraphedStep:
    """Calls `step`, from the third call on by replaying a graph of it. With a CPU among the devices it just calls it.

    devices: all that the step works on; the first is the one whose current stream the caller's other work is on.
    streams: for steps that are never launched at the same time; by default it has its own.
    pools: for steps that share them; by default it has its own.
    """

    def __init__(
        self,
        step: Callable[[], None],
        devices: Sequence[torch.device],
        streams: SideStreams | None = None,
        pools: GraphPools | None = None,
    ):
        self.step, self.devices = step, list(devices)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pools: GraphPools | None = pools or GraphPools()
        self.num_bytes = 0  # what the capture reserved, on all devices
        self.calls = 0
        self.eager = any(device.type != "cuda" for device in devices)
        self.streams = [] if self.eager else (streams or SideStreams()).of(devices)

    def __call__(self) -> None:
        self.calls += 1
        if not self.eager and self.graph is None and self.calls > WARMUP_STEPS:
            self._capture()
        if self.graph is not None:
            self._replay(self.graph)
        elif self.eager:
            self.step()
        else:
            self._warm_up()

    def close(self) -> None:
        """Let go of the graph and its pools, whose memory is free at once: a round under way has to end first."""
        if self.graph is not None:
            for device in self.devices:
                torch.cuda.synchronize(device)
        self.graph, self.pools, self.num_bytes = None, None, 0

    def __del__(self) -> None:
        """Of a step that nobody closed."""
        if getattr(self, "graph", None) is not None:
            self.close()

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch on the first device, after and before what other devices' current streams are given."""
        home, *others = [torch.cuda.current_stream(device) for device in self.devices]
        for other in others:
            home.wait_stream(other)
        graph.replay()
        for other in others:
            other.wait_stream(home)

    def _warm_up(self) -> None:
        """Run for real on side streams, as a capture will."""
        currents = [torch.cuda.current_stream(device) for device in self.devices]
        for stream, current in zip(self.streams, currents, strict=True):
            stream.wait_stream(current)
        try:
            with self._side_streams():
                self.step()
        finally:  # what comes next uses the same buffers, even if the step was launched in part only
            for stream, current in zip(self.streams, currents, strict=True):
                current.wait_stream(stream)

    @contextmanager
    def _side_streams(self) -> Iterator[None]:
        """The side streams are current, and the first device is."""
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.cuda.device(self.devices[0]))
            yield

    def _capture(self) -> None:
        pools = self.pools = self.pools or GraphPools()
        graph, pool = torch.cuda.CUDAGraph(), pools.home()
        home, *others = self.streams
        for device in self.devices:
            torch.cuda.synchronize(device)
        try:
            with nothing_collected(), ExitStack() as stack:
                for other in others:
                    stack.enter_context(torch.cuda.use_mem_pool(pools.of(other.device), device=other.device))
                stack.enter_context(self._side_streams())
                # thread_local: other threads may copy and synchronize meanwhile
                stack.enter_context(torch.cuda.graph(graph, pool, home, capture_error_mode="thread_local"))
                for other in others:
                    other.wait_stream(home)
                before = self._reserved()  # here, since the entry of torch.cuda.graph lets go of cached memory
                self.step()
                reserved = self._reserved() - before
                for other in others:
                    home.wait_stream(other)
        except RuntimeError as error:
            abandon(pool, home.device)
            pools.renew_home()
            for device in self.devices:
                torch.cuda.synchronize(device)
            if isinstance(error.__context__, KeyboardInterrupt):  # all that is wrong with the capture
                raise error.__context__ from None
            self.eager = True
            reason = str(error).strip().splitlines()[0]
            warn_user(f"rounds run without a CUDA graph, which is slower: {reason}")
        except BaseException:
            if is_capturing(home):  # an interrupt between the capture's begin and what would end it
                with suppress(RuntimeError), torch.cuda.stream(home):
                    graph.capture_end()
            raise
        else:
            self.graph, self.num_bytes = graph, max(reserved, 0)

    def _reserved(self) -> int:
        """Bytes that torch's allocator has taken from the devices."""
        return sum(torch.cuda.memory_reserved(device) for device in self.devices)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """In this block Python collects no garbage: a memory pool that is freed under a capture aborts the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_capturing(stream: torch.cuda.Stream | None = None) -> bool:
    """Whether a stream, by default this thread's current one, is being captured."""
    if not torch.cuda.is_initialized():
        return False
    with torch.cuda.stream(stream):  # None: the current one
        return torch.cuda.is_current_stream_capturing()


def abandon(pool, device: torch.device) -> None:
    """Tell torch's allocator that a capture is over. A failed one doesn't, and the process is aborted as soon as some
    other memory pool is freed."""
    with suppress(RuntimeError):  # where it ended before it failed
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
