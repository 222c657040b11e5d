"""What the layers of a prompt ask of the host, which launches them one by one: all of it counted, per layer.

Kernels are not run. Where they lie on a CPU, rows are more than take the kernels of few, as on a GPU.
"""

import sys
from collections import Counter
from pathlib import Path

import eagle_fast_kernels.rms_norm
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import make

import eagle_fast
from eagle_fast.layers.attention import PrefillStep
from eagle_fast.target import Target

ROWS = 70
LAYERS = (2, 6)
OURS = tuple(str(Path(each).parent) for each in (eagle_fast.__file__, eagle_fast_kernels.rms_norm.__file__))
MEMORY = {"new_empty", "empty", "empty_like", "_unsafe_view", "_reshape_alias"}  # besides views, what launches nothing

pytestmark = pytest.mark.usefixtures("triton_kernels")


class Work(TorchDispatchMode):
    """Counts torch's ops that do something on a device, and those that only make tensors or views."""

    def __init__(self):
        super().__init__()
        self.launched, self.others = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        counter = self.others if func.is_view or name in MEMORY else self.launched
        counter["attention" if "attention" in name else name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch):
    """The launches of kernels, by name, which are left out."""
    found = Counter()

    def noted(kernel, *args, **kwargs):
        found[kernel.fn.__name__.strip("_")] += 1

    monkeypatch.setattr(type(eagle_fast_kernels.rms_norm._rms_norm_kernel), "run", noted)
    return found


def prefilled(layers, device):
    """A call that prefills a prompt of a Llama of so many layers."""
    target = Target(make("llama", num_hidden_layers=layers, dtype=torch.bfloat16).to(device), (0, 1, 2))
    cache = target.new_cache(1, 128)
    tokens = torch.randint(3, 130, (1, ROWS), generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: target.prefill(tokens, 0, cache)


def of_a_layer(counts):
    """What a layer more adds to the counts of models of so many `LAYERS`."""
    few, many = counts
    added = {name: (many[name] - few[name]) / (LAYERS[1] - LAYERS[0]) for name in many | few}
    return {name: count for name, count in added.items() if count}


def test_a_layer_is_nine_launches(kernels, device):
    counts = []
    for layers in LAYERS:
        work = prefilled(layers, device)
        kernels.clear()
        with Work() as torchs:
            work()
        counts.append(Counter(kernels) + torchs.launched)
    assert of_a_layer(counts) == {
        "rope_append_kernel": 1, "add_rms_norm_kernel": 2, "silu_mul_kernel": 1, "mm": 4, "attention": 1,
    }  # fmt: skip


def test_a_layer_makes_few_tensors(kernels, device):
    counts = []
    for layers in LAYERS:
        work = prefilled(layers, device)
        with Work() as torchs:
            work()
        counts.append(torchs.others)
    assert sum(of_a_layer(counts).values()) <= 24, "each costs the host about a microsecond"


def test_what_a_layer_made_is_not_checked_again(kernels, device):
    """Functions of ours that a layer calls: the checks of all wrappers alone would be more than twice as many."""
    counts = []
    for layers in LAYERS:
        work, calls = prefilled(layers, device), Counter()

        def note(frame, event, _, calls=calls):
            if event == "call" and frame.f_code.co_filename.startswith(OURS):
                calls[frame.f_code.co_name] += 1

        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)
        counts.append(calls)
    added = of_a_layer(counts)
    assert "tensor" not in added, "arguments are checked in every layer"
    assert sum(added.values()) <= 70, added


def test_all_layers_share_what_says_where_their_rows_begin():
    step, device = PrefillStep(3, 5), torch.device("cpu")
    assert step.first_rows(2, device) is step.first_rows(2, device)
    assert step.first_rows(2, device).tolist() == [3, 3]
    assert step.first_rows(1, device).tolist() == [3]
