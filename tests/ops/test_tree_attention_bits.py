"""Tree attention to the bit: a node of a tree gets what plain decoding gives the same token, whose path is prefix then.

Whatever else the launch holds: other nodes, other sequences, more cache rows, other kernels. Real shapes need a GPU;
interpreted, sums of splits are held against each other.
"""

from types import SimpleNamespace

import pytest
import torch
from eagle_fast_kernels import tree_attention as module
from eagle_fast_kernels.tree_attention import tree_attention
from eagle_fast_kernels.tree_attention_order import AHEAD, LAST, LOG2E, SPLITS, UNIT

from eagle_fast.config import MAX_DEPTH
from eagle_fast.decoding.tree import bit_masks

WIDER = SPLITS.value * UNIT.value  # positions from which to which splits get wider
FIRST_WIDER = WIDER - AHEAD.value  # position whose splits are the first of two units
CONTEXTS = [5, 63, 64, 65, 127, 1000, FIRST_WIDER - 4, 2020, 2047, FIRST_WIDER + WIDER - 4, 4095, 6100, 32000]
OPTIONS = {
    "plain": {},
    "window": {"window": 1000},
    "narrow window, sinks": {"window": 100, "sinks": True},
    "chunk": {"chunk": 1024},
    "softcap": {"softcap": 30.0},
}


def random_paths(num_nodes, deepest, seed=0):
    """The nodes from the root to each node of a tree of any shape."""
    generator = torch.Generator().manual_seed(seed)
    paths = [[0]]
    while len(paths) < num_nodes:
        parent = paths[int(torch.randint(len(paths), (), generator=generator))]
        if len(parent) < deepest:
            paths.append([*parent, len(paths)])
    return paths


class Problem:
    """Sequences with prefixes of `lengths` and one tree behind each; rows past the live ones are NaN."""

    def __init__(
        self, lengths, paths, heads=(32, 8), head_dim=128, dtype=torch.bfloat16, spare=70, sinks=False, **options
    ):
        torch.manual_seed(1)
        self.paths, self.device = paths, "cuda" if torch.cuda.is_available() else "cpu"
        rows, batch = max(lengths) + len(paths) + spare, len(lengths)
        self.k, self.v = torch.randn(2, batch, heads[1], rows, head_dim, device=self.device).to(dtype)
        q = torch.randn(batch, len(paths), heads[0], head_dim, device=self.device) * 2
        self.q, self.lengths = q.to(dtype).transpose(1, 2), lengths
        for sequence, length in enumerate(lengths):
            self.k[sequence, :, length + len(paths) :] = self.v[sequence, :, length + len(paths) :] = float("nan")
        self.options = {"scale": head_dim**-0.5, **options}
        if sinks:
            self.options["sinks"] = torch.randn(heads[0], device=self.device).to(dtype)

    def tree(self):
        """[B, T, Hq, D]."""
        batch, count = len(self.lengths), len(self.paths)
        masks = bit_masks(self.paths, count, self.device).repeat(batch, 1, 1)
        depths = torch.tensor([len(path) - 1 for path in self.paths], device=self.device).repeat(batch, 1)
        lengths = torch.tensor(self.lengths, device=self.device)
        return tree_attention(self.q, self.k, self.v, lengths, masks, depths=depths, **self.options)

    def plain(self, sequence, node, spare=0):
        """[Hq, D]: the node as the newest token behind a prefix that its path belongs to, alone in its batch."""
        length, path = self.lengths[sequence], self.paths[node]
        rows = [*range(length), *(length + each for each in path)]
        k, v = (x[sequence : sequence + 1, :, rows] for x in (self.k, self.v))
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, spare), value=float("nan")) for x in (k, v))
        one = torch.ones(1, 1, 1, dtype=torch.long, device=self.device)
        before = torch.tensor([len(rows) - 1], device=self.device)
        q = self.q[sequence : sequence + 1, :, node : node + 1]
        return tree_attention(q, k, v, before, one, depths=one[0] * 0, **self.options)[0, 0]

    def differing(self, nodes, spare=0):
        """Of the nodes, those whose bits differ in some sequence; longer paths than LAST are right up to rounding."""
        out = self.tree()
        nodes = [node for node in nodes if len(self.paths[node]) <= LAST.value]
        pairs = [(sequence, node) for sequence in range(len(self.lengths)) for node in nodes]
        return [pair for pair in pairs if not torch.equal(self.plain(*pair, spare=spare), out[pair])]


def some(count, every=9):
    return [*range(0, count, every), count - 1]


def test_the_last_keys_hold_every_path_of_decoding():
    assert LAST.value == MAX_DEPTH + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", CONTEXTS)
def test_every_context(length, dtype):
    assert not Problem([length], random_paths(60, 9), dtype=dtype).differing(some(60))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [63, 1010, 2047, 6100])
