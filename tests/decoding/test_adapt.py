"""The trees that a call chooses, on a made-up machine and text: times and acceptance are given, nothing is decoded."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from decoders import decoder, prompt, rebuilt, stock, with_head
from zoo import make

import eagle_fast.calls
from eagle_fast import EaModel, TreeConfig
from eagle_fast.config import ROOT_ALONE
from eagle_fast.decoding.adapt import LONGEST_REST, REST, Experience, TreeChooser
from eagle_fast.decoding.choice import candidates
from eagle_fast.decoding.tree import Walked
from eagle_fast.decoding.worth import DraftCounts, expected_tokens, usual_chances

BIG = TreeConfig()
GOOD, POOR = usual_chances([[0.72, 0.35, 0.15]]), usual_chances([[0.005, 0.005]])


def milliseconds(tree, batch=1, plain=5.65):
    """About an H100 with 8B shapes: rows beyond some 64 are paid for, and each level of the draft."""
    rows = batch * tree.total_token
    return plain if tree == ROOT_ALONE else plain + 0.4 + 0.17 * tree.depth + 0.02 * max(rows - 64, 0) + 0.008 * rows


def nodes(truth, tree, known={}):  # noqa: B006  # what was worked out stays so
    """The tree of a draft that knows these chances: how many children its nodes have, by their ranks on the path."""
    key = truth.tobytes(), tree
    if key not in known:
        missed = np.cumprod(np.hstack([np.ones((len(truth), 1)), 1 - truth]), 1)
        beam, all_nodes = [(1.0, ())], []
        for depth in range(tree.depth + 1):
            level = [
                (worth * truth[depth, rank] * missed[depth, rank], (*node, rank))
                for worth, node in beam
                for rank in range(tree.top_k)
            ]
            all_nodes += level
            beam = sorted(level, reverse=True)[: tree.top_k]
        known[key] = Counter(node[:-1] for _, node in sorted(all_nodes, reverse=True)[: tree.total_token - 1])
    return known[key]


class Machine:
    """Runs rounds: tells a chooser their time, and what of a text with these chances they accept."""

    def __init__(self, truth, batch=1, trees=None, ahead=2, experience=None, cost=milliseconds, seed=0):
        self.truth, self.batch, self.ahead, self.cost = truth, batch, ahead, cost
        self.trees = trees or candidates(BIG, batch)
        self.experience = experience or Experience()
        worth = self.experience.worth(0.0, True)
        self.chooser = TreeChooser(self.trees, self.experience, worth, batch, 100)
        self.rng = np.random.default_rng(seed)
        self.log, self.clock, self.tokens, self.calls = [], 0.0, 0, Counter()

    def walk(self, tree):
        """Ranks of one sequence's path."""
        sizes, node, path = nodes(self.truth, tree), (), []
        while True:
            size = sizes.get(node, 0)
            rank = next((r for r in range(size) if self.rng.random() < self.truth[len(node), r]), None)
            path.append(-1 - size if rank is None else rank)
            if rank is None:
                return path
            node = (*node, rank)

    def run(self, rounds):
        """Returns the trees of the rounds."""
        under_way, first = [], len(self.log)
        for _ in range(rounds):
            tree = self.chooser.next(100)
            self.chooser.choose()
            self.calls[tree] += 1
            under_way.append((tree, self.calls[tree] > 2))  # captured at the third
            self.log.append(tree)
            if len(under_way) >= self.ahead:
                self.read(*under_way.pop(0))
        for each in under_way:
            self.read(*each)
        return self.log[first:]

    def read(self, tree, tells):
        paths = [[-1] if tree == ROOT_ALONE else self.walk(tree) for _ in range(self.batch)]
        took = self.cost(tree, self.batch)
        self.clock += took
        counts = [len(path) for path in paths]
        self.tokens += sum(counts)
        drafts = DraftCounts()
        for path in paths:
            drafts.take(path)
        self.chooser.take(tree, Walked(counts, paths, [False] * self.batch), drafts, took if tells else None)

    def share(self, rounds):
        """Of the best rate that these rounds could have had: what they could expect, without luck."""
        worth = sum(expected_tokens(self.truth, tree) for tree in rounds)
        took = sum(self.cost(tree, self.batch) for tree in rounds)
        best = max(expected_tokens(self.truth, tree) / self.cost(tree, self.batch) for tree in self.trees)
        return worth / took / best


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
@pytest.mark.parametrize("best", [0.75, 0.5, 0.25])
def test_what_pays_is_found_and_kept(batch, best):
    truth = usual_chances([[best, best / 2, best / 5]])
    machine = Machine(truth, batch)
    assert machine.share(machine.run(300)) > 0.92, "with all that is tried on the way"
    assert machine.share(machine.run(600)) > 0.95


