"""A valid call of every wrapper of kernels/, as small as it can be told from a wrong one, and the twin that says what
comes out.

Indices are valid for tensors one shorter than these, and all that may stand for parents is a tree whose scores fall:
what a changed call reads is then wrong by its shapes alone, which the wrappers see, and never by a value, which they do
not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from eagle_fast_kernels import draft_head, grow, launch, lm_head_topk, noise, order_key, overlap, rms_norm
from eagle_fast_kernels import linear as products
from eagle_fast_kernels.accept import accept, accept_ref
from eagle_fast_kernels.compact_kv import compact_kv, compact_kv_ref
from eagle_fast_kernels.embedding import embedding_rows, embedding_rows_ref
from eagle_fast_kernels.packed import pack, packed_gated, packed_gated_ref, packed_matmul, packed_matmul_ref
from eagle_fast_kernels.sample import sample
from eagle_fast_kernels.sample_ref import sample_ref, warp_ref
from eagle_fast_kernels.sample_threshold import threshold
from eagle_fast_kernels.silu_mul import silu_mul, silu_mul_ref
from eagle_fast_kernels.soft_cross_entropy import soft_cross_entropy, soft_cross_entropy_ref
from eagle_fast_kernels.tree_attention import HAS_GLUON, tree_attention
from eagle_fast_kernels.tree_attention_ref import tree_attention_ref
from torch import Tensor


class Case(NamedTuple):
    function: Callable[..., Any]
    twin: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]  # new ones at every call, always the same


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(*rows: Any) -> Tensor:
    return torch.tensor(rows)


def accept_arguments() -> dict[str, Any]:
    return dict(
        tokens=integers([5, 6, 7, 8], [5, 6, 7, 8]), parents=integers([-1, 0, 0, 1], [-1, 0, 1, 2]),
        chosen=integers([6, 8, 1, 2], [6, 7, -1, 3]), lengths=integers(4, 9), ends=integers(20, 11),
        roots=integers(5, 5), report=torch.zeros(2, 4, dtype=torch.long),
    )  # fmt: skip


def accept_ranks_arguments() -> dict[str, Any]:
    return accept_arguments() | dict(ranks=torch.zeros(2, 3, dtype=torch.long))


def compact_arguments() -> dict[str, Any]:
    return dict(
        slab=floats(5, 2, 5, 6, 5), path=integers([1, 2], [0, 2]), counts=integers(1, 2), lengths=integers(1, 0)
    )


def grouped_norm_arguments() -> dict[str, Any]:
    return dict(
        x=floats(2, 3, 6), weight=floats(3, 6), eps=1e-5, centered=True, round_once=True, plus_one=False
    )  # fmt: skip


def grow_arguments(level: int) -> dict[str, Any]:
    rows = 2 if level else 1
    return dict(
        topk_scores=-floats(2, rows, 2).abs(), topk_tokens=torch.arange(4 * rows).view(2, rows, 2),
        beam_scores=-floats(2, rows).abs(), beam_candidates=torch.arange(rows).expand(2, -1) - (1 - level),
        beam_ancestors=torch.ones(2, rows, 1, dtype=torch.long), level=level, out_scores=torch.zeros(2, 7),
        out_tokens=torch.zeros(2, 7, dtype=torch.long), out_parents=torch.zeros(2, 7, dtype=torch.long),
    )  # fmt: skip


def finish_tree_arguments() -> dict[str, Any]:
    return dict(
        scores=-torch.arange(12.0).view(2, 6), tokens=integers([-1, 0, 1, 2, 3, 4], [-1, 0, 0, 1, 1, 1]),
        parents=integers(*[[-1, -1, 0, 0, 1, 1]] * 2),
        roots=integers(9, 8), num_nodes=4,
    )  # fmt: skip


def head_input_arguments(rows: bool, norms: bool) -> dict[str, Any]:
    return dict(
        tokens=integers(1, 0, 1), hidden=floats(3, 6), embedding=floats(5, 4), embed_norm=floats(4) if norms else None,
        hidden_norm=floats(6) if norms else None, eps=1e-5, rows=integers(1, 0, 1) if rows else None,
    )  # fmt: skip


def rope_arguments(parts: int = 0, positions: bool = True, norms: bool = False, rotary: int = 4) -> dict[str, Any]:
    leading = (parts,) if parts else ()
    return dict(
        qkv=floats(*leading, 2, 3, 16), positions=integers([3, 4, 2], [0, 1, 2]) if positions else None,
        cos=floats(8, rotary), sin=floats(8, rotary) + 1, k_slab=floats(2, 1, 9, 4), v_slab=floats(2, 1, 9, 4) + 1,
        slots=integers(1, 4), num_heads=2, num_kv_heads=1, q_norm=floats(4) if norms else None,
        k_norm=floats(4) + 1 if norms else None, eps=1e-5, interleaved=parts > 0,
    )  # fmt: skip


def product_arguments(int8: bool = False, bias: bool = False, shape: tuple[int, ...] = (3, 8)) -> dict[str, Any]:
    weight = floats(6, 8)
    return dict(
        x=floats(*shape), weight=(20 * weight).to(torch.int8) if int8 else weight,
        scale=floats(6) if int8 else None, bias=floats(6) if bias else None,
    )  # fmt: skip


def packed_arguments(kind: str, bias: bool = False) -> dict[str, Any]:
    """Two groups of columns in 4 bits, a scale a row in 8."""
    columns = 64 if kind == "int4" else 8
    codes = torch.randint(0, 16 if kind == "int4" else 256, (6, columns), dtype=torch.uint8)
    packed = pack(codes, floats(6, 2 if kind == "int4" else 1), kind=kind, group_size=32 if kind == "int4" else 8)
    return dict(x=floats(3, columns), packed=packed, bias=floats(6) if bias else None)


def lm_head_arguments(noise: bool, int8: bool = False) -> dict[str, Any]:
    weight = floats(9, 8)
    settings = dict(
        gain=floats(2).abs(), share=floats(2).abs(), positions=integers(3, 4), seeds=integers(1 << 35, 7),
        sequences=integers(0, 1),
    )  # fmt: skip
    return dict(
        hidden=floats(4, 8), weight=(20 * weight).to(torch.int8) if int8 else weight, k=3,
        bias=floats(9) if noise else None, scale=floats(9).abs() if int8 else None,
        token_ids=torch.arange(9) * 1000 if noise else None,
    ) | (settings if noise else dict.fromkeys(settings))  # fmt: skip


def add_norm_arguments(parts: int) -> dict[str, Any]:
    x = floats(parts, 3, 6) if parts else floats(3, 6)
    return dict(x=x, residual=floats(3, 6) + 1, weight=floats(6), eps=1e-5)


def sample_arguments() -> dict[str, Any]:
    return dict(
        logits=floats(2, 3, 10), positions=integers([3, 4, 5], [1, 2, 3]), temperature=torch.tensor([0.0, 0.8]),
        top_k=integers(0, 4), top_p=torch.tensor([1.0, 0.9]), min_p=torch.tensor([0.0, 0.02]),
        seeds=integers(1 << 40, 3), sequences=integers(0, 1),
    )  # fmt: skip


def survey(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """What `threshold` wants to be told of rows in one chunk."""
    best = logits.float().amax(-1)
    mass = ((logits.float() - best[..., None]) / temperature[:, None, None]).exp().sum(-1)
    return best.view(-1, 1), mass.view(-1, 1)


def threshold_arguments() -> dict[str, Any]:
    logits, temperature = floats(2, 3, 10), torch.tensor([0.7, 0.9])
    best, mass = survey(logits, temperature)
    return dict(
        logits=logits, best=best, mass=mass, temperature=temperature, top_k=integers(0, 4),
        top_p=torch.tensor([0.6, 0.9]),
    )  # fmt: skip


def threshold_twin(logits, best, mass, temperature, top_k, top_p):
    """None where what it is told is not so."""
    if not all(map(torch.allclose, survey(logits, temperature), (best, mass))):
        return None
    x = logits.float() / temperature[:, None, None]
    kept = warp_ref(x, top_k, top_p, torch.zeros_like(top_p)) > float("-inf")
    restricted = ((top_k > 0) & (top_k < logits.shape[2])) | (top_p < 1)
    least = logits.float().masked_fill(~kept, float("inf")).amin(-1)
    return torch.where(restricted[:, None], least, float("-inf")).flatten()


def attention_arguments(**options: Any) -> dict[str, Any]:
    return dict(
        q=floats(2, 4, 3, 8), k=floats(2, 2, 12, 8), v=floats(2, 2, 12, 8) + 1, lengths=integers(3, 5),
        ancestors=integers([[1], [3], [5]], [[1], [3], [7]]), scale=0.3, depths=None, first=0, window=0, chunk=0,
        softcap=0.0, sinks=None,
    ) | options  # fmt: skip


DEPTHS = integers([0, 1, 1, 2], [0, 1, 2, 3])


def hopper_arguments() -> dict[str, Any]:
    q, k = floats(1, 4, 3, 128).half(), floats(1, 2, 12, 128).half()
    acc, (peak, total) = torch.zeros(2, 18, 6, 128), torch.zeros(2, 2, 18, 6)
    return dict(
        q=q, k=k, v=k + 1, lengths=integers(3), ancestors=integers([[1], [3], [5]]), acc=acc, peak=peak, total=total,
        scale=0.3, first=0,
    )  # fmt: skip


def unlaunched_attend(**arguments: Any) -> None:
    """`attend` up to its launch: no interpreter runs Gluon."""
    from eagle_fast_kernels import tree_attention_hopper as hopper

    class Unlaunched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: None

    hopper.is_hopper = lambda device: True
    hopper._attend_hopper_kernel = Unlaunched()
    hopper.attend(**arguments)


unlaunched_attend.__signature__ = inspect.signature(lambda q, k, v, **rest: None)  # type: ignore[attr-defined]


def summed(*, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`few_rows_sums` with its parts added up."""
    parts = products.few_rows_sums(x, weight, scale=scale, bias=bias)
    return parts.sum(0).to(x.dtype) if parts.dim() > x.dim() else parts


