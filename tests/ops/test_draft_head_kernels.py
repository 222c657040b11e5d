"""The fused pieces of a draft head against formulas in fp64, transformers' own modules, and their gradients."""

import pytest
import torch
from eagle_fast_kernels import draft_head
from eagle_fast_kernels.launch import Resources
from eagle_fast_kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm_ref
from eagle_fast_kernels.silu_mul import silu_mul, silu_mul_ref
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rope_of_cohere
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rope_of_llama

WAYS = pytest.mark.parametrize("way", ["ref", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
EPS = 1e-5


@pytest.fixture
def use(monkeypatch):
    """Which of the twins runs."""
    return lambda way: monkeypatch.setenv("EAGLE_FAST_KERNELS", way)


def close(actual, expected, ulps=1.0):
    """Within some units in the last place; bf16 gets one more, since the interpreter truncates where a GPU rounds."""
    eps = torch.finfo(actual.dtype).eps * (2 if actual.dtype == torch.bfloat16 else 1)
    if actual.dtype == torch.float32:
        eps *= 8  # reductions
    torch.testing.assert_close(actual.double(), expected.double(), atol=ulps * eps, rtol=ulps * eps)


def rms(x, weight):
    """RMSNorm in fp64; weights of a half-precision norm meet the rounded rows, as in transformers."""
    if weight is None:
        return x.double()
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return normed.to(x.dtype).double() * weight.double()


def table(num_positions, size, interleaved, device="cpu", theta=10000.0):
    """cos and sin [P, size] laid out as the rotary modules of transformers do."""
    angles = torch.arange(num_positions).outer(theta ** (-torch.arange(0, size, 2) / size))
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x, positions, size, interleaved):
    """Complex rotation in fp64 of x [B, T, heads, D], the first `size` dimensions."""
    x = x.double().clone()
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size)
    angle = positions[..., None, None] * frequency
    turn = torch.complex(angle.cos(), angle.sin())
    real, imag = (slice(0, size, 2), slice(1, size, 2)) if interleaved else (slice(size // 2), slice(size // 2, size))
    turned = torch.complex(x[..., real], x[..., imag]) * turn
    x[..., real], x[..., imag] = turned.real, turned.imag
    return x


@WAYS
@DTYPES
@pytest.mark.parametrize("norms", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("sizes", [(48, 111), (96, 96)], ids=str)
def test_head_input(sizes, norms, dtype, way, use, device):
    use(way)
    embed_size, hidden_size = sizes
    embedding = torch.randn(9, embed_size, device=device).to(dtype)
    embedding[5:] = float("nan")
    features = torch.randn(3, 3 * hidden_size, device=device).to(dtype)
    hidden = features[:, hidden_size : 2 * hidden_size]  # a feature among others
    tokens = torch.tensor([4, 0, -1], device=device)
    weights = [
        torch.randn(n, device=device).to(dtype) if given else None for n, given in zip(sizes, norms, strict=True)
    ]
    for rows in (None, torch.tensor([2, 0, 2], device=device)):
        out, taken = draft_head.head_input(tokens, hidden, embedding, *weights, eps=EPS, rows=rows)
        assert out.dtype == dtype
        assert torch.equal(taken, hidden if rows is None else hidden[rows])
        close(out[:, :embed_size], rms(embedding[[4, 0, 0]], weights[0]), 2)
        close(out[:, embed_size:], rms(taken, weights[1]), 2)


# (heads, D, rotary size, with q and k norms, interleaved, dtype); bfloat16 is slow in the interpreter: few heads
ROPE = {
    "mha": ((4, 4), 16, 16, False, False, torch.float32),
    "gqa 3, norms": ((6, 2), 24, 24, True, False, torch.float32),
    "gqa 8, norms, interleaved, partly rotary": ((8, 1), 80, 32, True, True, torch.float32),
    "gqa 4, fp16, partly rotary": ((4, 1), 32, 16, False, False, torch.float16),
    "gqa 3, fp16, norms, interleaved": ((3, 1), 24, 24, True, True, torch.float16),
    "bf16, norms": ((2, 1), 16, 16, True, False, torch.bfloat16),
}


@WAYS
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim", "normed", "interleaved", "dtype"), ROPE.values(), ids=ROPE.keys()
)
def test_rope_append(heads, head_dim, rotary_dim, normed, interleaved, dtype, way, use, device):
    use(way)
    num_heads, num_kv_heads = heads
    wide = torch.randn(2, 4, (num_heads + 2 * num_kv_heads) * head_dim + 8, device=device).to(dtype)
    qkv = wide[:, 1:, :-8]
    positions = torch.tensor([[0, 5, 6], [29, 29, 30]], device=device)
    norms = [torch.rand(head_dim, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)]
    slab = torch.full((3, 2, 2, num_kv_heads, 12, head_dim), float("nan"), device=device, dtype=dtype)
    slots = torch.tensor([9, 2], device=device)
    q = draft_head.rope_append(
        qkv, positions, *table(31, rotary_dim, interleaved, device), slab[1, 0], slab[1, 1], slots, *heads,
        q_norm=norms[0], k_norm=norms[1], eps=EPS, interleaved=interleaved,
    )  # fmt: skip
    rows = qkv.unflatten(2, (-1, head_dim))
    queries, keys, values = rows.split((num_heads, num_kv_heads, num_kv_heads), 2)
    queries, keys = (rms(x, w).to(dtype) for x, w in zip((queries, keys), norms, strict=True))
    assert q.shape == (2, num_heads, 3, head_dim)
    assert q.transpose(1, 2).is_contiguous()
    close(q.transpose(1, 2), rotate(queries, positions, rotary_dim, interleaved), 4)
    for b, slot in enumerate((9, 2)):
        written = slab[1, :, b, :, slot : slot + 3].transpose(1, 2)  # [2, T, Hkv, D]
        close(written[0], rotate(keys, positions, rotary_dim, interleaved)[b], 4)
        assert torch.equal(written[1], values[b])
        slab[1, :, b, :, slot : slot + 3] = float("nan")
    assert slab.isnan().all()


@pytest.mark.usefixtures("triton_kernels")
def test_many_rows_are_rotated_as_few_are(device, monkeypatch):
    """A program then takes several rows, of two sequences sometimes, and the last program fewer."""
    qkv = torch.randn(3, 7, 4 * 16, device=device)
    positions = torch.randint(0, 31, (3, 7), device=device)
    slots = torch.tensor([5, 0, 2], device=device)
    found = []
    monkeypatch.setattr(draft_head, "resources", lambda device: Resources(1, 0))
    for programs in (84, 24, 4):  # 84 heads of rows: one a program, 4, and 8
        monkeypatch.setattr(draft_head, "PROGRAMS", programs)
        slab = torch.full((2, 3, 1, 12, 16), float("nan"), device=device)
        q = draft_head.rope_append(qkv, positions, *table(31, 16, False, device), slab[0], slab[1], slots, 2, 1)
        found.append((q, slab.nan_to_num(-9.0)))
    for several in found[1:]:
        assert all(map(torch.equal, found[0], several))


@pytest.mark.parametrize(("interleaved", "stock"), [(False, rope_of_llama), (True, rope_of_cohere)])
def test_rope_is_that_of_transformers(interleaved, stock):
    x = torch.randn(2, 7, 3, 32)
    positions = torch.randint(0, 50, (2, 7))
    cos, sin = table(50, 32, interleaved)
    expected, _ = stock(x.transpose(1, 2), x.transpose(1, 2), cos[positions], sin[positions])
    torch.testing.assert_close(draft_head.rope_ref(x, positions, cos, sin, interleaved), expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_that_of_transformers(dtype):
    norm = LlamaRMSNorm(96, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 96).to(dtype)
    assert torch.equal(rms_norm_ref(x, norm.weight, EPS), norm(x))


@WAYS
@DTYPES
@pytest.mark.parametrize("width", [1, 16, 111, 1200])
def test_add_rms_norm(width, dtype, way, use, device):
    use(way)
    x = torch.randn(5, 2 * width, device=device).to(dtype)[:, :width]
    residual, weight = torch.randn(5, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    close(total, x.double() + residual.double())
    close(normed, rms(total, weight), 2)


@WAYS
@DTYPES
@pytest.mark.parametrize("width", [1, 24, 111, 1500])
def test_silu_mul(width, dtype, way, use, device):
    use(way)
    gate_up = (3 * torch.randn(5, 2 * width + 3, device=device)).to(dtype)[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, -1)
    close(silu_mul(gate_up), gate * gate.sigmoid() * up)


def test_gradients_flow_through_the_twins():
    """Training runs the same functions: autograd against finite differences."""
    torch.manual_seed(0)
    cos, sin = (x.double() for x in table(9, 8, False))
    tokens, positions = torch.tensor([2, 0, 2]), torch.tensor([[3, 8]])

    def check(function, *shapes):
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(function, leaves)

    check(lambda h, e, n, m: draft_head.head_input(tokens, h, e, n, m, EPS)[0], (3, 5), (4, 6), (6,), (5,))
    check(lambda x, r, w: add_rms_norm(x, r, w, EPS), (2, 6), (2, 6), (6,))
    check(silu_mul, (3, 8))
    check(lambda x: draft_head.rope_ref(x, positions, cos, sin), (1, 2, 2, 8))
    check(lambda x: draft_head.rope_ref(x, positions, cos, sin, True), (1, 2, 2, 8))


@pytest.mark.usefixtures("triton_kernels")
def test_kernels_stand_back_where_gradients_are_needed():
    """Even where the kernel is asked for: it has no backward."""
    gate_up = torch.randn(2, 8, requires_grad=True)
    assert silu_mul(gate_up).requires_grad
    weight = torch.ones(8, requires_grad=True)
    assert add_rms_norm(torch.randn(2, 8), torch.randn(2, 8), weight)[0].requires_grad


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("num_rows", [1, 10, 63, 512])
def test_real_shapes_round_as_pytorch_does(num_rows, dtype):
    """Sizes of the EAGLE-3 head of Llama-3.1-8B, and a hidden size that is no power of two."""
    for hidden_size, heads, head_dim, intermediate in ((4096, (32, 8), 128, 14336), (5120, (40, 8), 128, 13824)):
        torch.manual_seed(0)

        def random(*shape):
            return torch.randn(shape, device="cuda").to(dtype)

        tokens = torch.randint(0, 1000, (num_rows,), device="cuda")
        weight, other = random(hidden_size), random(hidden_size)
        arguments = (tokens, random(num_rows, hidden_size), random(1000, hidden_size), weight, other, EPS)
        close(draft_head.head_input(*arguments)[0], draft_head.head_input_ref(*arguments)[0], 2)
        arguments = (random(num_rows, hidden_size), random(num_rows, hidden_size), weight, EPS)
        for pair in zip(add_rms_norm(*arguments), add_rms_norm_ref(*arguments), strict=True):
            close(*pair, 2)
        gate_up = random(num_rows, 2 * intermediate)
        close(silu_mul(gate_up), silu_mul_ref(gate_up), 2)
        qkv = random(1, num_rows, (heads[0] + 2 * heads[1]) * head_dim)
        positions = torch.arange(num_rows, device="cuda")[None] + 7
        slabs = torch.zeros(2, 2, 1, heads[1], 600, head_dim, device="cuda", dtype=dtype)
        norms = dict(q_norm=random(head_dim).sigmoid() + 0.5, k_norm=random(head_dim).sigmoid() + 0.5, eps=EPS)
        tail = (torch.tensor([11], device="cuda"), *heads)
        tables = table(600, head_dim, False, "cuda")
        actual = draft_head.rope_append(qkv, positions, *tables, *slabs[0], *tail, **norms)
        expected = draft_head.rope_append_ref(qkv, positions, *tables, *slabs[1], *tail, **norms)
        close(actual, expected, 12)  # a norm rounded the other way, times its weight, may meet cancellation
        close(slabs[0], slabs[1], 12)
