"""accept walks as a Python loop does: random trees, dead ends, batches that are partly done."""

import random

import pytest
import torch
from eagle_fast_kernels.accept import accept


def walk(tokens, parents, chosen, active, max_path):
    """One sequence, lists in, (path, emitted) out."""
    if not active:
        return [], []
    path = [0]
    while len(path) < max_path:
        child = [c for c, p in enumerate(parents) if p == path[-1] and c > 0 and tokens[c] == chosen[path[-1]] >= 0]
        if not child:
            break
        path.append(child[0])
    return path, [chosen[node] for node in path]


def check(tokens, parents, chosen, active, max_path, device):
    arguments = (torch.tensor(x, device=device) for x in (tokens, parents, chosen, active))
    path, counts, emitted = (x.tolist() for x in accept(*arguments, max_path))
    for b in range(len(tokens)):
        nodes, texts = walk(tokens[b], parents[b], chosen[b], active[b], max_path)
        padding = [0] * (max_path - len(nodes))
        assert path[b] == nodes + padding
        assert emitted[b] == texts + padding
        assert counts[b] == len(nodes)
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
        check(tokens, parents, chosen, [True, False, True], max_path, device)


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_full_acceptance_and_dead_ends(way, device, monkeypatch):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    chain = list(range(-1, 11))
    tokens = [list(range(100, 112))] * 5
    after = list(range(101, 113))
    wrong, unknown = [0, *after[1:]], [*after[:3], -1, *after[4:]]
    counts = check(
        tokens, [chain] * 5, [after, wrong, unknown, after, [-1] * 12], [True, True, True, False, True], 12, device
    )
    assert counts == [12, 1, 4, 0, 1]


@pytest.mark.parametrize("way", ["ref", "triton"])
def test_root_is_nobodys_child_and_minus_one_matches_nothing(way, device, monkeypatch):
    """Padding nodes may carry token -1 and any parent; the root's own token and parent never take part."""
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    counts = check([[5, -1, 5]], [[-1, 0, 1]], [[-1, 5, 5]], [True], 4, device)
    counts += check([[5, 6, 5]], [[0, 0, 1]], [[5, 6, 6]], [True], 4, device)
    assert counts == [1, 1]
