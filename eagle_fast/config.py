"""What a user can set: the shape of the draft tree and how tokens are sampled. Frozen, checked once at construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from eagle_fast.messages import shown, warn_user

MAX_TREE_NODES = 256
MAX_TOP_K = 16
MAX_DEPTH = 16
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e6
GREEDY_TEMPERATURE = 1e-5  # and what is below


def plain_number(value: Any) -> int | float | None:
    """A number as Python has it: of NumPy, and of arrays and tensors without dimensions, too. None for what is none,
    for truth values, and for tensors without values."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            value = value.item()
        except RuntimeError:  # on the meta device
            return None
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # of a fraction
        return math.inf


def whole_number(value: Any) -> int | None:
    """`plain_number` of integers, None for all else, 2.0 included."""
    number = plain_number(value)
    return number if isinstance(number, int) else None


def check_positive(**numbers) -> list[int]:
    """Counts and lengths, by the name of their argument; returns them as Python's integers."""
    found = []
    for name, value in numbers.items():
        number = whole_number(value)
        if number is None or number < 1:
            raise ValueError(f"{name}={shown(value)}: use a positive integer")
        found.append(number)
    return found


@dataclass(frozen=True)
class TreeConfig:
    """The dynamic draft tree of EAGLE-2/3 (Li et al. 2024, section 4), with the meaning of SafeAILab/EAGLE: what every
    round has or, where the engine chooses the tree of each, the most that it may have.

    total_token  nodes that the target verifies, the root (the newest token) included; -1 leaves them to the engine;
                 1, with depth=0 and top_k=1, is the root alone: one token per round
    depth        beam steps after the first, so the deepest drafted token is depth + 1 below the root
    top_k        width of the beam, and children that each beam row proposes
    """

    total_token: int = 60
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        for name, low, high in (("top_k", 1, MAX_TOP_K), ("depth", 0, MAX_DEPTH)):
            value = whole_number(getattr(self, name))
            if value is None or not low <= value <= high:
                raise ValueError(f"{name}={shown(getattr(self, name))}: use an integer from {low} to {high}")
            object.__setattr__(self, name, value)
        total, least = whole_number(self.total_token), 1 if (self.depth, self.top_k) == (0, 1) else 2
        if total is None or (total != -1 and not least <= total <= MAX_TREE_NODES):
            raise ValueError(
                f"total_token={shown(self.total_token)}: use 2 to {MAX_TREE_NODES}, or -1 to leave them to the engine"
            )
        object.__setattr__(self, "total_token", total)
        if total > 1 + self.num_candidates:
            raise ValueError(
                f"total_token={total} is more than the {1 + self.num_candidates} nodes that depth={self.depth} and "
                f"top_k={self.top_k} can propose: lower total_token or raise depth or top_k"
            )

    @property
    def num_candidates(self) -> int:
        """Drafted tokens to choose from: top_k under the root, then top_k for each of top_k rows a beam step."""
        return self.top_k + self.depth * self.top_k**2

    @property
    def num_slots(self) -> int:
        """Cache rows behind the prefix that a round writes: the head's beam rows, and the target's nodes."""
        return max(self.total_token, 0 if self.total_token == 1 else self.depth * self.top_k)

    @property
    def max_path(self) -> int:
        """Most nodes on a path from the root, the root included: also the most tokens a round can emit."""
        return min(self.depth + 2, self.total_token)


ROOT_ALONE = TreeConfig(total_token=1, depth=0, top_k=1)  # plain decoding's


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; the warpers are those of transformers, in its order.

    top_k 0, top_p 0 or 1, min_p 0 and None for any of them switch a warper off (SafeAILab/EAGLE passes 0.0 for off),
    and temperatures up to 1e-5 are greedy as there. seed: an integer, or one per sequence; None draws from torch's
    default generator, so torch.manual_seed governs.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            given = getattr(self, name)
            value = 0 if given is None and name != "temperature" else plain_number(given)
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name}={shown(getattr(self, name))}: use a finite number")
            object.__setattr__(self, name, value)
        if self.temperature < 0:
            raise ValueError(f"temperature={shown(self.temperature)}: use 0 for greedy decoding or a positive number")
        if self.temperature <= GREEDY_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature}: too small to divide by; use 0 for greedy decoding")
        if self.temperature > MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={shown(self.temperature)}: all tokens would be equally likely; use at most "
                f"{MAX_TEMPERATURE:g}"
            )
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={shown(getattr(self, name))}: use a probability from 0 to 1")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k={shown(self.top_k)}: use a whole number of tokens, 0 for no limit")
        object.__setattr__(self, "top_k", min(int(self.top_k), MAX_SEED))  # more than any vocabulary: no limit
        self._check_seed()
        if self.temperature == 0 and (self.top_k or 0 < self.top_p < 1 or self.min_p):
            warn_user("top_k, top_p and min_p change nothing at temperature=0 (greedy decoding)")

    def _check_seed(self) -> None:
        given: Any = self.seed
        if getattr(given, "ndim", 0) == 1:
            given = given.tolist()
        if given is None:
            return
        several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        listed = list(given) if several else [given]
        seeds = [whole_number(each) for each in listed]
        for seed, each in zip(seeds, listed, strict=True):
            if seed is None or not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed={shown(each)}: use an integer from 0 to 2**63 - 1, or one for each sequence")
        object.__setattr__(self, "seed", tuple(seeds) if several else seeds[0])
