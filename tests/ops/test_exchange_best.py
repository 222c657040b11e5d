"""The best candidates of a draft vocabulary cut over ranks: twin and kernel against one device; on two GPUs both."""

import pytest
import torch
from eagle_fast_kernels import exchange, exchange_best
from eagle_fast_kernels.exchange import NOTHING, waited_for
from eagle_fast_kernels.exchange_best import MOST_K, exchange_best_ref
from eagle_fast_kernels.lm_head_topk import lm_head_topk, lm_head_topk_ref
from mailboxes import boxes
from no_gpu import run_program

VOCABULARY, WIDTH = 150, 16  # a tile of 64 and a part of one on each of two ranks


def parts_of(ranks, rows=5, k=4, seed=0, op=lm_head_topk_ref, device="cpu", weights=None):
    """((y, tokens, sums) of every rank, (scores, tokens) of one device) of a vocabulary that has tokens at odd ids.

    weights: of some rows, in place of random ones."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(device)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device)
    for row, value in (weights or {}).items():
        weight[row] = value
    ids = torch.arange(1, 2 * VOCABULARY, 2, device=device)
    found = []
    for part in torch.arange(VOCABULARY, device=device).tensor_split(ranks):
        sums = torch.full((rows, 2), float("nan"), device=device)
        best = op(hidden, weight[part], k, token_ids=ids[part], sums=sums)
        found.append((*best, sums))
    return found, op(hidden, weight, k, token_ids=ids)


def check(found, expected):
    assert torch.equal(found[1].cpu(), expected[1].cpu())
    assert torch.allclose(found[0].cpu(), expected[0].cpu(), atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_give_what_one_device_does(ranks):
    for seed in range(5):
        parts, expected = parts_of(ranks, seed=seed)
        check(exchange_best_ref(parts), expected)


def test_the_normaliser_is_that_of_the_whole_vocabulary():
    """One part has all the mass, or what overflows alone."""
    for row in (0, VOCABULARY - 1):
        parts, expected = parts_of(2, weights={row: 1e3})
        check(exchange_best_ref(parts), expected)


def test_ties_go_to_the_lower_rank_and_no_number_is_below_all():
    parts, expected = parts_of(2, k=MOST_K, weights={row: 0.0 for row in range(140)})
    check(exchange_best_ref(parts), expected)
    parts, expected = parts_of(2, weights={row: float("nan") for row in range(80)})
    check(exchange_best_ref(parts), expected)
    parts, expected = parts_of(2, weights={row: float("nan") for row in range(VOCABULARY)})
    scores, tokens = exchange_best_ref(parts)
    assert not scores.isnan().any()
    assert torch.equal(tokens, expected[1])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("k", [1, 4, MOST_K])
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
@pytest.mark.usefixtures("triton_kernels")
def test_the_kernel_of_the_last_rank_finds_the_others_words(ranks, k, monkeypatch):
    """Interpreted, one rank after the other: those before the last wait in vain, and again when all have pushed."""
    monkeypatch.setattr(exchange_best, "_check_gpu", lambda *_: None)
    cpu = torch.device("cpu")
    linked = boxes([cpu] * ranks)
    for seed in range(3):
        parts, expected = parts_of(ranks, rows=3, k=k, seed=seed, op=lm_head_topk)
        twin = exchange_best_ref(parts)
        outs = [(torch.full((3, k), float("nan")), torch.full((3, k), -1)) for _ in linked]
        for _ in range(2):
            for part, (box, candidates), out in zip(parts, linked, outs, strict=True):
                exchange_best.exchange_best(*part, box, candidates, seed % 2, out, looks=1)
                box.fault.zero_()
        assert all(waited_for(int(box.told)) == (rank, ranks - 1) for rank, (box, _) in enumerate(linked[:-1]))
        assert not linked[-1][0].told
        for box, candidates in linked:
            box.clear()
            candidates.clear()
        check(twin, expected)
        for scores, tokens in outs:
            assert torch.equal(tokens, twin[1])
            assert torch.allclose(scores, twin[0], atol=1e-6)
            assert torch.equal(scores, outs[0][0])


@pytest.mark.usefixtures("triton_kernels")
def test_sums_of_a_part_are_the_twins(device):
    hidden, weight = (torch.randn(rows, WIDTH, device=device) for rows in (5, VOCABULARY))
    sums = torch.full((5, 2), float("nan"), device=device)
    twin = torch.full_like(sums, float("nan"))
    found, expected = lm_head_topk(hidden, weight, 4, sums=sums), lm_head_topk_ref(hidden, weight, 4, sums=twin)
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert torch.allclose(sums, twin, rtol=1e-5)
    for wrong in (torch.zeros(4, 2), torch.zeros(5, 2).double(), torch.zeros(2, 5).T):
        with pytest.raises(ValueError, match="sums is"):
            lm_head_topk(hidden, weight, 4, sums=wrong.to(device))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"y": torch.zeros(5, 4).double()}, "y is float64"),
        ({"tokens": torch.zeros(5, 3, dtype=torch.long)}, "tokens is"),
        ({"sums": torch.zeros(5, 3)}, "sums is"),
        ({"turn": 2}, "turn is 2"),
        ({"out": (torch.zeros(5, 4), torch.zeros(5, 4))}, "best is float32"),
        ({"most": 4}, r"y is \[5, 4\]; expected at most \[4, 16\]"),
        ({}, "expected a GPU"),
    ],
)
def test_arguments_that_do_not_fit(changed, match):
    ((y, tokens, sums), _), _ = parts_of(2)
    given = {"y": y, "tokens": tokens, "sums": sums, "turn": 0, "out": (y.clone(), tokens.clone()), **changed}
    box, candidates = boxes([torch.device("cpu")] * 2, given.get("most", 16))[0]
    with pytest.raises(ValueError, match=match):
        exchange_best.exchange_best(
            given["y"], given["tokens"], given["sums"], box, candidates, given["turn"], given["out"]
        )


COMPILE = """
import sys, torch
from no_gpu import overlap_of, pretend, recorded