def test_nobody_pays_for_a_head_that_knows_nothing():
    """256 tokens: what it took to find out, and to look again, ever less often."""
    machine = Machine(POOR)
    machine.run(256)
    assert machine.clock / machine.tokens < 1.05 * milliseconds(ROOT_ALONE)
    rounds = machine.run(6000)
    assert sum(tree != ROOT_ALONE for tree in rounds) < 0.02 * len(rounds)
    assert any(tree != ROOT_ALONE for tree in rounds)
    again = Machine(POOR, experience=machine.experience, seed=1)
    assert sum(tree != ROOT_ALONE for tree in again.run(400)) < 12, "the next call knows"


def test_rests_grow_longer_and_short_again_where_drafts_paid_in_between():
    machine = Machine(POOR)
    rounds = machine.run(5000)
    rests, length = [], 0
    for tree in rounds:
        if tree == ROOT_ALONE:
            length += 1
        elif length:
            rests.append(length)
            length = 0
    assert all(REST <= a <= b for a, b in pairwise(rests[1:]))
    assert rests[-1] > 8 * rests[1]
    assert max(rests) <= 1.2 * LONGEST_REST
    machine.truth = GOOD
    rounds = machine.run(3 * LONGEST_REST)
    assert ROOT_ALONE not in rounds[-LONGEST_REST // 2 :], "the text became easy"
    machine.truth = POOR
    rounds = machine.run(200)
    assert 2 * REST < sum(tree == ROOT_ALONE for tree in rounds) < len(rounds) - 2


def test_a_text_that_becomes_hard_or_easy_gets_other_trees():
    hard = usual_chances([[0.3, 0.05, 0.01]])
    machine = Machine(GOOD, 8)
    for truth in (GOOD, hard, GOOD, hard):
        machine.truth = truth
        machine.run(150)
        assert machine.share(machine.run(150)) > 0.96


def test_trees_that_could_not_pay_are_never_run():
    """Where a draft is nearly always right, decoding plainly could not pay at half a tree's time."""
    rounds = Machine(usual_chances([[0.9, 0.5]])).run(300)
    assert ROOT_ALONE not in rounds


def test_a_machine_that_slows_down_for_large_trees_is_noticed():
    machine = Machine(GOOD)
    machine.run(300)
    machine.cost = lambda tree, batch: milliseconds(tree, batch) + 0.4 * tree.total_token
    rounds = machine.run(300)[-100:]
    assert max(tree.total_token for tree in rounds) < 40


def test_one_late_round_is_no_reason():
    machine = Machine(GOOD)
    machine.run(300)
    steady, late = machine.cost, iter([True])
    kept = machine.log[-1]
    machine.cost = lambda tree, batch: 50 * steady(tree, batch) if next(late, False) else steady(tree, batch)
    assert machine.run(60).count(kept) > 40


def test_what_a_call_learned_the_next_one_begins_with():
    machine = Machine(GOOD, 8)
    machine.run(400)
    best = max(set(machine.log[-200:]), key=machine.log[-200:].count)
    again = Machine(GOOD, 8, experience=machine.experience, seed=3)
    assert again.run(10) == [best] * 10
    assert len(set(again.log)) == 1
    other = machine.experience.worth(1.0, True)
    assert other.counts != machine.experience.worth(0.0, True).counts, "of another temperature nothing is known"
    assert machine.experience.worth(1.05, True) is other
    assert machine.experience.worth(1.0, False) is not other


def test_a_head_that_was_measured_begins_with_its_figures():
    experience = Experience({0.0: [[0.9, 0.5]], 1.0: [[0.05, 0.01]]})
    assert Machine(GOOD, experience=experience).chooser.promise(BIG) > 6
    at_one = TreeChooser(candidates(BIG, 1), experience, experience.worth(0.8, True), 1, 100)
    assert at_one.promise(BIG) < 1.6


def test_promises_come_true():
    machine = Machine(GOOD)
    machine.run(200)
    promised = came = 0.0
    for _ in range(60):
        tokens = machine.tokens
        (tree,) = machine.run(1)
        promised, came = promised + machine.chooser.promise(tree), came + machine.tokens - tokens
    assert came == pytest.approx(promised, rel=0.15)


# -- models ------------------------------------------------------------------------------------------------------------


def test_who_is_adaptive(device):
    """float32 is, by default; 16 bits on a CPU round by the number of rows, and have to be asked, who says so."""
    base = decoder("llama", device)
    default = EaModel(base.base_model, base.ea_layer, tree=base.tree)
    assert default.adaptive
    assert len(default.trees(1)) > 1
    fixed = EaModel(base.base_model, base.ea_layer, tree=base.tree, adaptive=False)
    assert not fixed.adaptive
    assert fixed.trees(1) == (base.tree,)


def test_where_timing_would_decide_the_text_it_is_asked_for(device, monkeypatch, recwarn):
    model = with_head(make("llama"), device)
    monkeypatch.setattr(eagle_fast.calls, "_is_float32", lambda target: False)
    rounding = model.exactness == "rounding"
    for adaptive, expected in ((None, not rounding), (True, True), (False, False)):
        recwarn.clear()
        built = EaModel(model.base_model, model.ea_layer, tree=model.tree, adaptive=adaptive)
        assert built.adaptive == expected
        said = [str(each.message) for each in recwarn if "timing" in str(each.message) or "times" in str(each.message)]
        assert len(said) == int(bool(adaptive) and rounding)
    recwarn.clear()
    left = EaModel(model.base_model, model.ea_layer, tree=TreeConfig(-1, 3, 4))
    assert left.adaptive
    assert left.tree == TreeConfig(53, 3, 4)
    assert len(recwarn) == int(rounding)


def test_contradictions_are_refused(device):
    model = decoder("llama", device)
    with pytest.raises(ValueError, match="total_token=-1 leaves the tree to the engine"):
        EaModel(model.base_model, model.ea_layer, tree=TreeConfig(-1, 3, 4), adaptive=False)
    with pytest.raises(ValueError, match="adaptive='no': use True or False"):
        EaModel(model.base_model, model.ea_layer, adaptive="no")


@pytest.mark.parametrize("batch", [1, 3])
def test_statistics_say_which_trees_ran_and_what_came_of_them(batch, device):
    model = rebuilt(decoder("llama", device))
    model = EaModel(model.base_model, model.ea_layer, tree=TreeConfig(16, 3, 4), adaptive=True)
    ids = prompt(19, device).expand(batch, -1)
    out = model.eagenerate(ids, max_new_tokens=120, return_dict_in_generate=True)
    assert (out.sequences == stock(model, ids[:1], max_new_tokens=120)).all()
    done = out.statistics
    assert set(done.trees) <= set(model.trees(batch))
    assert sum(use.tokens for use in done.trees.values()) == sum(done.new_tokens) == 120 * batch
    assert sum(use.rounds for use in done.trees.values()) == sum(done.accepted)
    for tree, use in done.trees.items():
        assert use.rounds <= use.tokens <= use.rounds * tree.max_path
        assert use.rounds - 1e-6 <= use.promised <= use.rounds * tree.max_path
    assert 1 <= len(done.acceptance) <= 5
    assert all(0 <= share <= 1 for share in done.acceptance)
    fixed = rebuilt(decoder("llama", device)).eagenerate(ids, max_new_tokens=20, return_dict_in_generate=True)
    ((tree, use),) = fixed.statistics.trees.items()
    assert (tree, use.promised) == (TreeConfig(16, 3, 4), 0.0)
    assert sum(use.promised for use in (done + fixed.statistics).trees.values()) > 0


def test_warming_up_times_what_calls_will_choose_from_and_learns_nothing_of_drafts(device):
    ready = decoder("llama", device)
    model = EaModel(ready.base_model, ready.ea_layer)
    model.warmup(batch=2)
    costs = model.experience.costs
    (place,) = costs.seconds
    assert place.batch == 2
    assert all(costs.is_sure(place, tree) for tree in model.trees(2))
    assert not model.experience.worth(0.0, True).counts.tried.any()
    assert {lease.state.trees for lease in model.states.idle} == {model.trees(2), (ROOT_ALONE,)}
