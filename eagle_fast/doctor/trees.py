"""The trees that rounds of a pair may have: what each is worth by the head's own figures, and what it takes here.

Tokens follow from the chances that the head's config.json has by depth and rank; for a head without them, from usual
ones. Times are those of real rounds, of a pair that is loaded and warmed up for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.choice import LADDER, best_tree, candidates, resolved, within
from eagle_fast.decoding.cost import place_of
from eagle_fast.decoding.worth import USUAL, expected_tokens, usual_chances
from eagle_fast.doctor.plan import Setting
from eagle_fast.head.config import HeadConfig
from eagle_fast.model import EaModel


@dataclass(frozen=True)
class Trees:
    """tokens: by temperature and tree, those of a sequence's round. measured: whether the chances are the head's own.

    seconds: by batch, those of a round under each of the trees that such a batch chooses from.
    """

    tokens: dict[float, dict[TreeConfig, float]]
    measured: bool
    seconds: dict[int, dict[TreeConfig, float]] = field(default_factory=dict)

    def rows(self) -> list[list[str]]:
        """A table, with the tree that pays at each batch and the first temperature marked."""
        first = next(iter(self.tokens.values()))
        best = {batch: best_tree(took, first) for batch, took in self.seconds.items()}
        header = ["nodes/depth/top-k", *(f"tokens, T={temperature:g}" for temperature in self.tokens)]
        rows = [header + [f"batch {batch}: ms, tokens/s" for batch in self.seconds]]
        for tree in first:
            row = ["/".join(map(str, (tree.total_token, tree.depth, tree.top_k)))]
            row[0] += ", plain decoding" * (tree == ROOT_ALONE)
            row += [f"{tokens[tree]:.2f}" for tokens in self.tokens.values()]
            for batch, took in self.seconds.items():
                rate = f"{batch * first[tree] / took[tree]:,.0f}" if tree in took else ""
                row.append(f"{took[tree] * 1e3:.2f}, {rate}" + " *" * (tree == best[batch]) if tree in took else "-")
            rows.append(row)
        return rows

    def as_json(self) -> dict:
        """The same in plain values."""
        names = [[tree.total_token, tree.depth, tree.top_k] for tree in next(iter(self.tokens.values()))]
        return {
            "measured": self.measured,
            "trees": names,
            "tokens": {f"{temperature:g}": list(tokens.values()) for temperature, tokens in self.tokens.items()},
            "seconds": {
                str(batch): [took.get(TreeConfig(*name)) for name in names] for batch, took in self.seconds.items()
            },
        }


def examine_trees(setting: Setting, config: HeadConfig) -> Trees:
    """The table of a head, and of its rounds where a setting names batches, for which the pair is loaded.

    Raises ValueError.
    """
    most = resolved(setting.tree)
    seconds = dict(_timed(setting)) if setting.batches else {}
    trees = [most, *(within(tree, most) for tree in LADDER), *(tree for took in seconds.values() for tree in took)]
    ordered = sorted(dict.fromkeys([*trees, ROOT_ALONE]), key=lambda tree: -tree.total_token)
    tables = {temperature: usual_chances(table) for temperature, table in sorted(config.acceptance.items())}
    tokens = {
        temperature: {tree: expected_tokens(found, tree) for tree in ordered}
        for temperature, found in (tables or {0.0: USUAL}).items()
    }
    return Trees(tokens, bool(tables), seconds)


def _timed(setting: Setting) -> Iterator[tuple[int, dict[TreeConfig, float]]]:
    """(batch, seconds of its trees)."""
    tree = setting.tree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that timing decides: here nothing else is wanted
        model = EaModel.from_pretrained(
            base_model_path=setting.model, ea_model_path=setting.head, dtype=setting.dtype or "auto", adaptive=True,
            total_token=tree.total_token, depth=tree.depth, top_k=tree.top_k, max_memory=setting.max_memory,
            **{"device_map": "auto"} | dict(setting.options),
        )  # fmt: skip
    on_cpu = model.target.device.type == "cpu"
    for batch in setting.batches:
        model.warmup(batch, max_length=setting.context)
        yield batch, model.experience.costs.of(place_of(batch, 0), candidates(model.tree, batch, on_cpu))
        model.states.clear()
