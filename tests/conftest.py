"""Fixtures for all tests. Without a GPU, Triton kernels run under its interpreter, chosen before triton is imported."""

import gc
import importlib
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from failures import Failures

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption("--failures", type=Path, help="a file for the whole message of every failure, as it happens")


def pytest_configure(config):
    file = config.getoption("failures")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(file))


def pytest_collection_modifyitems(config, items):
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' if needed > 1 else ''}"))


HOARD = 2**30  # bytes of a GPU that a process may keep for its next test: many run side by side on one card


@pytest.fixture(autouse=True)
def memory_is_given_back():
    yield
    if any(torch.cuda.memory_reserved(index) > HOARD for index in range(torch.cuda.device_count())):
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def bench(monkeypatch):
    """Modules of bench/ by name, as its scripts import them."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    return importlib.import_module


@pytest.fixture
def device():
    """The device that real code paths are tested on: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def two_gpus():
    """Two that reach each other's memory."""
    from eagle_fast.layers.peer_links import check_peers

    devices = [torch.device("cuda", index) for index in range(2)]
    check_peers(devices, "two_gpus")
    return devices


@pytest.fixture
def graphs_only():
    """Rounds and prompts over ranks that run without CUDA graphs are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(rounds|prompts) run without CUDA graphs")
        yield


@pytest.fixture
def triton_kernels(monkeypatch):
    """Every op takes its Triton kernel, interpreted on the CPU: keep the shapes of such a test small."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "triton")


@pytest.fixture
def accepted_lengths(record_property):
    """Call with the tokens per round of an often-right head; the mean is printed at the end of the run."""
    return lambda tau: record_property("accepted_length", tau)


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])
    taus = [value for report in reports for name, value in report.user_properties if name == "accepted_length"]
    if taus:
        terminalreporter.write_line(
            f"accepted length with often-right heads: mean {sum(taus) / len(taus):.2f}, least {min(taus):.2f}, "
            f"over {len(taus)} families and heads"
        )
