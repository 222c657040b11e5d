"""Which tree pays, by given times and acceptances: functions that run nothing."""

import itertools

import numpy as np
import pytest

from eagle_fast import TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.choice import LADDER, best_tree, candidates, resolved, whole_times, within
from eagle_fast.decoding.cost import Costs, Place, Timer, place_of
from eagle_fast.decoding.worth import DEPTHS, RANKS, USUAL, DraftCounts, chances, expected_tokens, usual_chances

BIG, SMALL, CHAIN = TreeConfig(60, 7, 10), TreeConfig(8, 3, 3), TreeConfig(4, 3, 1)
# ms of a round on an H100 at 8B shapes: batch -> (the root alone, then the ladder without 5/3/2 and 2/0/1)
H100 = {
    1: (5.65, 7.79, 7.57, 7.20, 6.94, 6.68, 6.43, 6.25),
    8: (6.01, 16.35, 12.60, 10.17, 8.77, 7.54, 6.97, 6.75),
    32: (6.65, 65.76, 40.73, 25.52, 16.90, 11.39, 8.92, 8.56),
}
TIMED = (ROOT_ALONE, *(tree for tree in LADDER if tree.total_token not in (5, 2)))


def flat(best, second=0.3, others=0.1):
    """Chances that are the same at every depth."""
    return usual_chances([[best, second, others]])


# -- worth -------------------------------------------------------------------------------------------------------------


def test_a_chain_brings_a_geometric_sum():
    assert expected_tokens(flat(0.5), TreeConfig(4, 3, 1)) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(flat(0.5), TreeConfig(3, 3, 1)) == pytest.approx(1 + 0.5 + 0.25)
    assert expected_tokens(flat(0.5), ROOT_ALONE) == 1


def test_siblings_are_right_where_better_ones_are_wrong():
    assert expected_tokens(flat(0.5, 0.5, 0.5), TreeConfig(4, 0, 3)) == pytest.approx(1 + 0.5 + 0.25 + 0.125)


@pytest.mark.parametrize("tree", [(7, 2, 2), (5, 3, 2), (20, 2, 4), (40, 3, 4)], ids=str)
def test_nodes_are_the_best_of_all_within_the_beam(tree):
    """Against all candidates written out: level by level, the children of each level's best."""
    tree = TreeConfig(*tree)
    rng = np.random.default_rng(1)
    found = usual_chances(np.sort(rng.uniform(0.05, 0.7, (DEPTHS, RANKS)))[:, ::-1].tolist())
    level, worths = [1.0], []
    for depth in range(tree.depth + 1):
        missed = [1.0, *np.cumprod(1 - found[depth])]
        children = [up * found[depth, rank] * missed[rank] for up in level for rank in range(tree.top_k)]
        worths += children
        level = sorted(children, reverse=True)[: tree.top_k]
    best = sorted(worths, reverse=True)[: tree.total_token - 1]
    assert expected_tokens(found, tree) == pytest.approx(1 + sum(best))


