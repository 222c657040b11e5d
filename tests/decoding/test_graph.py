"""What a graphed step tells CUDA, in which order: written down by a torch.cuda that does nothing else."""

import contextlib
import gc

import pytest
import torch

from eagle_fast.decoding.graph import WARMUP_STEPS, GraphedStep
from eagle_fast.target.turns import Turns


class Recorder:
    """Streams are names like "side1" (of device 1); `log` holds what happened."""

    def __init__(self, fails):
        self.fails, self.log, self.now = fails, [], 0
        self.current = {index: Stream(self, "main", index) for index in range(3)}

    @contextlib.contextmanager
    def device(self, device):
        before, self.now = self.now, torch.device(device).index
        yield
        self.now = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(stream.device):
            before, self.current[self.now] = self.current[self.now], stream
            try:
                yield
            finally:
                self.current[stream.device.index] = before

    @contextlib.contextmanager
    def use_mem_pool(self, pool, device):
        assert pool == device.index, "a pool belongs to the device that was current when it was made"
        self.log.append(f"pool {pool}")
        yield

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert self.current[self.now] is stream
        self.log.append(f"begin {stream}")
        try:
            yield
        finally:
            self.log.append("end")
            if self.fails:
                raise RuntimeError("broken\nat length")


class Stream:
    def __init__(self, recorder, kind, index):
        self.recorder, self.name, self.device = recorder, f"{kind}{index}", torch.device("cuda", index)

    def wait_stream(self, other):
        self.recorder.log.append(f"{self} after {other}")

    def wait_event(self, event):
        self.recorder.log.append(f"{self} after {event.stream}'s event")

    def __str__(self):
        return self.name


class Event:
    def __init__(self, recorder):
        self.recorder, self.stream = recorder, None

    def record(self, stream):
        self.stream = stream
        self.recorder.log.append(f"{stream} recorded")


@pytest.fixture(params=[False, True], ids=["captured", "failing"])
def recorder(request, monkeypatch):
    found = Recorder(request.param)

    class Graph:
        def replay(self):
            found.log.append("replay")

    stand_ins = {
        "Stream": lambda device: Stream(found, "side", device.index), "CUDAGraph": Graph, "MemPool": lambda: found.now,
        "current_stream": lambda device: found.current[device.index], "synchronize": lambda device: None,
        "graph_pool_handle": lambda: "pool", "device": found.device, "stream": found.stream, "graph": found.graph,
        "use_mem_pool": found.use_mem_pool, "memory_reserved": lambda device: len(found.log) + device.index,
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: found.log.append((name, *args)), raising=False)
    return found


@pytest.mark.parametrize("devices", [[0], [1, 0, 2]], ids=str)
@pytest.mark.filterwarnings("ignore:rounds run without a CUDA graph")
def test_order_of_a_graphed_step(recorder, devices):
    home, *others = devices
    mains = dict(recorder.current)

    def work():
        streams = {str(recorder.current[index]) for index in devices}
        recorder.log.append("work" if streams == {f"side{index}" for index in devices} else "eager work")
        assert recorder.now == home or recorder.fails

    step = GraphedStep(work, [torch.device("cuda", index) for index in devices])
    for _ in range(WARMUP_STEPS):
        step()
        enter, leave = ([f"{a}{n} after {b}{n}" for n in devices] for a, b in (("side", "main"), ("main", "side")))
        assert recorder.log == [*enter, "work", *leave]
        recorder.log.clear()
    step()
    assert recorder.current == mains, "the caller's streams are current again"
    fork, join = [f"side{n} after side{home}" for n in others], [f"side{home} after side{n}" for n in others]
    capture = [*(f"pool {n}" for n in others), f"begin side{home}", *fork, "work", *join, "end"]
    replay = [*(f"main{home} after main{n}" for n in others), "replay", *(f"main{n} after main{home}" for n in others)]
    if recorder.fails:
        ended = [("_cuda_endAllocateToPool", home, "pool"), ("_cuda_releasePool", home, "pool")]
        assert recorder.log == [*capture, *ended, "eager work"]
        assert step.graph is None
    else:
        assert recorder.log == [*capture, *replay]
        recorder.log.clear()
        step()
        assert recorder.log == replay


def test_turns_follow_each_other_on_every_device(recorder, monkeypatch):
    """Whatever streams are current, also where a turn fails."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(recorder))
    home, other, cpu = torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")
    turn = Turns([home, cpu, other])
    with pytest.raises(KeyboardInterrupt), turn():
        raise KeyboardInterrupt
    recorder.log.clear()
    for index in (0, 1):
        recorder.current[index] = Stream(recorder, "next", index)
    with turn():
        recorder.log.append("work")
    done = ["next1 recorded", "next0 recorded"]
    assert recorder.log == ["next1 after main1's event", "next0 after main0's event", "work", *done]


@pytest.mark.filterwarnings("ignore:rounds run without a CUDA graph")
def test_a_step_that_fails_midway_is_waited_for(recorder):
    """What it launched still runs, on buffers that the next call uses."""

    def work():
        raise torch.OutOfMemoryError

    step = GraphedStep(work, [torch.device("cuda", index) for index in (1, 0)])
    for _ in range(WARMUP_STEPS):
        with pytest.raises(torch.OutOfMemoryError):
            step()
        assert recorder.log[2:] == ["main1 after side1", "main0 after side0"]
        recorder.log.clear()


@pytest.mark.filterwarnings("ignore:rounds run without a CUDA graph")
def test_a_replay_ends_before_the_memory_of_its_step_goes(recorder, monkeypatch):
    waited_for = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited_for.append(device.index))
    step = GraphedStep(lambda: None, [torch.device("cuda", index) for index in (1, 0)])
    for _ in range(WARMUP_STEPS + 1):
        step()
    waited_for.clear()
    del step
    assert waited_for == ([] if recorder.fails else [1, 0])


def test_an_interrupt_during_a_capture_stays_one(recorder):
    """Also where the capture fails of it; the next call captures again."""
    calls = []

    def work():
        calls.append(1)
        if len(calls) == WARMUP_STEPS + 1:
            raise KeyboardInterrupt

    step = GraphedStep(work, [torch.device("cuda", index) for index in (1, 0)])
    for _ in range(WARMUP_STEPS):
        step()
    with pytest.raises(KeyboardInterrupt):
        step()
    assert step.graph is None
    assert not step.eager


@pytest.mark.filterwarnings("ignore:rounds run without a CUDA graph")
def test_no_garbage_is_collected_under_a_capture(recorder):
    """Where a pool that some exception still held is freed under a capture, torch ends the process."""
    collected = []
    step = GraphedStep(lambda: collected.append(gc.isenabled()), [torch.device("cuda", index) for index in (0, 1)])
    for _ in range(WARMUP_STEPS + 1):
        step()
    assert collected[: WARMUP_STEPS + 1] == [True] * WARMUP_STEPS + [False]
    assert gc.isenabled()


def test_a_cpu_among_the_devices_is_eager():
    calls = []
    step = GraphedStep(lambda: calls.append(1), [torch.device("cuda", 0), torch.device("cpu")])
    for _ in range(WARMUP_STEPS + 2):
        step()
    assert len(calls) == WARMUP_STEPS + 2
    assert step.graph is None
