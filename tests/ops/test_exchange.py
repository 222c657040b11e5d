"""Sums over ranks inside residual and norm: the twin on a CPU, the kernel compiled; on two GPUs both, bit for bit."""

import pytest
import torch
from eagle_fast_kernels.exchange import (
    MOST_FUSED,
    NOTHING,
    await_pushes,
    exchange_add_rms_norm,
    exchange_add_rms_norm_ref,
    push,
    waited_for,
    waiting,
)
from eagle_fast_kernels.rms_norm import add_rms_norm_ref
from mailboxes import mailboxes
from no_gpu import run_program

EPS = 1e-5


def case(ranks=2, parts=3, rows=5, width=64, dtype=torch.bfloat16, seed=0):
    """(products of every rank, residual, weight)"""
    generator = torch.Generator().manual_seed(seed)
    shape = (parts, rows, width) if parts else (rows, width)
    products = [torch.randn(shape, generator=generator) for _ in range(ranks)]
    products = [each if parts else each.to(dtype) for each in products]
    residual, weight = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, width), (width,)))
    return products, residual, weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_one_rank_is_the_single_gpu_path(parts, dtype):
    (product,), residual, weight = case(1, parts, dtype=dtype)
    found, expected = (
        exchange_add_rms_norm_ref([product], residual, weight, EPS),
        add_rms_norm_ref(product, residual, weight, EPS),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sums_are_rounded_once_and_in_rank_order():
    """Rounded to bf16 after each rank, the small ones would vanish; together they count."""
    one, small = torch.ones(1, 1, 8), torch.full((1, 1, 8), 2.0**-9)
    residual, weight = torch.zeros(1, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    _, total = exchange_add_rms_norm_ref([one, 2 * small, small], residual, weight, EPS)
    assert total.unique().tolist() == [1 + 2.0**-7]
    big = torch.full((1, 1, 8), 2.0**24)
    assert not torch.equal(
        exchange_add_rms_norm_ref([big, -big, one], residual, weight, EPS)[1],
        exchange_add_rms_norm_ref([one, big, -big], residual, weight, EPS)[1],
    )


def test_rows_do_not_depend_on_how_many_there_are():
    products, residual, weight = case(rows=7)
    whole = exchange_add_rms_norm_ref(products, residual, weight, EPS)
    for row in range(7):
        alone = exchange_add_rms_norm_ref(
            [each[:, row : row + 1] for each in products], residual[row : row + 1], weight, EPS
        )
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, whole, strict=True))


def test_a_cpu_has_no_peer():
    (product, _), residual, weight = case()
    box = mailboxes([torch.device("cpu")] * 2, 64)[0]
    with pytest.raises(ValueError, match="expected a GPU"):
        exchange_add_rms_norm(product, residual, weight, EPS, box, 0, (residual.clone(), residual.clone()))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"product": torch.zeros(3, 4, 64)}, "x is .*expected .*5, 64"),
        ({"product": torch.zeros(5, 64)}, "x is float32"),
        ({"weight": torch.zeros(63, dtype=torch.bfloat16)}, "weight is"),
        ({"turn": 2}, "turn is 2"),
        ({"eps": float("nan")}, "eps is"),
        ({"out": (torch.zeros(5, 64), torch.zeros(5, 64))}, "normed is"),
    ],
)
def test_arguments_that_do_not_fit(changed, match):
    (product, _), residual, weight = case()
    given = {"product": product, "weight": weight, "turn": 0, "eps": EPS, "out": (residual, residual), **changed}
    box = mailboxes([torch.device("cpu")] * 2, 64)[0]
    with pytest.raises(ValueError, match=match):
        exchange_add_rms_norm(
            given["product"], residual, given["weight"], given["eps"], box, given["turn"], given["out"]
        )


def test_who_waited_for_whom():
    assert [waited_for(waiting(*pair)) for pair in ((0, 1), (1, 0), (7, 3))] == [(0, 1), (1, 0), (7, 3)]
    assert waiting(0, 0) != 0


