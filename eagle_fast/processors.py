"""Logits processors of transformers on a tree: each visited node sees exactly its own prefix.

The walk runs on the host and calls the processors once for every emitted token, with the text so far and in order:
the same calls that stock `generate` makes, so processors that keep a state (grammars, watermarks) work too. Rows of a
batch are processed one by one, without padding. Only generations with processors pay for this.
"""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eagle_fast.config import SamplingParams
from eagle_fast.round import Accepted, Round
from eagle_fast.tree import Tree


def split_warpers(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, dict[str, float]]:
    """(what must run on the host, settings of the sampler): a list's tail of temperature, top-k, top-p and min-p, in
    that order, is what our sampler does on the device. Any other order or warper stays in the list as it is."""
    order = {TemperatureLogitsWarper: 0, TopKLogitsWarper: 1, TopPLogitsWarper: 2, MinPLogitsWarper: 3}
    tail = len(processors)
    last = len(order)
    while tail and order.get(type(processors[tail - 1]), last) < last:
        tail -= 1
        last = order[type(processors[tail])]
    if any(type(each) in order for each in processors[:tail]):
        return LogitsProcessorList(processors), {"temperature": 1.0}
    settings: dict[str, float] = {"temperature": 1.0}
    for warper in processors[tail:]:
        if isinstance(warper, TemperatureLogitsWarper):
            settings["temperature"] = warper.temperature
        elif isinstance(warper, TopKLogitsWarper):
            settings["top_k"] = warper.top_k
        elif isinstance(warper, TopPLogitsWarper):
            settings["top_p"] = warper.top_p
        else:
            settings["min_p"] = warper.min_p
    return LogitsProcessorList(processors[:tail]), settings


def accept_processed(
    state: Round, tree: Tree, logits: torch.Tensor, processors: LogitsProcessorList, texts: list[list[int]]
) -> Accepted:
    """The walk of `Round.accept` under processors. texts: each sequence so far, its root included."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    depths, lengths, ends = tree.depths.tolist(), state.lengths.tolist(), state.ends.tolist()
    path, emitted = torch.zeros_like(state.emitted), torch.zeros_like(state.emitted)
    counts = torch.zeros_like(state.counts)
    for row, text in enumerate(texts):
        limit = min(state.max_path, max(ends[row] - lengths[row], 0))
        nodes, chosen = [], []
        node: int | None = 0
        prefix = list(text)
        while node is not None and len(nodes) < limit:
            ids = torch.tensor([prefix], device=logits.device)
            scores = processors(ids, logits[row, node][None].float())  # type: ignore[arg-type]
            token = state.sampling.choose_row(scores, row, lengths[row] + depths[row][node])
            nodes.append(node)
            chosen.append(token)
            prefix.append(token)
            children = (n for n, parent in enumerate(parents[row]) if parent == nodes[-1] and tokens[row][n] == token)
            node = next(children, None)
        counts[row] = len(nodes)
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.long)
        emitted[row, : len(nodes)] = torch.tensor(chosen, dtype=torch.long)
    return Accepted(path, counts, emitted)


def sampler_params(settings: dict[str, float], do_sample: bool, seed) -> SamplingParams:
    """Sampling parameters from what `split_warpers` found; greedy where sampling is off."""
    if not do_sample:
        return SamplingParams(seed=seed)
    return SamplingParams(seed=seed, **settings)  # type: ignore[arg-type]
