"""Statistics of several calls together."""

from eagle_fast import Statistics


def test_two_calls_add_up():
    one = Statistics(rounds=3, accepted=[1, 2], new_tokens=[5], prefill_seconds=0.5, decode_seconds=1.0)
    other = Statistics(rounds=2, accepted=[0, 1, 1], new_tokens=[3, 2], prefill_seconds=0.25, decode_seconds=3.0)
    both = one + other
    assert both == Statistics(5, [1, 3, 1], [5, 3, 2], 0.75, 4.0)
    assert both.tau == 10 / 5
    assert both.tokens_per_second == 10 / 4
    assert (Statistics() + one) == one
    assert one.accepted == [1, 2], "what is added stays as it is"