def test_larger_trees_are_worth_more_and_better_drafts_too():
    for one, other in itertools.pairwise(LADDER):
        assert expected_tokens(USUAL, one) > expected_tokens(USUAL, other)
    values = [expected_tokens(flat(best), BIG) for best in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert values == sorted(values)


def test_counts_are_of_what_was_tried():
    counts = DraftCounts()
    counts.take([1, 0, -3])  # second child, then the first, then none of two
    counts.take([-1 - 3])
    counts.take([0, -1])  # the second node has no children, or no room
    assert counts.tried[0, :4].tolist() == [3, 2, 1, 0]
    assert counts.right[0, :4].tolist() == [1, 1, 0, 0]
    assert counts.tried[1, :2].tolist() == [1, 0]
    assert counts.tried[2, :3].tolist() == [1, 1, 0]
    assert counts.by_depth == [2 / 3, 1.0, 0.0]
    assert counts.table() == [[0.3333, 0.5, 0.0], [1.0], [0.0, 0.0]]
    counts.take([0] * DEPTHS + [-1])  # down to the deepest leaf that a tree may have
    assert counts.by_depth == [3 / 4, 1.0, 0.5] + [1.0] * (DEPTHS - 3)
    both = counts + counts
    assert both.tried[0, 0] == 8
    assert both != counts
    both.fade(0.5)
    assert both == counts


def drawn(truth, tree, rounds, seed=0):
    """Counts of rounds under the tree that `expected_tokens` imagines, with drafts that are right by chance; and the
    tokens of a round."""
    rng, counts, tokens = np.random.default_rng(seed), DraftCounts(), 0
    for _ in range(rounds):
        path = []
        for depth in range(tree.depth + 1):
            rank = next((r for r in range(tree.top_k) if rng.random() < truth[depth, r]), None)
            path.append(-1 - tree.top_k if rank is None else rank)
            if rank is None:
                break
        counts.take(path)
        tokens += sum(rank >= 0 for rank in path) + 1
    return counts, tokens / rounds


@pytest.mark.parametrize("ran", [TreeConfig(20, 2, 4), CHAIN, TreeConfig(60, 4, 10)], ids=str)
def test_what_runs_tells_of_trees_that_do_not(ran):
    """A chain says nothing of second guesses, which are then as good as usual beside the first."""
    truth = flat(0.5, 0.5 / 0.65 * 0.3, 0.1)
    counts, _ = drawn(truth, ran, 600)
    found = chances(counts, USUAL, 4.0)
    for tree in (*LADDER, CHAIN, ROOT_ALONE):
        assert expected_tokens(found, tree) == pytest.approx(expected_tokens(truth, tree), rel=0.1)


def test_little_is_made_of_few_tries():
    counts = DraftCounts()
    assert np.allclose(chances(counts, USUAL, 4.0), USUAL)
    counts.take([-1 - 10])
    once = expected_tokens(chances(counts, USUAL, 4.0), BIG)
    assert 0.6 * expected_tokens(USUAL, BIG) < once < expected_tokens(USUAL, BIG)
    for _ in range(40):
        counts.take([-1 - 10])
    assert expected_tokens(chances(counts, USUAL, 4.0), BIG) < 1.35
    assert expected_tokens(chances(counts, USUAL, 4.0), CHAIN) < 1.15


def test_tables_of_a_head_go_on_where_they_end():
    found = usual_chances([[0.8, 0.4], [0.7]])
    assert found.shape == (DEPTHS, RANKS)
    assert found[0, :3].tolist() == [0.8, 0.4, 0.4]
    assert found[5, :2].tolist() == [0.7, 0.7]
    assert usual_chances([[0.0, 1.0]])[0, 0] > 0


# -- choice ------------------------------------------------------------------------------------------------------------


def choice(batch, found, times=H100):
    return best_tree(
        dict(zip(TIMED, times[batch], strict=True)), {tree: expected_tokens(found, tree) for tree in TIMED}
    )


def test_the_tree_shrinks_with_the_batch_and_with_the_acceptance():
    good = flat(0.72, 0.35, 0.15)
    sizes = [choice(batch, good).total_token for batch in (1, 8, 32)]
    assert sizes[0] >= 40 > sizes[1] > sizes[2] > 1
    for batch in H100:
        by_chance = [choice(batch, flat(best, best / 2, best / 5)).total_token for best in (0.02, 0.3, 0.5, 0.75)]
        assert by_chance == sorted(by_chance)
        assert by_chance[0] == 1


def test_a_tree_is_kept_until_another_is_clearly_better():
    times, tokens = {BIG: 1.0, SMALL: 1.0}, {BIG: 3.03, SMALL: 3.0}
    assert best_tree(times, tokens) == BIG
    assert best_tree(times, tokens, SMALL) == SMALL
    assert best_tree(times, {**tokens, BIG: 3.2}, SMALL) == BIG
    assert best_tree(times, tokens, CHAIN) == BIG, "one that is no choice any more"


def test_trees_that_were_not_timed_are_tried_where_they_could_be_best():
    trees = (BIG, SMALL, ROOT_ALONE)
    assert len(set(whole_times({}, trees).values())) == 1, "then the largest, whose tokens are most"
    times = whole_times({BIG: 8.0}, trees)
    assert times == {BIG: 8.0, SMALL: 4.0, ROOT_ALONE: 4.0}
    assert whole_times({SMALL: 5.0, ROOT_ALONE: 3.0}, trees)[BIG] == 5.0, "no less than a smaller one"
    assert best_tree(times, {BIG: 4.0, SMALL: 2.5, ROOT_ALONE: 1.0}) == SMALL
    assert best_tree(times, {BIG: 4.0, SMALL: 1.8, ROOT_ALONE: 1.0}) == BIG, "at twice its speed it would not do"


def test_a_cpu_begins_with_few_rows_and_tries_more_where_drafts_are_good():
    """It computes eight rows where a GPU computes any few; a tree of 4 nodes is no faster than one of 8."""
    trees = candidates(BIG, 1, on_cpu=True)
    tokens = {tree: expected_tokens(USUAL, tree) for tree in trees}
    first = best_tree(whole_times({}, trees, 1, True), tokens)
    assert first == SMALL
    assert CHAIN not in trees
    assert CHAIN in candidates(BIG, 2, on_cpu=True)
    larger, known = trees[0], {SMALL: 0.08}
    assert whole_times(known, trees, 1, True)[larger] == pytest.approx(0.08 * 2**0.4)
    assert best_tree(whole_times(known, trees, 1, True), tokens) == SMALL
    good = {tree: expected_tokens(flat(0.95, 0.5), tree) for tree in trees}
    assert best_tree(whole_times(known, trees, 1, True), good) == larger


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 15, 16, 31, 32, 63, 64, 500])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_candidates_are_few_and_within_what_was_given(batch, on_cpu):
    for most in (BIG, TreeConfig(120, 9, 12), TreeConfig(16, 3, 4), TreeConfig(6, 5, 1), TreeConfig(2, 0, 1)):
        found = candidates(most, batch, on_cpu)
        assert 2 <= len(found) <= 5
        assert found[-1] == ROOT_ALONE
        for name in ("total_token", "depth", "top_k"):
            assert all(getattr(tree, name) <= getattr(most, name) for tree in found[:-1])
        assert [tree.total_token for tree in found] == sorted((t.total_token for t in found), reverse=True)
    if batch < 4 and not on_cpu:
        assert candidates(BIG, batch)[0] == BIG
        assert candidates(TreeConfig(120, 9, 12), batch)[0] == TreeConfig(120, 9, 12)
    assert candidates(ROOT_ALONE, batch, on_cpu) == (ROOT_ALONE,)


