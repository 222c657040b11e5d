"""What the wrappers say of arguments that do not fit, and what they let pass."""

import pytest
import torch
from eagle_fast_kernels import check
from eagle_fast_kernels.accept import accept
from eagle_fast_kernels.draft_head import rope_append
from eagle_fast_kernels.grow import finish_tree, grow
from eagle_fast_kernels.launch import use_triton
from eagle_fast_kernels.linear import few_rows_matmul, gated_matmul
from eagle_fast_kernels.lm_head_topk import lm_head_topk, lm_head_topk_ref
from eagle_fast_kernels.rms_norm import add_rms_norm, rms_norm
from eagle_fast_kernels.silu_mul import silu_mul
from eagle_fast_kernels.soft_cross_entropy import soft_cross_entropy


@pytest.fixture
def way(request, monkeypatch):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", request.param)


IN_BOTH_WAYS = pytest.mark.parametrize("way", ["ref", "triton"], indirect=True)


def refused(*words):
    """All of them are in the message."""
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.mark.usefixtures("way")
@IN_BOTH_WAYS
def test_both_sides_are_shown(device):
    x, weight = torch.randn(4, 128, device=device), torch.randn(128, device=device)
    with refused(
        r"weight is float32 \[64\], strides \[2\]",
        r"expected contiguous .*\[H\] = \[128\]",
        r"to fit residual: float32",
    ):
        add_rms_norm(x, x, weight[::2])
    with refused(r"weight is float32 \[128\], strides \[2\]"):
        rms_norm(x, weight.repeat(2)[::2])
    with refused(r"weight is float32 \[0\]"):
        add_rms_norm(x, x, weight[:0])
    with refused(r"gate_up has rows of 9"):
        silu_mul(x[:, :9])
    with refused(r"weight is None \(NoneType\)"):
        add_rms_norm(x, x, None)
    with refused(r"weight is float32 \[2, 128\]", r"\[G, H\] = \[4, 128\]"):
        rms_norm(x, torch.stack([weight, weight]))
    with refused(r"round_once is 1 \(int\)"):
        rms_norm(x, weight, round_once=1)
    with refused("eps is nan"):
        rms_norm(x, weight, float("nan"))
    with refused(r"residual: float32 \[4, 128\], contiguous, on meta", "x is float32"):
        add_rms_norm(x, x.to("meta"), weight)


def beam(device, level=1, k=2):
    rows = k if level else 1
    integers = torch.zeros(1, rows, k, dtype=torch.long, device=device)
    out = [torch.zeros(1, 7, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64, torch.int64)]
    return [integers.float(), integers, integers[..., 0].float(), integers[..., 0].clone(), integers[..., :1] + 1], out


@pytest.mark.usefixtures("way")
@IN_BOTH_WAYS
def test_a_level_that_would_write_elsewhere(device):
    inputs, out = beam(device)
    with refused("level is -1"):
        grow(*inputs, -1, *out)
    with refused("level=2", r"C = 7", "up to 10"):
        grow(*inputs, 2, *out)
    with refused("topk_scores has P = 2", "level=0"):
        grow(*inputs, 0, *out)
    with refused(r"out_tokens is int64 \[1, 6\]", r"\[B, C\] = \[1, 7\]"):
        grow(*inputs, 1, out[0], out[1][:, :6].contiguous(), out[2])
    scores, parents = torch.zeros(1, 6, device=device), torch.zeros(1, 6, dtype=torch.bool, device=device)
    with refused(r"parents is bool \[1, 6\]", "int64"):
        finish_tree(scores, parents.long(), parents, parents[:, 0].long(), 4)


