"""What a call did: tokens, rounds and seconds, which trees its rounds had, and how their drafts did."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.worth import DraftCounts


@dataclass
class TreeUse:
    """Rounds under one tree: how many, over all sequences; the tokens that these brought, and how many of them were
    promised when the tree was chosen, 0 where nobody chose."""

    rounds: int = 0
    tokens: int = 0
    promised: float = 0.0

    def __add__(self, other: TreeUse) -> TreeUse:
        return TreeUse(self.rounds + other.rounds, self.tokens + other.tokens, self.promised + other.promised)


@dataclass
class Statistics:
    """What one call did. `accepted[n]` counts the rounds, over all sequences, that gave a sequence n + 1 tokens: n
    drafted ones that were accepted and one of the target's own. Tokens dropped behind a stop are not counted, nor are
    rounds that brought none. Seconds are those that the call itself took, without its consumer's between rounds.
    reused_tokens: of each sequence, the prompt's tokens that were not prefilled, see reuse_cache.
    trees: by tree, what its rounds brought, as in `accepted`; drafts: how often drafts were right, by depth and rank,
    those behind a stop too."""

    rounds: int = 0
    accepted: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused_tokens: list[int] = field(default_factory=list)
    trees: dict[TreeConfig, TreeUse] = field(default_factory=dict)
    drafts: DraftCounts = field(default_factory=DraftCounts)

    def __add__(self, other: Statistics) -> Statistics:
        """Of both calls together, with all of their sequences."""
        trees = dict(self.trees)
        for tree, use in other.trees.items():
            trees[tree] = trees.get(tree, TreeUse()) + use
        pairs = zip_longest(self.accepted, other.accepted, fillvalue=0)
        return Statistics(
            self.rounds + other.rounds,
            [mine + theirs for mine, theirs in pairs],
            self.new_tokens + other.new_tokens,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
            self.reused_tokens + other.reused_tokens,
            trees,
            self.drafts + other.drafts,
        )

    def count(self, tree: TreeConfig, counts: list[int], promised: float) -> None:
        """Add a round that brought each sequence so many tokens."""
        self.rounds += any(counts)
        use = self.trees.setdefault(tree, TreeUse())
        for row, count in enumerate(counts):
            self.new_tokens[row] += count
            if count:
                self.accepted[count - 1] += 1
                use.rounds += 1
                use.tokens += count
                use.promised += promised

    @property
    def tau(self) -> float:
        """Mean tokens that a sequence got from a round: drafted tokens accepted, plus the one of the target."""
        sequence_rounds = sum(self.accepted)
        return sum(self.new_tokens) / sequence_rounds if sequence_rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By depth, the share of the times that a draft stood there, and the path to it was right, in which it was."""
        return self.drafts.by_depth

    @property
    def tokens_per_second(self) -> float:
        return sum(self.new_tokens) / self.decode_seconds if self.decode_seconds else 0.0
