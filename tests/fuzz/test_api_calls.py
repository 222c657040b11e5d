"""A fixed sample of `api_calls.py`, and calls that are odd in ways of their own."""

import pytest
from api_calls import outcome, quiet
from workers import assert_no_fault

PARTS, CALLS = 8, 40


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_calls_are_refused_or_right(part):
    quiet()
    assert_no_fault(outcome, range(part * CALLS, (part + 1) * CALLS))