def test_a_number_left_to_the_engine_is_its_own_limit():
    assert resolved(TreeConfig(-1, 7, 10)) == BIG
    assert resolved(TreeConfig(-1, 1, 2)) == TreeConfig(7, 1, 2)
    assert resolved(TreeConfig(12, 7, 10)) == TreeConfig(12, 7, 10)
    assert within(BIG, TreeConfig(13, 1, 3)) == TreeConfig(13, 1, 3)
    assert within(TreeConfig(24, 6, 6), TreeConfig(20, 7, 2)) == TreeConfig(20, 6, 2)


# -- cost --------------------------------------------------------------------------------------------------------------


def test_the_first_times_count_by_the_least_and_later_ones_are_followed():
    costs, place = Costs(), place_of(4, 300)
    costs.note(place, BIG, 9.0)
    assert not costs.is_sure(place, BIG)
    costs.note(place, BIG, 2.0)
    assert costs.is_sure(place, BIG)
    assert costs.of(place, (BIG, SMALL)) == {BIG: 2.0}
    costs.note(place, BIG, 100.0)
    assert 2.0 < costs.of(place, (BIG,))[BIG] < 2.5, "one that was interrupted"
    for _ in range(60):
        costs.note(place, BIG, 3.0)
    assert costs.of(place, (BIG,))[BIG] == pytest.approx(3.0, rel=0.01)


def test_times_of_a_longer_context_follow_from_what_was_timed_there():
    costs = Costs()
    near, far = place_of(1, 500), place_of(1, 20_000)
    assert near != far
    for _ in range(2):
        costs.note(near, BIG, 8.0)
        costs.note(near, SMALL, 6.0)
        costs.note(far, SMALL, 7.5)
    assert costs.of(far, (BIG, SMALL, CHAIN)) == {BIG: 9.5, SMALL: 7.5}
    assert costs.is_sure(far, BIG), "its graph exists, and its time is known well enough"
    assert costs.of(place_of(2, 500), (BIG,)) == {}, "another batch is another matter"
    assert costs.of(place_of(1, 500, on_host=True), (BIG,)) == {}
    assert place_of(1, 1023) == Place(1, 0) != place_of(1, 1024) != place_of(1, 2048)


def test_a_timer_reads_rounds_in_their_order(monkeypatch):
    now = iter([1.0, 1.5, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("eagle_fast.decoding.cost.time.perf_counter", lambda: next(now))
    timer = Timer(None, 2)
    for _ in range(2):
        timer.start()
        timer.stop()
    assert timer.read() == 0.5
    timer.start()
    timer.stop()
    assert [timer.read(), timer.read()] == [2.0, 1.0]
