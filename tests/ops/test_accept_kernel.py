"""accept walks as a Python loop does: random trees, dead ends, batches that are partly done or have little room."""

import random

import pytest
import torch
from eagle_fast_kernels.accept import accept


def walk(tokens, parents, chosen, room, max_path):
    """One sequence, lists in, (path, emitted) out."""
    if room <= 0:
        return [], []
    path = [0]
    while len(path) < min(max_path, room):
        child = [c for c, p in enumerate(parents) if p == path[-1] and c > 0 and tokens[c] == chosen[path[-1]] >= 0]
        if not child:
            break
        path.append(child[0])
    return path, [chosen[node] for node in path]


def ranks_of(path, tokens, parents, chosen, room):
    """Of each node on a path: how many of its children come before the right one, or -1 - its children without one."""
    ranks = []
    for step, node in enumerate(path):
        looks = step + 1 < room and chosen[node] >= 0
        children = [c for c, p in enumerate(parents) if p == node and c > 0 and looks]
        right = [tokens[c] == chosen[node] for c in children]
        ranks.append(right.index(True) if any(right) else -1 - len(right))
    return ranks


def check(tokens, parents, chosen, room, max_path, device):
    lengths = torch.arange(len(tokens), device=device) + 30
    ends, roots = lengths + torch.tensor(room, device=device), lengths + 900
    report = torch.full((len(tokens), 1 + max_path), -12345, device=device)
    tree = [torch.tensor(x, device=device) for x in (tokens, parents, chosen)]
    alone = [roots.clone(), report.clone()]
    ranks = torch.full((len(tokens), max_path), -12345, device=device)
    path = accept(*tree, lengths, ends, roots, report, ranks)
    assert torch.equal(accept(*tree, lengths, ends, *alone), path), "ranks change nothing else"
    assert torch.equal(alone[0], roots)
    assert torch.equal(alone[1], report)
    path, ranks = path.tolist(), ranks.tolist()
    counts, emitted = report[:, 0].tolist(), report[:, 1:].tolist()
    for b in range(len(tokens)):
        nodes, texts = walk(tokens[b], parents[b], chosen[b], room[b], max_path)
        padding = [0] * (max_path - len(nodes))
        assert path[b] == nodes + padding
        assert emitted[b] == texts + padding
        assert counts[b] == len(nodes)
        assert ranks[b] == ranks_of(nodes, tokens[b], parents[b], chosen[b], room[b]) + [-1] * len(padding)
        assert roots[b] == (max(texts[-1], 0) if texts else 930 + b)
    return counts


@pytest.mark.parametrize("way", ["ref", "triton"])
@pytest.mark.parametrize("num_nodes", [1, 2, 7, 60, 63, 111, 256])
def test_random_trees(num_nodes, way, device, monkeypatch):
    """Three tokens only, so that walks go deep; siblings may share a token: the first of them is taken."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    generator = random.Random(num_nodes)
    for max_path in (1, 4, 18):
        tokens = [[generator.randrange(3) for _ in range(num_nodes)] for _ in range(3)]
        parents = [[-1] + [generator.randrange(max(0, i - 6), i) for i in range(1, num_nodes)] for _ in range(3)]
        chosen = [[generator.choice((0, 1, 2, 2**40, -1)) for _ in range(num_nodes)] for _ in range(3)]
        check(tokens, parents, chosen, [99, 0, 3], max_path, device)


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_full_acceptance_and_dead_ends(way, device, monkeypatch):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    chain = list(range(-1, 11))
    tokens = [list(range(100, 112))] * 6
    after = list(range(101, 113))
    wrong, unknown = [0, *after[1:]], [*after[:3], -1, *after[4:]]
    counts = check(
        tokens, [chain] * 6, [after, wrong, unknown, after, [-1] * 12, after], [99, 12, 12, -5, 4, 3], 12, device
    )
    assert counts == [12, 1, 4, 0, 1, 3]


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_root_is_nobodys_child_and_minus_one_matches_nothing(way, device, monkeypatch):
    """Padding nodes may carry token -1 and any parent; the root's own token and parent never take part."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    counts = check([[5, -1, 5]], [[-1, 0, 1]], [[-1, 5, 5]], [4], 4, device)
    counts += check([[5, 6, 5]], [[0, 0, 1]], [[5, 6, 6]], [4], 4, device)
    assert counts == [1, 1]