COMPILE = """
import sys, torch
from no_gpu import overlap_of, pretend, recorded

capability = int(sys.argv[1])

pretend(capability)
from eagle_fast_kernels import exchange
from mailboxes import mailboxes
from test_exchange import case

compiled = recorded(*((exchange, name) for name in ("_exchange_kernel", "_push_kernel", "_await_kernel")))
exchange.dependent_launch = lambda device: overlap_of(capability)
exchange._check = lambda x, residual, *_: (*residual.shape, x if x.dim() == 3 else x[None])
for ranks in (2, 4):
    for parts, rows, dtype in ((0, 5, torch.float16), (2, 60, torch.bfloat16), (0, 300, torch.float32)):
        products, residual, weight = case(ranks, parts, rows, 4096, dtype)
        box = mailboxes([torch.device("cpu")] * ranks, 4096)[1]
        out = residual.clone(), residual.clone()
        exchange.exchange_add_rms_norm(products[1], residual, weight, 1e-5, box, 1, out)
exchange.push(residual[:, :4000].contiguous(), out[0][:, 96:], box.told)
exchange.await_pushes(box.told, box.told.clone(), 64, box, 1)
ptx = compiled[0].asm["ptx"]
assert "st.global.v4" in ptx and "ld.volatile.global.v4" in ptx, "rows go and come four numbers at a time"
if capability >= 90:
    before, after = ptx.split("griddepcontrol.wait")
    assert "ld.global" in before and "st.global" not in before, "weights alone are read early"
ptx = "".join(each.asm["ptx"] for each in compiled[-2:])
assert "release" in ptx and "acquire" in ptx and ".sys" in ptx
print("compiled", len(compiled))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_on_any_machine(capability):
    done = run_program(COMPILE, capability)
    assert done.stdout.split() == ["compiled", "10"], done.stderr[-3000:]  # 300 rows take two launches


# -- on two GPUs -------------------------------------------------------------------------------------------------------


def exchanged(devices, boxes, case_, turn, **options):
    """(normed, total) of every rank."""
    products, residual, weight = case_
    given = [
        [each.to(device) for each in (product, residual, weight)]
        for product, device in zip(products, devices, strict=True)
    ]
    outs = [(torch.empty_like(each[1]), torch.empty_like(each[1])) for each in given]
    for each in devices:
        torch.cuda.synchronize(each)
    for (x, rest, scale), box, out in zip(given, boxes, outs, strict=True):
        exchange_add_rms_norm(x, rest, scale, EPS, box, turn, out, **options)
    for each in devices:
        torch.cuda.synchronize(each)
    return outs


def load(devices, boxes, case_):
    """Run once without exchanging anything: nothing may be loaded while a rank waits."""
    exchanged(devices, boxes, case_, 0, looks=0)
    assert all((each.rows == NOTHING.value).all() for each in boxes)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 60, MOST_FUSED + 1, 500])
@pytest.mark.parametrize("parts", [0, 2])
def test_ranks_end_with_the_twins_bits(two_gpus, rows, parts, dtype):
    boxes = mailboxes(two_gpus, 4096, most=512)
    load(two_gpus, boxes, case(2, parts, rows, 4096, dtype))
    for index in range(5):
        given = case(2, parts, rows, 4096, dtype, seed=index)
        outs = exchanged(two_gpus, boxes, given, index % 2)
        expected = exchange_add_rms_norm_ref(
            [each.to(two_gpus[0]) for each in given[0]], *(x.to(two_gpus[0]) for x in given[1:]), EPS
        )
        for normed, total in outs:
            assert torch.equal(total.cpu(), expected[1].cpu())
            assert torch.allclose(normed.cpu().float(), expected[0].cpu().float(), rtol=1e-2, atol=1e-2)
        assert torch.equal(outs[0][0].cpu(), outs[1][0].cpu()), "ranks agree to the bit"
    assert not any(int(box.fault) or int(box.told) for box in boxes)


@pytest.mark.multi_gpu
def test_a_sum_with_the_bits_of_nothing_arrives_as_no_number(two_gpus):
    boxes = mailboxes(two_gpus, 4096)
    products, residual, weight = case(2, 2, 5, 4096)
    products[0].view(torch.int32)[:, 2, 7] = NOTHING.value
    load(two_gpus, boxes, (products, residual, weight))
    for normed, total in exchanged(two_gpus, boxes, (products, residual, weight), 0):
        assert total[2, 7].isnan()
        assert normed[2].isnan().all()
        assert not total.flatten()[torch.arange(5 * 4096) != 2 * 4096 + 7].isnan().any()
    assert not any(int(box.fault) or int(box.told) for box in boxes)


@pytest.mark.multi_gpu
def test_a_wait_runs_out_and_later_ones_fall_through(two_gpus):
    boxes = mailboxes(two_gpus, 4096)
    given = case(2, 2, 5, 4096)
    load(two_gpus, boxes, given)
    x, rest, scale = (each.to(two_gpus[0]) for each in (given[0][0], *given[1:]))
    for turn in (0, 1) * 25:  # rank 1 launches nothing
        exchange_add_rms_norm(x, rest, scale, EPS, boxes[0], turn, (rest.clone(), rest.clone()), looks=20_000)
    torch.cuda.synchronize(two_gpus[0])
    assert waited_for(int(boxes[0].told)) == (0, 1)
    assert int(boxes[0].fault) == 1


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.long, torch.bfloat16])
def test_pushes_arrive(two_gpus, dtype):
    boxes = mailboxes(two_gpus, 64)
    arrived, expected = (torch.zeros(1, dtype=torch.long, device=two_gpus[0]) for _ in range(2))
    for columns in (1, 97, 4096, 64128):
        x = torch.randint(0, 100, (7, columns), device=two_gpus[1]).to(dtype)
        there = torch.zeros(7, columns + 3, device=two_gpus[0], dtype=dtype)
        torch.cuda.synchronize(two_gpus[0])
        count = push(x, there[:, 3:], arrived)
        await_pushes(arrived, expected, count, boxes[0], 1)
        assert torch.equal(there[:, 3:].cpu(), x.cpu())
        assert not there[:, :3].any()