def itself(function: Callable[..., Any], arguments: Callable[[], dict[str, Any]]) -> Case:
    """What is its own twin: anything may come out, as long as nothing breaks."""
    return Case(function, function, arguments)


NOISE = dict(seeds=integers([1 << 40], [3]), sequences=integers([0], [1]), positions=integers([5], [6]))
WORDS = {name: integers(1, 2, 1 << 31) + i for i, name in enumerate(("k0", "k1", "c0", "c1", "c2", "c3"))}


def _copied(arguments: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _cases() -> dict[str, Case]:
    cases = {
        "accept": Case(accept, accept_ref, accept_arguments),
        "accept, with ranks": Case(accept, accept_ref, accept_ranks_arguments),
        "compact_kv": Case(compact_kv, compact_kv_ref, compact_arguments),
        "finish_tree": Case(grow.finish_tree, grow.finish_tree_ref, finish_tree_arguments),
        "silu_mul": Case(silu_mul, silu_mul_ref, lambda: dict(gate_up=floats(3, 10))),
        "soft_cross_entropy": Case(
            soft_cross_entropy, soft_cross_entropy_ref,
            lambda: dict(logits=floats(3, 7), targets=floats(3, 7).softmax(-1) * 0.9, weights=floats(3)),
        ),
        "sample": Case(sample, sample_ref, sample_arguments),
        "threshold": Case(threshold, threshold_twin, threshold_arguments),
        "rms_norm": Case(
            rms_norm.rms_norm, rms_norm.rms_norm_ref, lambda: dict(x=floats(2, 3, 6), weight=floats(6), eps=1e-5)
        ),
        "rms_norm, of groups": Case(rms_norm.rms_norm, rms_norm.rms_norm_ref, grouped_norm_arguments),
        "add_parts": Case(
            rms_norm.add_parts, rms_norm.add_parts_ref, lambda: dict(x=floats(3, 6), residual=floats(3, 6))
        ),
        "streams": itself(products.streams, lambda: dict(x=floats(3, 8), weight=floats(6, 8))),
        "gumbel_ref": itself(noise.gumbel_ref, _copied(NOISE | {"tokens": torch.arange(5)})),
        "gumbel_row_ref": itself(noise.gumbel_row_ref, _copied(NOISE | {"vocab_size": 9})),
        "gumbel_of_bits_ref": itself(noise.gumbel_of_bits_ref, lambda: dict(bits=integers(0, 1, (1 << 32) - 1))),
        "philox_ref": itself(noise.philox_ref, _copied(WORDS)),
        "order_key_ref": itself(order_key.order_key_ref, lambda: dict(x=floats(2, 3))),
        "pack_ref": itself(order_key.pack_ref, lambda: dict(x=floats(2, 3), index=torch.arange(3))),
        "unpack_ref": itself(order_key.unpack_ref, lambda: dict(packed=order_key.pack_ref(floats(5), torch.arange(5)))),
        "resources": itself(launch.resources, lambda: dict(device=torch.device("cpu"))),
        "dependent_launch": itself(overlap.dependent_launch, lambda: dict(device=torch.device("cpu"))),
    }  # fmt: skip
    for name, options in {
        "": {}, ", windows": dict(window=3, depths=DEPTHS), ", chunks": dict(chunk=4, depths=DEPTHS, first=1),
        ", softcap and sinks": dict(softcap=5.0, sinks=floats(4)),
    }.items():  # fmt: skip
        arguments = _copied(attention_arguments(**options))
        cases["tree_attention" + name] = Case(tree_attention, tree_attention_ref, arguments)
    if HAS_GLUON:
        cases["attend (Hopper)"] = Case(unlaunched_attend, lambda **_: None, hopper_arguments)
    for level in (0, 1):
        cases[f"grow, level {level}"] = Case(grow.grow, grow.grow_ref, _copied(grow_arguments(level)))
    for rows in (False, True):
        name = "head_input" + ", rows" * rows
        cases[name] = Case(
            draft_head.head_input, draft_head.head_input_ref, _copied(head_input_arguments(rows, norms=rows))
        )
    for name, options in {
        "": {}, ", parts": dict(parts=2, rotary=2), ", counted": dict(positions=False), ", norms": dict(norms=True),
    }.items():  # fmt: skip
        arguments = _copied(rope_arguments(**options))
        cases["rope_append" + name] = Case(draft_head.rope_append, draft_head.rope_append_ref, arguments)
    for parts in (0, 2):
        name = "add_rms_norm" + ", parts" * (parts > 0)
        cases[name] = Case(rms_norm.add_rms_norm, rms_norm.add_rms_norm_ref, _copied(add_norm_arguments(parts)))
    for name, options in {"": {}, ", int8": dict(int8=True), ", bias": dict(bias=True, shape=(2, 2, 8))}.items():
        arguments, twin = _copied(product_arguments(**options)), products.few_rows_matmul_ref
        cases["few_rows_matmul" + name] = Case(products.few_rows_matmul, twin, arguments)
        cases["few_rows_sums" + name] = Case(summed, twin, arguments)
        cases["gated_matmul" + name] = Case(products.gated_matmul, products.gated_matmul_ref, arguments)
    for name, options in {"": ("int4",), ", int8": ("int8", True)}.items():
        arguments = _copied(packed_arguments(*options))
        cases["packed_matmul" + name] = Case(packed_matmul, packed_matmul_ref, arguments)
        cases["packed_gated" + name] = Case(packed_gated, packed_gated_ref, arguments)
    table = packed_arguments("int8")["packed"]
    arguments = _copied(dict(tokens=integers([0, 5], [2, 2]), table=table, dtype=torch.float32))
    cases["embedding_rows"] = Case(embedding_rows, embedding_rows_ref, arguments)
    for name, options in {"": (False,), ", noise": (True,), ", int8": (False, True)}.items():
        arguments = _copied(lm_head_arguments(*options))
        cases["lm_head_topk" + name] = Case(lm_head_topk.lm_head_topk, lm_head_topk.lm_head_topk_ref, arguments)
    return cases


CASES = _cases()