@pytest.mark.usefixtures("way")
@IN_BOTH_WAYS
def test_what_is_written_lies_apart(device):
    """Keys and values may lie in each other's gaps, as those of a cache of pairs do; they may not share a number."""
    tables, slots = torch.rand(9, 4, device=device), torch.tensor([1], device=device)
    qkv = torch.randn(1, 2, 16, device=device)
    pairs = torch.zeros(1, 1, 6, 2, 4, device=device)
    rope_append(qkv, None, tables, tables, pairs[..., 0, :], pairs[..., 1, :], slots, 2, 1)
    assert pairs[0, 0, 1:3].ne(0).all()
    flat = torch.zeros(40, device=device)
    shifted = flat[:24].view(1, 1, 6, 4), flat[4:28].view(1, 1, 6, 4)
    with refused("k_slab", "v_slab", "share memory"):
        rope_append(qkv, None, tables, tables, *shifted, slots, 2, 1)
    slab = flat[:24].view(1, 1, 6, 4)
    with refused("v_slab is float32", "elements share memory"):
        rope_append(qkv, None, tables, tables, slab, slab[:, :, :1].clone().expand_as(slab), slots, 2, 1)

    nodes, one = torch.zeros(1, 3, dtype=torch.long, device=device), torch.ones(1, dtype=torch.long, device=device)
    with refused("report", "tokens", "share memory"):
        accept(nodes, nodes.clone(), nodes.clone(), one, one + 3, one.clone(), nodes)
    rows = torch.randn(3, 10, device=device)
    with refused("logits", "targets", "share memory"):
        soft_cross_entropy(rows, rows, torch.ones(3, device=device))
    halves = rows.softmax(-1)
    losses, _ = soft_cross_entropy(halves[:, :5], halves[:, 5:], torch.ones(3, device=device))
    assert losses.isfinite().all()


def test_written_in_place_under_autograd_and_in_inference_mode():
    targets, weights = torch.rand(3, 5), torch.ones(3)
    with refused("logits is a leaf that requires grad"):
        soft_cross_entropy(torch.randn(3, 5, requires_grad=True), targets, weights)
    with torch.inference_mode():
        logits = torch.randn(3, 5)
        soft_cross_entropy(logits, targets, weights)
    with refused("logits was made in inference mode"):
        soft_cross_entropy(logits, targets, weights)


@pytest.mark.usefixtures("way")
@IN_BOTH_WAYS
def test_products_take_any_strides(device):
    x, weight = torch.randn(16, 3, device=device).T, torch.randn(16, 6, device=device).T
    bias = torch.randn(12, device=device)[::2]
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(few_rows_matmul(x, weight, bias=bias).double(), expected, rtol=1e-5, atol=1e-5)
    row = gated_matmul(x[0].contiguous(), weight.contiguous(), bias=bias)
    gate, up = expected[0].chunk(2)
    torch.testing.assert_close(row.double(), torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)
    assert few_rows_matmul(x[:0], weight).shape == (0, 6)
    assert gated_matmul(x[:0], weight).shape == (0, 3)
    with refused(r"weight is int8", "scale is None"):
        few_rows_matmul(x, weight.to(torch.int8))


@pytest.mark.usefixtures("triton_kernels")
def test_draft_ids_in_32_bits(device):
    """The noise of large token ids, which overflow in the arithmetic of the twin."""
    ids = torch.arange(40, device=device) * 50_000_000
    b = torch.arange(3, device=device)
    noise = dict(gain=b + 1.0, share=b + 0.5, positions=b, seeds=b + 9, sequences=b)
    hidden, weight = torch.randn(3, 16, device=device), torch.randn(40, 16, device=device)
    for op in (lm_head_topk, lm_head_topk_ref):
        wide, narrow = (op(hidden, weight, 4, token_ids=each, **noise) for each in (ids, ids.int()))
        assert all(map(torch.equal, wide, narrow))
        assert narrow[1].dtype == torch.int64


def test_float64_and_gradients_take_the_twin(monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", "triton")
    x, weight = torch.randn(2, 8, device=device), torch.rand(8, device=device, requires_grad=True)
    assert use_triton(x)
    assert not use_triton(x, weight)
    assert not use_triton(x, weight.detach().double())
    bias = torch.zeros(6, device=device, requires_grad=True)
    few_rows_matmul(x, torch.randn(6, 8, device=device), bias=bias).sum().backward()
    assert bias.grad is not None, "an input that the weight's check did not see"
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert (rms_norm(wide, torch.ones(8, device=device)) - expected).abs().max() < 1e-14


def test_no_value_on_the_device_is_read():
    """Tensors without any: attributes are all that a check looks at."""
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    assert rms_norm(x, weight).shape == (3, 8)
    with refused("weight is float32"):
        rms_norm(x, weight[:7])


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 10**400, 2**31, torch.tensor(1)])
def test_whole_numbers(value):
    with refused("k is ", "expected a whole number from 0 to 7"):
        check.whole("k", value, 0, 7)


@pytest.mark.parametrize("value", [True, "1", None, -1, 10**400, float("nan"), float("inf"), 1j, torch.tensor(1.0)])
def test_numbers(value):
    with refused("eps is ", "expected 0 or a number from"):
        check.number("eps", value, 1e-3, or_zero=True)
