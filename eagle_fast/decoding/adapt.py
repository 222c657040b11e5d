"""The tree of each round, chosen while a call decodes: what `choice` makes of `cost` and `worth`, and when to rest.

The host chooses from what it has read, while rounds are under way: nothing waits for the device, nor the device for a
choice. A choice stands for some rounds.
Where the root alone pays best, decoding rests from drafting: for a few rounds, and where a trial then does not pay, for
twice as many, and so on.

What is learned is the model's: times, and by temperature what its drafts were worth. A call begins with that and goes
by its own text, of which the last rounds count most. Sequences that are decoded together have their rounds together
too, and so one estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.choice import best_tree, whole_times
from eagle_fast.decoding.cost import SURE, Costs, Place, place_of
from eagle_fast.decoding.graph import WARMUP_STEPS
from eagle_fast.decoding.tree import Walked
from eagle_fast.decoding.worth import USUAL, DraftCounts, Table, chances, expected_tokens, usual_chances

PERIOD = 8  # rounds that a choice stands for
TRIAL = 3  # rounds of a trial, after a rest
REST, LONGEST_REST = 16, 1024  # rounds without a draft
LONGEST_FIRST = 128  # the same of a call's first rest, whatever earlier calls have come to
WELL = 4 * PERIOD  # rounds with drafts after which the next rest is a short one again
VISIT = 4  # rounds of a tree that nearly pays and did not run for long
FORGOTTEN, NEARLY = 256, 0.93
CALL_FADES, MODEL_FADES = 0.96, 0.999  # by a round
CALL_LEANS, MODEL_LEANS = 4.0, 8.0  # tries that what was known before counts for
RATIO_LEANS, RATIO_FADES = 60.0, 0.99  # the same of drafts that came, over those that were promised
MOST_RATIO = 2.0


@dataclass
class Account:
    """Drafted tokens of rounds under one tree: promised by depth and rank, and those that came."""

    promised: float = 0.0
    came: float = 0.0

    def fade(self, factor: float) -> None:
        """Let what was counted so far weigh less."""
        self.promised *= factor
        self.came *= factor

    def ratio(self, usual: float) -> float:
        """What comes for what is promised, leaning on what is usual."""
        found = (self.came + RATIO_LEANS * usual) / (self.promised + RATIO_LEANS)
        return min(max(found, 1 / MOST_RATIO), MOST_RATIO)


@dataclass
class Worth:
    """What drafts were worth at one temperature."""

    usual: Table = field(default_factory=lambda: USUAL)
    counts: DraftCounts = field(default_factory=DraftCounts)
    accounts: dict[TreeConfig, Account] = field(default_factory=dict)
    rest: int = REST  # rounds of the next rest

    def ratio(self, tree: TreeConfig) -> float:
        """What comes for what is promised under a tree: its own, where it ran, else that of all."""
        ran = list(self.accounts.values())
        of_all = Account(sum(each.promised for each in ran), sum(each.came for each in ran)).ratio(1.0)
        return self.accounts[tree].ratio(of_all) if tree in self.accounts else of_all


class Experience:
    """What was learned of a model: `costs`, and `worths` by temperature and whether the draft knows the noise.

    usual: chances by depth and rank that the head's trainer measured, by temperature.
    """

    def __init__(self, usual: Mapping[float, Sequence[Sequence[float]]] | None = None):
        self.usual = {temperature: usual_chances(table) for temperature, table in (usual or {}).items()}
        self.costs = Costs()
        self.worths: dict[tuple[float, bool], Worth] = {}

    def worth(self, temperature: float, shared_noise: bool) -> Worth:
        """Temperatures that differ by less than an eighth are one."""
        nearest = round(min(temperature, 2.0) * 4) / 4
        key = nearest, shared_noise or not nearest
        if key not in self.worths:
            self.worths[key] = Worth(self._usual(nearest))
        return self.worths[key]

    def _usual(self, temperature: float) -> Table:
        if not self.usual:
            return USUAL
        return self.usual[min(self.usual, key=lambda measured: abs(measured - temperature))]


class TreeChooser:
    """Chooses the trees of one call: `next` before a round is launched, `choose` after that, `take` when it was read.

    trees: those of the state, the root alone among them. context: tokens of a text when the call begins. on_host: the
    host chooses the tokens. on_cpu: a CPU computes.
    """

    def __init__(
        self, trees: Sequence[TreeConfig], experience: Experience, worth: Worth, batch: int, context: float,
        *, on_host: bool = False, on_cpu: bool = False,
    ):  # fmt: skip
        self.trees, self.experience, self.worth = tuple(trees), experience, worth
        self.batch, self.on_host, self.on_cpu = batch, on_host, on_cpu
        self.place: Place = place_of(batch, context, on_host)
        self.counts = DraftCounts()
        self.new = DraftCounts()  # since the last choice
        self.rounds: dict[TreeConfig, list[int]] = {}  # of those: sequences' rounds under a tree, tokens of these
        self.last_used = dict.fromkeys(self.trees, 0)
        self.num_rounds = self.since_rest = 0
        self.since_choice = PERIOD // 2  # the first choice knows nothing of the text
        self.rest_left, self.next_rest = 0, min(worth.rest, LONGEST_FIRST)
        self.stays = 0  # rounds for which the tree is not chosen anew
        self.promises = self._promises(self._expected())
        self.tree = self._best(None)

    def next(self, context: float) -> TreeConfig:
        """The tree of the next round, of texts with so many tokens."""
        self.place = place_of(self.batch, context, self.on_host)
        self.num_rounds += 1
        self.since_choice += 1
        self.since_rest = self.since_rest + 1 if self.tree != ROOT_ALONE else 0
        self.last_used[self.tree] = self.num_rounds
        return self.tree

    def choose(self) -> None:
        """The tree of the round after, if it is time for another."""
        if self.rest_left:
            self.rest_left -= 1
            if not self.rest_left:
                self._try_again()
        elif self.stays:
            self.stays -= 1
        elif self.since_choice >= PERIOD and self._is_timed(self.tree):
            self._choose()

    def take(self, tree: TreeConfig, walked: Walked, drafts: DraftCounts, seconds: float | None) -> None:
        """A round under `tree` is over: what it reported, these drafts, and how long it took, if that tells."""
        if seconds is not None and not self._is_timed(tree):
            self.since_choice = PERIOD  # the next choice is due, as soon as this is timed
        if seconds is not None:
            self.experience.costs.note(self.place, tree, seconds)
        if tree == ROOT_ALONE:
            return
        noted = self.rounds.setdefault(tree, [0, 0])
        self.new += drafts
        for count, is_full in zip(walked.counts, walked.full, strict=True):
            if not is_full:
                noted[0] += 1
                noted[1] += count

    def promise(self, tree: TreeConfig) -> float:
        """Tokens that a round under `tree` is expected to give a sequence."""
        return self.promises[tree]

    # -- choosing --------------------------------------------------------------------------------------------------

    def _is_timed(self, tree: TreeConfig) -> bool:
        return self.experience.costs.is_sure(self.place, tree)

    def _choose(self) -> None:
        self._learn()
        best = self._best(self.tree)
        if self.since_rest >= WELL:
            self.worth.rest = self.next_rest = REST
        if best == ROOT_ALONE and self._is_timed(best):
            self.rest_left = self.next_rest
            self.worth.rest = self.next_rest = min(2 * self.next_rest, LONGEST_REST)
            self._keep_little()
        elif (visited := self._nearly_best(best)) is not None:
            best, self.stays = visited, VISIT
        self.tree, self.since_choice = best, 0

    def _try_again(self) -> None:
        """After a rest: some rounds under the tree that promises most with drafts."""
        self.promises = self._promises(self._expected())
        times = self._times()
        drafting = {tree: took for tree, took in times.items() if tree != ROOT_ALONE}
        self.tree, self.stays, self.since_choice = best_tree(drafting, self.promises), TRIAL, PERIOD

    def _times(self) -> dict[TreeConfig, float]:
        known = self.experience.costs.of(self.place, self.trees)
        return whole_times(known, self.trees, self.batch, self.on_cpu)

    def _best(self, current: TreeConfig | None) -> TreeConfig:
        return best_tree(self._times(), self.promises, current)

    def _nearly_best(self, best: TreeConfig) -> TreeConfig | None:
        """A tree that promises nearly as much as the best, and of which all that is known is old."""
        times = self._times()
        rates = {tree: self.promises[tree] / took for tree, took in times.items()}
        for tree in self.trees:
            old = self.num_rounds - self.last_used[tree] >= FORGOTTEN
            if tree not in (best, ROOT_ALONE) and old and rates[tree] >= NEARLY * rates[best]:
                return tree
        return None

    # -- learning --------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """From the rounds since the last choice."""
        worth, launched = self.worth, self.since_choice
        self.counts.fade(CALL_FADES**launched)
        self.counts += self.new
        worth.counts.fade(MODEL_FADES**launched)
        worth.counts += self.new
        expected = self._expected()
        for account in list(worth.accounts.values()):
            account.fade(RATIO_FADES**launched)
        for tree, (number, tokens) in self.rounds.items():
            account = worth.accounts.setdefault(tree, Account())
            account.promised += number * (expected[tree] - 1)
            account.came += tokens - number
        self.new, self.rounds = DraftCounts(), {}
        self.promises = self._promises(expected)

    def _keep_little(self) -> None:
        """Before a rest: what is known of the text by then counts for little more than the trial that follows."""
        tried = float(self.counts.tried[0, 0])
        if tried > CALL_LEANS:
            self.counts.fade(CALL_LEANS / tried)

    def _chances(self) -> Table:
        """Of this text, leaning on what the model's texts have shown, this one too, and those on what is usual."""
        return chances(self.counts, chances(self.worth.counts, self.worth.usual, MODEL_LEANS), CALL_LEANS)

    def _expected(self) -> dict[TreeConfig, float]:
        found = self._chances()
        return {tree: expected_tokens(found, tree) for tree in self.trees}

    def _promises(self, expected: Mapping[TreeConfig, float]) -> dict[TreeConfig, float]:
        return {
            tree: 1.0 if tree == ROOT_ALONE else 1 + self.worth.ratio(tree) * (tokens - 1)
            for tree, tokens in expected.items()
        }


class EachInTurn(TreeChooser):
    """Every tree until its graph is captured and its time known, to warm up; the text teaches nothing."""

    ROUNDS = WARMUP_STEPS + 1 + SURE

    def next(self, context: float) -> TreeConfig:
        self.tree = self.trees[min(self.num_rounds // self.ROUNDS, len(self.trees) - 1)]
        self.num_rounds += 1
        return self.tree

    def choose(self) -> None:
        pass

    def take(self, tree: TreeConfig, walked: Walked, drafts: DraftCounts, seconds: float | None) -> None:
        if seconds is not None:
            self.experience.costs.note(self.place, tree, seconds)
