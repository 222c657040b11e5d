"""Cuts of a layer's weights over ranks: every row once, or where key heads are too few, with all that read it."""

import pytest
import torch

from eagle_fast.layers.cuts import deal, deal_dimension, deal_groups, deal_heads, parts_of, taken


@pytest.mark.parametrize("total", [1, 2, 7, 96, 131, 49152])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_dimension_is_dealt_whole(total, ranks):
    if total < ranks:
        with pytest.raises(ValueError, match=f"{total} cannot be dealt to {ranks} ranks"):
            deal_dimension(total, ranks)
        return
    parts = deal_dimension(total, ranks)
    assert [row for part in parts for row in part] == list(range(total))
    assert min(map(len, parts)) > 0
    if total >= 1000:  # of any use to cut
        assert max(map(len, parts)) - min(map(len, parts)) <= 128


@pytest.mark.parametrize(("total", "ranks", "unit"), [(14336, 2, 128), (28672, 8, 128), (131, 3, 1)])
def test_units_are_not_cut(total, ranks, unit):
    assert all(part.start % unit == 0 for part in deal_dimension(total, ranks))


def test_groups_are_not_cut():
    for total, ranks, unit in ((14336, 2, 128), (14336, 3, 128), (96, 2, 32), (64, 2, 32), (576, 4, 64)):
        parts = deal_groups(total, ranks)
        assert [row for part in parts for row in part] == list(range(total))
        assert all(part.start % unit == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= unit
    for total, ranks in ((97, 2), (64, 4)):
        with pytest.raises(ValueError, match=f"{total} columns cannot be dealt to {ranks} ranks in groups of 128 or"):
            deal_groups(total, ranks)


def test_sizes_are_as_equal_as_units_allow():
    assert deal(3, 2) == [2, 1]
    assert deal(1280, 3, 128) == [512, 384, 384]


# heads, key heads, ranks
@pytest.mark.parametrize(
    "sizes", [(32, 8, 2), (9, 3, 2), (9, 3, 3), (64, 8, 3), (4, 2, 4), (8, 1, 2), (7, 1, 2), (12, 2, 3), (6, 6, 4)]
)
def test_heads_stay_with_what_they_read(sizes):
    num_heads, num_kv_heads, ranks = sizes
    group, shares = num_heads // num_kv_heads, deal_heads(*sizes)
    assert len(shares) == ranks
    assert sorted(head for share in shares for head in share.query) == list(range(num_heads))
    assert {head for share in shares for head in share.kv} == set(range(num_kv_heads))
    for share in shares:
        each, left = divmod(len(share.query), len(share.kv))
        assert left == 0
        for place, head in enumerate(share.query):  # as attention counts them, within a rank
            assert share.kv[place // each] == head // group
    if num_kv_heads >= ranks:
        assert sum(len(share.kv) for share in shares) == num_kv_heads


def test_too_many_ranks_for_the_query_heads():
    with pytest.raises(ValueError, match="1 cannot be dealt to 2 ranks"):
        deal_heads(1, 1, 2)


def test_rows_of_heads():
    share = deal_heads(9, 3, 2)[1]
    assert share.rows(64) == (range(6 * 64, 9 * 64), range(2 * 64, 3 * 64))


def test_parts_are_views_or_copies_side_by_side():
    weight = torch.arange(24.0).view(6, 4)
    first, last = parts_of([2, 4])
    assert taken(weight, [last]).data_ptr() == weight[2:].data_ptr()
    assert torch.equal(taken(weight, [range(1), last]), weight[[0, 2, 3, 4, 5]])
    assert torch.equal(taken(weight, [range(1, 3)], 1), weight[:, 1:3])
    assert torch.equal(torch.cat([taken(weight, [part]) for part in (first, last)]), weight)
