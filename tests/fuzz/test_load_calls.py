"""A fixed sample of `load_calls.py`."""

import pytest
import torch
from load_calls import outcome, prepare
from workers import assert_no_fault

PARTS, CALLS = 4, 40
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its right texts are those of a CPU")


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_loads_are_refused_or_right(part):
    prepare()
    assert_no_fault(outcome, range(part * CALLS, (part + 1) * CALLS))
