"""Beam step and final tree, against a tree built node by node in Python from the description in the EAGLE-2 paper."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from eagle_fast_kernels.grow import finish_tree, finish_tree_ref, grow, grow_ref


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Node(NamedTuple):
    token: int
    score: np.float32
    path: tuple[int, ...]  # child ranks from the root down: the node's identity


class Draft:
    """A made-up draft head: the k best (log-probability, token) after a path, the same whenever it is asked.

    `step` > 0 rounds log-probabilities to multiples of it, so that many cumulative scores tie exactly.
    """

    def __init__(self, k, seed, step=0.0):
        self.k, self.seed, self.step, self.cache = k, seed, step, {}

    def __call__(self, path):
        if path not in self.cache:
            generator = np.random.default_rng([self.seed, *path])
            scores = -np.sort(generator.gamma(1.0, 2.0, self.k)).astype(np.float32)
            if self.step:
                scores = (np.floor(scores / self.step) * self.step).astype(np.float32)
            self.cache[path] = scores, generator.integers(0, 32000, self.k)
        return self.cache[path]


def children(draft, node):
    scores, tokens = draft(node.path)
    return [Node(int(tokens[j]), np.float32(node.score + scores[j]), (*node.path, j)) for j in range(draft.k)]


def paper_tree(draft, root, depth, num_nodes):
    """(the chosen nodes in order of creation, the beams).

    Expansion: the children of the root; then `depth` times the children of the layer's k best nodes by the value of
    their path. Reranking: the num_nodes - 1 best of all, shallower nodes first on ties.
    """
    layer = children(draft, Node(root, np.float32(0), ()))
    everything, beams = list(layer), [layer]
    for _ in range(depth):
        layer = [child for node in beams[-1] for child in children(draft, node)]
        everything += layer
        beams.append(sorted(layer, key=lambda node: -node.score)[: draft.k])  # sorted is stable
    best = sorted(range(len(everything)), key=lambda i: (-everything[i].score, len(everything[i].path), i))
    return [everything[i] for i in sorted(best[: num_nodes - 1])], beams


class Grown(NamedTuple):
    scores: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor


def start(drafts, depth, num_words, device):
    """Poisoned candidate buffers, and the root as a beam."""
    k, num_sequences = drafts[0].k, len(drafts)
    num_candidates = k + depth * k * k
    scores = torch.full((num_sequences, num_candidates), float("nan"), device=device)
    tokens = torch.full((num_sequences, num_candidates), -12345, dtype=torch.int64, device=device)
    root = torch.full((num_sequences, 1), -1, device=device)
    ancestors = torch.zeros(num_sequences, 1, num_words, dtype=torch.int64, device=device)
    return Grown(scores, tokens, torch.full_like(tokens, -12345)), (root + 1.0, root, ancestors)


def bits(words):
    """The set bits of a row of mask words."""
    return {64 * w + i for w, word in enumerate(words) for i in range(64) if word >> i & 1}


def build(drafts, depth, device, op=grow):
    """Runs `op` level by level, asking the drafts for the beam's paths, and checks every beam against the paper's."""
    k = drafts[0].k
    out, (scores, candidates, ancestors) = start(drafts, depth, -(-(depth + 1) * k // 64), device)
    beams = [paper_tree(draft, 0, depth, 1)[1] for draft in drafts]
    paths: list[list[tuple]] = [[()] for _ in drafts]
    slot_of_path: list[dict] = [{} for _ in drafts]
    for level in range(depth + 1):
        asked = [[draft(path) for path in p] for draft, p in zip(drafts, paths, strict=True)]
        topk_scores = torch.tensor(np.array([[s for s, _ in a] for a in asked]), device=device)
        topk_tokens = torch.tensor(np.array([[t for _, t in a] for a in asked]), device=device)
        beam = op(topk_scores, topk_tokens, scores, candidates, ancestors, level, *out)
        tokens, scores, candidates, rows, ancestors = beam
        for b in range(len(drafts)):
            expected = beams[b][level]
            index = (candidates[b] - (k + (level - 1) * k * k if level else 0)).tolist()
            assert [b * (k if level else 1) + i // k for i in index] == rows[b].tolist()
            assert [(*paths[b][i // k], i % k) for i in index] == [node.path for node in expected]
            assert tokens[b].tolist() == [node.token for node in expected]
            assert scores[b].tolist() == [float(node.score) for node in expected]
            paths[b] = [node.path for node in expected]
            slot_of_path[b] |= {path: level * k + r for r, path in enumerate(paths[b])}
            for r, path in enumerate(paths[b]):
                above = {slot_of_path[b][path[:n]] for n in range(1, len(path) + 1)}
                assert bits(ancestors[b, r].tolist()) == above
    assert not out.scores.isnan().any()
    return out


def check_tree(result, expected, roots):
    """`expected`: per sequence, the chosen nodes in order."""
    tokens, parents, depths, ancestors = (x.cpu() for x in result)
    for b, nodes in enumerate(expected):
        node_of = {(): 0} | {node.path: i + 1 for i, node in enumerate(nodes)}
        assert tokens[b].tolist() == [roots[b], *(node.token for node in nodes)]
        assert parents[b].tolist() == [-1, *(node_of[node.path[:-1]] for node in nodes)]
        assert depths[b].tolist() == [0, *(len(node.path) for node in nodes)]
        for path, i in node_of.items():
            assert bits(ancestors[b, i].tolist()) == {node_of[path[:n]] for n in range(len(path) + 1)}


def check_case(k, depth, sizes, step, device, num_sequences=2):
    drafts = [Draft(k, seed, step) for seed in range(num_sequences)]
    roots = [70000 + b for b in range(num_sequences)]
    out = build(drafts, depth, device)
    for num_nodes in sizes:
        result = finish_tree(*out, torch.tensor(roots, device=device), num_nodes)
        assert result[3].shape == (num_sequences, num_nodes, -(-num_nodes // 64))
        check_tree(result, [paper_tree(d, r, depth, num_nodes)[0] for d, r in zip(drafts, roots, strict=True)], roots)


# k, depth, tree sizes: a chain, odd small trees, all candidates, the paper's 60/7/10, the word borders, the largest.
CASES = [
    (1, 5, [1, 2, 6]),
    (2, 3, [1, 5, 15]),
    (3, 1, [2, 4, 13]),
    (5, 4, [17, 106]),
    (10, 7, [60, 63, 64, 65, 111, 256]),
    (16, 16, [256]),
]


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize(("k", "depth", "sizes"), CASES)
def test_against_the_paper(k, depth, sizes, step, device):
    check_case(k, depth, sizes, step, device)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("k", "depth", "sizes", "step"),
    [(1, 3, [1, 4], 0.0), (2, 3, [5, 15], 0.5), (5, 4, [17, 106], 0.5), (10, 7, [60, 64, 65, 256], 0.5)],
)
def test_kernel_against_the_paper(k, depth, sizes, step, device):
    check_case(k, depth, sizes, step, device)


@pytest.mark.usefixtures("triton_kernels")
def test_kernel_at_the_largest_candidate_count(device):
    """k 16, depth 16: 4,112 candidates, 272 slots in five mask words."""
    check_case(16, 16, [256], 0.25, device, num_sequences=1)


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_nan_counts_as_minus_infinity(use_kernel, device, request):
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    nan, inf = float("nan"), float("inf")
    out = [torch.zeros(1, 6, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64, torch.int64)]
    beam_scores = torch.tensor([[-1.0, -2.0]], device=device)
    topk_scores = torch.tensor([[[nan, -5.0], [-inf, -0.5]]], device=device)
    topk_tokens = torch.tensor([[[11, 12], [13, 14]]], device=device)
    candidates = torch.tensor([[0, 1]], device=device)
    ancestors = torch.tensor([[[1], [2]]], device=device)
    tokens, scores, chosen, rows, masks = grow(topk_scores, topk_tokens, beam_scores, candidates, ancestors, 1, *out)
    assert tokens.tolist() == [[14, 12]]
    assert scores.tolist() == [[-2.5, -6.0]]
    assert chosen.tolist() == [[5, 3]]
    assert rows.tolist() == [[1, 0]]
    assert masks.tolist() == [[[0b110], [0b1001]]]
    assert out[0][0, 2:].tolist() == [-inf, -6.0, -inf, -2.5]

    scores = torch.tensor([[-1.0, nan, -2.0, -inf, nan, -3.0]], device=device)
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]], device=device)
    tokens = torch.arange(6, device=device)[None]
    roots = torch.tensor([99], device=device)
    for num_nodes, expected in [(4, [99, 0, 2, 5]), (5, [99, 0, 1, 2, 5]), (6, [99, 0, 1, 2, 3, 5])]:
        assert finish_tree(scores, tokens, parents, roots, num_nodes)[0][0].tolist() == expected


@pytest.mark.parametrize("use_kernel", [False, True], ids=["ref", "kernel"])
def test_all_scores_equal(use_kernel, device, request):
    """Nothing but ties: the tree is the first candidates, whatever infinity they share."""
    if use_kernel:
        request.getfixturevalue("triton_kernels")
    parents = torch.tensor([[-1, -1, -1, 0, 0, 1, 1, 2, 2]], device=device).repeat(3, 1)
    tokens = torch.arange(27, device=device).view(3, 9)
    scores = torch.tensor([[0.0], [float("-inf")], [-7.5]], device=device).repeat(1, 9)
    result = finish_tree(scores, tokens, parents, torch.tensor([50, 51, 52], device=device), 7)
    for b in range(3):
        assert result[0][b].tolist() == [50 + b, *range(9 * b, 9 * b + 6)]
        assert result[1][b].tolist() == [-1, 0, 0, 0, 1, 1, 2]
        assert result[2][b].tolist() == [0, 1, 1, 1, 2, 2, 2]
        assert result[3][b].flatten().tolist() == [0b1, 0b11, 0b101, 0b1001, 0b10011, 0b100011, 0b1000101]


@pytest.mark.gpu
@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize(("k", "depth", "num_nodes"), [(10, 7, 60), (10, 7, 256), (16, 16, 256), (8, 5, 64)])
def test_at_size(k, depth, num_nodes, num_sequences, device):
    """Kernel and twin agree exactly, again and again: within a program, stores must reach the loads after them."""
    drafts = [Draft(k, seed, 0.25) for seed in range(num_sequences)]
    out = build(drafts, depth, device)
    for mine, theirs in zip(out, build(drafts, depth, device, grow_ref), strict=True):
        assert torch.equal(mine, theirs)
    roots = torch.arange(num_sequences, device=device)
    expected = finish_tree_ref(*out, roots, num_nodes)
    for _ in range(50):
        for mine, theirs in zip(finish_tree(*out, roots, num_nodes), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_steps_in_a_graph(device):
    """One captured beam step and final tree: nothing in them asks the host."""
    drafts = [Draft(10, seed) for seed in range(2)]
    out, root = start(drafts, 1, 1, device)
    topk_scores = -torch.rand(2, 10, 10, device=device).sort(-1).values
    topk_tokens = torch.randint(0, 1000, (2, 10, 10), device=device)
    _, scores, candidates, _, ancestors = grow(
        *(x[:, :1].contiguous() for x in (topk_scores, topk_tokens)), *root, 0, *out
    )
    roots = torch.tensor([3, 4], device=device)

    def step(grow_op, finish_op):
        beam = grow_op(topk_scores, topk_tokens, scores, candidates, ancestors, 1, *out)
        return [*beam, *finish_op(*out, roots, 60)]

    step(grow, finish_tree)
    for ops in ((grow, finish_tree), (grow_ref, finish_tree_ref)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            captured = step(*ops)
        topk_scores.copy_(-torch.rand(2, 10, 10, device=device).sort(-1).values)
        graph.replay()
        captured = [x.clone() for x in captured]
        for mine, theirs in zip(captured, step(grow_ref, finish_tree_ref), strict=True):
            assert torch.equal(mine, theirs)