def test_every_kind_of_layer(length, name):
    assert not Problem([length], random_paths(60, 9), **OPTIONS[name]).differing(some(60))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (9, 3), (14, 2), (64, 8), (71, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_shape_of_heads(heads, head_dim):
    for length in (100, 2500):
        assert not Problem([length], random_paths(30, 9), heads, head_dim).differing(some(30))


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "deepest"), [(2, 2), (16, 5), (17, 17), (64, 64), (65, 9), (130, 40), (256, 60)])
def test_every_tree(count, deepest):
    for length in (40, 2000, 4090):
        assert not Problem([length], random_paths(count, deepest)).differing(some(count, 1 + count // 6))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4, 16, 60])
@pytest.mark.parametrize("batch", [2, 8, 32])
def test_every_batch(batch, count):
    lengths = [(977 * i + 31) % 2300 for i in range(batch)]
    assert not Problem(lengths, random_paths(count, 5)).differing([0, count - 1])


@pytest.mark.gpu
@pytest.mark.parametrize("length", [500, 2047, 5000])
def test_every_capacity(length):
    problem = Problem([length], random_paths(60, 9), spare=5000)
    for spare in (0, 1, 3000, 40000):
        assert not problem.differing([0, 30, 59], spare)


@pytest.mark.gpu
def test_paths_where_the_width_of_splits_changes():
    """Nodes before and behind such a position in one tree, by either kernel."""
    for spare in (10, 13000):
        for length in (FIRST_WIDER - 8, FIRST_WIDER + WIDER - 16, FIRST_WIDER + WIDER):
            assert not Problem([length], random_paths(60, 59), spare=spare).differing(range(60))


@pytest.mark.gpu
def test_the_comparison_can_fail(monkeypatch):
    """Blocks of another length add up in another order."""
    problem = Problem([700], random_paths(60, 9))
    expected = problem.tree()
    monkeypatch.setattr(module, "_tile", lambda *a, tile=module._tile: tile(*a)._replace(block_n=32))
    assert not torch.equal(problem.tree(), expected)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("length", [0, 100, 300, FIRST_WIDER - 3, FIRST_WIDER + 2, FIRST_WIDER + 16])
@pytest.mark.parametrize("options", [{}, {"window": 200}], ids=str)
def test_one_program_for_all_splits_gives_the_bits_of_one_for_each(length, options, monkeypatch):
    problem = Problem([length], random_paths(9, 5), (2, 1), 16, torch.float32, **options)
    outs = []
    for fold in (True, False):
        monkeypatch.setattr(module, "_tile", lambda *a, tile=module._tile, fold=fold: tile(*a)._replace(fold=fold))
        outs.append(problem.tree())
        monkeypatch.undo()
        monkeypatch.setenv("EAGLE_FAST_KERNELS", "triton")
    assert torch.equal(*outs)
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "ref")
    torch.testing.assert_close(outs[0], problem.tree(), atol=5e-6, rtol=1e-5)


def whole_blocks_of_splits(q, k, v, lengths, ancestors, acc, peak, total, *, scale, first, **_):
    """What `tree_attention_hopper.attend` leaves, in plain PyTorch."""
    block, groups = 64, q.shape[1] // k.shape[1]
    for sequence, length in enumerate(lengths.tolist()):
        seen = max(length + 1 - LAST.value, 0) // block * block
        for node, words in enumerate(ancestors[sequence]):
            position = length + sum(int(word).bit_count() for word in words) - 1
            width = (position + AHEAD.value + WIDER) // WIDER * UNIT.value
            for head in range(q.shape[1]):
                group, row = sequence * k.shape[1] + head // groups, node * groups + head % groups
                for slot, begin in enumerate(range(0, seen, width)):
                    keys = slice(begin, min(begin + width, seen))
                    logits = k[sequence, head // groups, keys] @ q[sequence, head, node] * scale * LOG2E.value
                    weights = (logits - logits.max()).exp2()
                    peak[group, slot, row], total[group, slot, row] = logits.max(), weights.sum()
                    acc[group, slot, row] = weights @ v[sequence, head // groups, keys]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("length", [0, 17, 300, FIRST_WIDER - 3])
def test_the_first_kernel_goes_on_where_the_one_for_long_caches_ends(length, monkeypatch):
    problem = Problem([length, 40], random_paths(9, 5), (2, 1), 16, torch.float32, spare=2000)
    expected = problem.tree()
    monkeypatch.setattr(module, "_by_hopper", lambda *a: True)
    monkeypatch.setattr(module, "hopper", SimpleNamespace(attend=whole_blocks_of_splits), raising=False)
    torch.testing.assert_close(problem.tree(), expected, atol=5e-6, rtol=1e-5)