capability = int(sys.argv[1])

pretend(capability)
from eagle_fast_kernels import exchange_best, lm_head_topk
from mailboxes import boxes

compiled = recorded((exchange_best, "_best_kernel"), (lm_head_topk, "_merge_kernel"))
for module in (exchange_best, lm_head_topk):
    module.dependent_launch = lambda device: overlap_of(capability)
exchange_best._check_gpu = lambda *_: None
for ranks in (2, 4):
    for k in (1, 10, 16):
        box = boxes([torch.device("cpu")] * ranks)[1]
        y, tokens, sums = torch.zeros(5, k), torch.zeros(5, k, dtype=torch.long), torch.zeros(5, 2)
        exchange_best.exchange_best(y, tokens, sums, *box, 1, (y.clone(), tokens.clone()))
lm_head_topk.use_triton = lambda *_: True
lm_head_topk._tile_topk_kernel = {(1, 16): lambda *_, **options: None}
lm_head_topk.lm_head_topk(torch.zeros(10, 64), torch.zeros(1000, 64), 10, sums=torch.zeros(10, 2))
ptx = compiled[1].asm["ptx"]
assert "ld.volatile.global" in ptx
print("compiled", len(compiled))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_on_any_machine(capability):
    done = run_program(COMPILE, capability)
    assert done.stdout.split() == ["compiled", "7"], done.stderr[-3000:]


# -- on two GPUs -------------------------------------------------------------------------------------------------------


def run(devices, linked, parts, turn, **options):
    """(scores, tokens) of every rank."""
    given = [[each.to(device) for each in part] for part, device in zip(parts, devices, strict=True)]
    outs = [(torch.empty_like(y), torch.empty_like(tokens)) for y, tokens, _ in given]
    for each in devices:
        torch.cuda.synchronize(each)
    for part, box, out in zip(given, linked, outs, strict=True):
        exchange_best.exchange_best(*part, *box, turn, out, **options)
    for each in devices:
        torch.cuda.synchronize(each)
    return outs


def load(devices, linked, parts):
    """Run once without exchanging anything: nothing may be loaded while a rank waits."""
    run(devices, linked, parts, 0, looks=0)
    assert all((each.words == NOTHING.value).all() for _, each in linked)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("rows", [1, 10, 500])
@pytest.mark.parametrize("k", [1, 10, MOST_K])
def test_ranks_end_with_the_same_bits(two_gpus, rows, k):
    linked = boxes(two_gpus, most=512)
    load(two_gpus, linked, parts_of(2, rows, k)[0])
    for index in range(5):
        parts, expected = parts_of(2, rows, k, seed=index)
        outs = run(two_gpus, linked, parts, index % 2)
        assert torch.equal(outs[0][0].cpu(), outs[1][0].cpu())
        for out in outs:
            check(out, expected)
    assert not any(int(box.fault) or int(box.told) for box, _ in linked)


@pytest.mark.multi_gpu
def test_a_wait_runs_out_and_later_ones_fall_through(two_gpus):
    linked, (parts, _) = boxes(two_gpus), parts_of(2)
    load(two_gpus, linked, parts)
    for turn in (0, 1) * 25:  # rank 1 launches nothing
        run(two_gpus[:1], linked[:1], parts[:1], turn, looks=20_000)
    assert waited_for(int(linked[0][0].told)) == (0, 1)
    assert int(linked[0][0].fault) == 1
    assert exchange.LOOKS > 20_000
