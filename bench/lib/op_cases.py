"""The table of bench/ops.py: every kernel over the shapes of Llama-3.1-8B with an EAGLE-3 head, tree 60/7/10.

To add a kernel, write a function that yields a Case for each shape and enter it in CASES. A case names the fewest bytes
that the work must move, the kernel, and the best way to do the same in PyTorch. Work that streams from memory (weights,
keys and values) has several copies of it, more than the L2 holds, that take turns; what the work before leaves in L2
anyway (logits, hidden states) has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eagle_fast_kernels.accept import accept
from eagle_fast_kernels.compact_kv import compact_kv
from eagle_fast_kernels.draft_head import head_input, rope_append
from eagle_fast_kernels.grow import finish_tree, grow
from eagle_fast_kernels.linear import few_rows_matmul, few_rows_sums, gated_matmul
from eagle_fast_kernels.lm_head_topk import lm_head_topk
from eagle_fast_kernels.packed import factors_of, pack, packed_gated, packed_sums, unpack
from eagle_fast_kernels.rms_norm import add_rms_norm, rms_norm
from eagle_fast_kernels.sample import sample
from eagle_fast_kernels.silu_mul import silu_mul, silu_mul_ref
from eagle_fast_kernels.soft_cross_entropy import soft_cross_entropy
from eagle_fast_kernels.tree_attention import tree_attention

from eagle_fast.decoding.tree import bit_masks
from eagle_fast.layers.linear import quantize

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4096, 14336, 32, 8, 128, 32
VOCAB, DRAFT_VOCAB, NODES, TOP_K, MAX_PATH = 128256, 32000, 60, 10, 8
STREAM = 200e6  # bytes of copies that take turns: four times the L2 of an H100
DTYPE, DEVICE = torch.bfloat16, "cuda"


class Case(NamedTuple):
    op: str
    shape: str
    num_bytes: int
    kernel: Callable[[int], Any]  # called with the number of the copy to work on; parts of a result are added up
    pytorch: Callable[[int], Any]
    how: str  # the way of PyTorch
    copies: int = 1
    tolerance: float | None = 1e-2  # relative error of the kernel's result against PyTorch's; None: not comparable


def copies_of(num_bytes: float) -> int:
    return max(1, min(64, int(STREAM / num_bytes) + 1))


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def constant(value: float, *shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype, device=DEVICE)


def some_tree(num_nodes: int) -> list[int]:
    """Parents of a tree about as deep and wide as drafts are."""
    return [-1] + [(i - 1) // 3 if i % 2 else max(0, i - 7) for i in range(1, num_nodes)]


def lineage(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors."""
    return [node, *lineage(parents, parents[node])] if node >= 0 else []


# -- attention and its cache -------------------------------------------------------------------------------------------


def tree_attention_cases() -> Iterator[Case]:
    verify, level, plain = (NODES, 0), (TOP_K, 5 * TOP_K), (1, 0)
    for (queries, first), length, capacity, batch in (
        (verify, 512, 640, 1), (verify, 2048, 2176, 1), (verify, 32000, 32128, 1), (verify, 512, 32128, 1),
        (verify, 512, 640, 8), (level, 512, 640, 1), (level, 32000, 32128, 1), (level, 512, 640, 8),
        (plain, 512, 640, 1), (plain, 32000, 32128, 1),
    ):  # fmt: skip
        yield tree_attention_case(queries, first, length, capacity, batch)
        torch.cuda.empty_cache()


def tree_attention_case(queries: int, first: int, length: int, capacity: int, batch: int) -> Case:
    live = length + first + queries
    num_bytes = 2 * batch * (KV_HEADS * live + queries * HEADS) * HEAD_DIM * DTYPE.itemsize
    copies = copies_of(num_bytes)
    slab = normal(2 * copies, batch, KV_HEADS, capacity, HEAD_DIM)
    q = normal(batch, queries, HEADS, HEAD_DIM).transpose(1, 2)
    parents = some_tree(first + queries)
    seen = [lineage(parents, node) for node in range(first, first + queries)]
    ancestors = bit_masks(seen, first + queries, slab.device).repeat(batch, 1, 1)
    lengths, num_slots = constant(length, batch), first + queries
    depths = torch.tensor([[len(lineage(parents, node)) - 1 for node in range(num_slots)]] * batch, device=DEVICE)
    mask = torch.zeros(queries, live, dtype=torch.bool, device=DEVICE)
    mask[:, :length] = True
    for row, slots in zip(mask, seen, strict=True):
        row[[length + slot for slot in slots]] = True
    scale = HEAD_DIM**-0.5

    def kernel(i):
        keys, values = slab[2 * i], slab[2 * i + 1]
        return tree_attention(q, keys, values, lengths, ancestors, scale=scale, depths=depths, first=first)

    def pytorch(i):
        k, v = slab[2 * i, :, :, :live], slab[2 * i + 1, :, :, :live]
        visible = None if queries == 1 else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True).transpose(1, 2)

    where = f"{length} in {capacity}" if capacity > 2 * length else str(length)
    shape = f"B={batch}, {queries} rows, context {where}"
    return Case("tree_attention", shape, num_bytes, kernel, pytorch, "SDPA with a mask", copies)


def compact_kv_cases() -> Iterator[Case]:
    for batch in (1, 8):
        slab = normal(2 * LAYERS, batch, KV_HEADS, 640, HEAD_DIM)
        path = torch.tensor([0, 1, 9, 20, 33, 41, 50, 59], device=DEVICE).repeat(batch, 1)
        counts, lengths = constant(8, batch), constant(512, batch)
        source, target = 512 + path[0], torch.arange(512, 520, device=DEVICE)
        moved = 2 * LAYERS * batch * KV_HEADS * 6 * HEAD_DIM * DTYPE.itemsize  # the first two are in place

        def kernel(_, slab=slab, path=path, counts=counts, lengths=lengths):
            compact_kv(slab, path, counts, lengths)
            return slab

        def pytorch(_, slab=slab, source=source, target=target):
            return slab.index_copy_(3, target, slab.index_select(3, source))

        shape = f"B={batch}, {LAYERS} layers, 8 rows"
        yield Case("compact_kv", shape, 2 * moved, kernel, pytorch, "index_select, index_copy_", tolerance=None)


def rope_append_cases() -> Iterator[Case]:
    for rows in (NODES, TOP_K):
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        qkv, cos, sin = normal(1, rows, width), normal(4096, HEAD_DIM), normal(4096, HEAD_DIM)
        slab, positions = normal(2, 1, KV_HEADS, 640, HEAD_DIM), torch.arange(512, 512 + rows, device=DEVICE)[None]
        slots = constant(512, 1)

        def kernel(_, qkv=qkv, positions=positions, cos=cos, sin=sin, slab=slab, slots=slots):
            return rope_append(qkv, positions, cos, sin, slab[0], slab[1], slots, HEADS, KV_HEADS)

        def pytorch(_, qkv=qkv, positions=positions, cos=cos, sin=sin, slab=slab, rows=rows):
            heads = qkv.view(1, rows, -1, HEAD_DIM).transpose(1, 2)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
            c, s = cos[positions][:, None], sin[positions][:, None]
            q, k = (x * c + torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1) * s for x in (q, k))
            slab[0, :, :, 512 : 512 + rows], slab[1, :, :, 512 : 512 + rows] = k, v
            return q

        num_bytes = 2 * rows * (width + HEAD_DIM) * DTYPE.itemsize
        yield Case("rope_append", f"{rows} rows", num_bytes, kernel, pytorch, "rotate, copy to the cache")


# -- products and what is fused around them ----------------------------------------------------------------------------


def linear_cases() -> Iterator[Case]:
    """The products of a layer as the round has them: in parts where what reads them adds them up, with the gate."""
    layers: dict[str, tuple[int, int, Callable, Callable]] = {
        "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, few_rows_sums, F.linear),
        "o": (HIDDEN, HIDDEN, few_rows_sums, F.linear),
        "gate_up, SiLU": (2 * INTERMEDIATE, HIDDEN, gated_matmul, lambda x, w: silu_mul_ref(F.linear(x, w))),
        "down": (HIDDEN, INTERMEDIATE, few_rows_sums, F.linear),
        "lm_head": (VOCAB, HIDDEN, few_rows_matmul, F.linear),
    }
    for (name, (columns, inner, product, stock)), rows in itertools.product(layers.items(), (1, TOP_K, NODES)):
        weight_bytes = columns * inner * DTYPE.itemsize
        weights = [normal(columns, inner) * inner**-0.5 for _ in range(copies_of(weight_bytes))]
        x = normal(rows, inner)
        num_bytes = weight_bytes + rows * (columns + inner) * DTYPE.itemsize
        shape = f"{name}, {rows} row{'s' if rows > 1 else ''}"
        yield Case(
            "linear", shape, num_bytes, lambda i, x=x, w=weights, product=product: product(x, w[i]),
            lambda i, x=x, w=weights, stock=stock: stock(x, w[i]), "cuBLAS", len(weights),
        )  # fmt: skip


def packed_cases() -> Iterator[Case]:
    """Products with packed weights, each kind, beside cuBLAS with the dense weight that they stand for."""
    kinds = (("int4", 128), ("int4, zeros", 128), ("int8", None), ("fp8", 128))
    layers = (
        ("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, packed_sums),
        ("o", HIDDEN, HIDDEN, packed_sums),
        ("gate_up, SiLU", 2 * INTERMEDIATE, HIDDEN, packed_gated),
        ("down", HIDDEN, INTERMEDIATE, packed_sums),
    )
    for (kind, group), (name, columns, inner, product) in itertools.product(kinds, layers):
        kind, _, zeros = kind.partition(", ")
        group = group or inner
        codes = torch.randint(0, 16 if kind == "int4" else 256, (columns, inner), dtype=torch.uint8, device=DEVICE)
        if kind == "fp8":
            codes = normal(columns, inner).to(torch.float8_e4m3fn)
        scales = (torch.rand(columns, -(-inner // group), device=DEVICE) + 0.5).to(DTYPE) * 1e-3
        points = torch.full_like(scales, 7, dtype=torch.uint8) if zeros else None
        first = pack(codes, scales, kind=kind, zeros=points, group_size=group)
        factors, whole = factors_of(first, DTYPE), unpack(first, DTYPE)
        dense = [whole] + [whole.clone() for _ in range(copies_of(whole.nbytes) - 1)]
        packed = [first] + [first._replace(words=first.words.clone()) for _ in range(copies_of(first.num_bytes) - 1)]
        for rows in (1, NODES // 2, NODES):
            x = normal(rows, inner)
            num_bytes = first.num_bytes + rows * (columns + inner) * DTYPE.itemsize

            def kernel(i, x=x, packed=packed, factors=factors, product=product):
                return product(x, packed[i], factors=factors)

            def pytorch(i, x=x, dense=dense, gated=product is packed_gated):
                out = F.linear(x, dense[i % len(dense)])
                return silu_mul_ref(out) if gated else out

            shape = f"{kind}{', zeros' if zeros else ''} {name}, {rows} row{'s' if rows > 1 else ''}"
            yield Case("packed", shape, num_bytes, kernel, pytorch, "cuBLAS, bf16", len(packed))


def lm_head_topk_cases() -> Iterator[Case]:
    weights = [normal(DRAFT_VOCAB, HIDDEN) * HIDDEN**-0.5 for _ in range(copies_of(DRAFT_VOCAB * HIDDEN))]
    quantized = [quantize(weight) for weight in weights]
    for rows, int8 in itertools.product((1, TOP_K, 8 * TOP_K), (True, False)):
        hidden = normal(rows, HIDDEN)

        def kernel(i, hidden=hidden, int8=int8):
            weight, scale = quantized[i] if int8 else (weights[i], None)
            return lm_head_topk(hidden, weight, TOP_K, scale=scale)[0]

        def pytorch(i, hidden=hidden):
            return F.linear(hidden, weights[i]).float().log_softmax(-1).topk(TOP_K).values

        num_bytes = DRAFT_VOCAB * HIDDEN * (1 if int8 else DTYPE.itemsize)
        shape = f"{rows} row{'s' if rows > 1 else ''}, {DRAFT_VOCAB} tokens{', int8' if int8 else ''}"
        yield Case("lm_head_topk", shape, num_bytes, kernel, pytorch, "bf16, log_softmax, topk", len(weights))


def rms_norm_cases() -> Iterator[Case]:
    x, residual, weight = normal(NODES, HIDDEN), normal(NODES, HIDDEN), normal(HIDDEN)
    size = NODES * HIDDEN * DTYPE.itemsize
    yield Case(
        "rms_norm", f"{NODES} rows", 2 * size, lambda _: rms_norm(x, weight),
        lambda _: F.rms_norm(x, (HIDDEN,), weight, 1e-6), "F.rms_norm",
    )  # fmt: skip
    yield Case(
        "add_rms_norm", f"{NODES} rows", 4 * size, lambda _: add_rms_norm(x, residual, weight)[0],
        lambda _: F.rms_norm(x + residual, (HIDDEN,), weight, 1e-6), "add, F.rms_norm",
    )  # fmt: skip


def silu_mul_cases() -> Iterator[Case]:
    x = normal(NODES, 2 * INTERMEDIATE)
    gate, up = x.chunk(2, -1)
    num_bytes = 3 * NODES * INTERMEDIATE * DTYPE.itemsize
    yield Case("silu_mul", f"{NODES} rows", num_bytes, lambda _: silu_mul(x), lambda _: F.silu(gate) * up, "silu, mul")


def head_input_cases() -> Iterator[Case]:
    embedding, hidden = normal(VOCAB, HIDDEN), normal(TOP_K, HIDDEN)
    tokens, norms = torch.randint(0, VOCAB, (TOP_K,), device=DEVICE), normal(2, HIDDEN)

    def pytorch(_):
        parts = (F.embedding(tokens, embedding), norms[0]), (hidden, norms[1])
        return torch.cat([F.rms_norm(x, (HIDDEN,), weight, 1e-6) for x, weight in parts], -1)

    num_bytes = 4 * TOP_K * HIDDEN * DTYPE.itemsize
    yield Case(
        "head_input", f"{TOP_K} rows", num_bytes, lambda _: head_input(tokens, hidden, embedding, *norms)[0],
        pytorch, "embedding, two norms, cat",
    )  # fmt: skip


# -- choosing tokens ---------------------------------------------------------------------------------------------------


def sample_cases() -> Iterator[Case]:
    """Flat rows are those of random weights: most of the vocabulary is kept. In peaked ones, as in text, little is."""
    for batch in (1, 8):
        flat = normal(batch, NODES, VOCAB) * 1.28
        peaked = normal(batch, NODES, VOCAB) * 2.5
        peaked[..., 77] = 20
        for name, logits, temperature, top_k, top_p in (
            ("greedy", flat, 0.0, 0, 1.0), ("no warper", flat, 1.0, 0, 1.0), ("top-p, flat", flat, 1.0, 0, 0.9),
            ("top-p, peaked", peaked, 1.0, 0, 0.9), ("top-k 50, top-p", flat, 1.0, 50, 0.9),
        ):  # fmt: skip
            yield sample_case(f"B={batch}, {NODES} rows, {name}", logits, temperature, top_k, top_p)


def sample_case(shape: str, logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> Case:
    batch = len(logits)
    settings = (
        constant(temperature, batch, dtype=torch.float), constant(top_k, batch),
        constant(top_p, batch, dtype=torch.float), constant(0, batch, dtype=torch.float),
        constant(3, batch), constant(0, batch),
    )  # fmt: skip
    positions = torch.arange(512, 512 + NODES, device=DEVICE).repeat(batch, 1)

    def pytorch(_):
        """What `generate` does for a row, without its checks: warp, softmax, exponential race (as multinomial)."""
        if temperature == 0:
            return logits.argmax(-1)
        x = logits.float() / temperature
        if top_k:
            x = x.masked_fill(x < x.topk(top_k).values[..., -1:], float("-inf"))
        if top_p < 1:
            ranked, order = x.sort(descending=False)
            remove = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
            x = x.masked_fill(remove.scatter(-1, order, remove), float("-inf"))
        probs = x.softmax(-1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1)

    num_bytes = logits.numel() * logits.element_size()
    comparable = 0.0 if temperature == 0 else None
    how = "argmax" if temperature == 0 else "sort, softmax, race" if top_p < 1 else "softmax, exponential race"
    return Case("sample", shape, num_bytes, lambda _: sample(logits, positions, *settings), pytorch, how, 1, comparable)


def accept_cases() -> Iterator[Case]:
    parents = torch.tensor(some_tree(NODES), device=DEVICE)[None]
    tokens, chosen = torch.randint(0, 3, (2, 1, NODES), device=DEVICE)
    lengths, ends, roots, report = constant(0, 1), constant(99, 1), constant(0, 1), constant(0, 1, 1 + MAX_PATH)

    def kernel(_):
        return accept(tokens, parents, chosen, lengths, ends, roots, report)

    def pytorch(_):
        """A step of the walk a line: the child of the node that carries the chosen token, or the node itself."""
        node, path = torch.zeros_like(tokens[:, 0]), []
        for _step in range(MAX_PATH):
            path.append(node)
            fits = (parents == node[:, None]) & (tokens == chosen.gather(1, node[:, None]))
            node = torch.where(fits.any(1), fits.int().argmax(1), node)
        return torch.stack(path, 1)

    yield Case(
        "accept", f"{NODES} nodes", 3 * NODES * 8, kernel, pytorch, "a loop of gathers", tolerance=None,
    )  # fmt: skip


def grow_cases() -> Iterator[Case]:
    k, depth = TOP_K, 7
    size = k + depth * k * k
    scores, tokens = -torch.rand(1, k, k, device=DEVICE), torch.randint(0, VOCAB, (1, k, k), device=DEVICE)
    beam_scores, beam = -torch.rand(1, k, device=DEVICE), torch.arange(k, device=DEVICE)[None]
    words = -(-depth * k // 64)
    masks = constant(0, 1, k, words)
    out = torch.empty(1, size, device=DEVICE), constant(0, 1, size), constant(-1, 1, size)
    all_scores, all_tokens = -torch.rand(1, size, device=DEVICE), torch.randint(0, VOCAB, (1, size), device=DEVICE)
    parents = constant(-1, 1, size)
    roots = constant(5, 1)

    def beam_step(_):
        best, flat = (beam_scores[..., None] + scores).flatten(1).topk(k)
        rows = flat // k
        return tokens.flatten(1).gather(1, flat), best, rows, masks.gather(1, rows[..., None].expand_as(masks))

    def best_nodes(_):
        kept = all_scores.topk(NODES - 1).indices.sort().values
        return all_tokens.gather(1, kept), parents.gather(1, kept)

    yield Case(
        "grow", f"beam of {k}", 16 * k * k, lambda _: grow(scores, tokens, beam_scores, beam, masks, 2, *out)[:2],
        beam_step, "topk, gathers", tolerance=None,
    )  # fmt: skip
    yield Case(
        "finish_tree", f"{NODES} of {size} nodes", 20 * size,
        lambda _: finish_tree(all_scores, all_tokens, parents, roots, NODES), best_nodes,
        "topk, sort, gathers (no masks)", tolerance=None,
    )  # fmt: skip


def soft_cross_entropy_cases() -> Iterator[Case]:
    rows = 2048
    logits, targets = normal(rows, DRAFT_VOCAB), normal(rows, DRAFT_VOCAB)
    weights = torch.rand(rows, device=DEVICE)

    def pytorch(_):
        log_probs, probs = logits.float().log_softmax(-1), targets.float().softmax(-1)
        return -(probs * log_probs).sum(-1), ((log_probs.exp() - probs) * weights[:, None]).to(DTYPE)

    num_bytes = 3 * logits.numel() * logits.element_size()
    yield Case(
        "soft_cross_entropy", f"{rows} rows, {DRAFT_VOCAB} tokens", num_bytes,
        lambda _: soft_cross_entropy(logits, targets, weights), pytorch, "log_softmax, softmax, gradient",
        tolerance=None,
    )  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "tree_attention": tree_attention_cases,
    "compact_kv": compact_kv_cases,
    "rope_append": rope_append_cases,
    "linear": linear_cases,
    "packed": packed_cases,
    "lm_head_topk": lm_head_topk_cases,
    "rms_norm": rms_norm_cases,
    "silu_mul": silu_mul_cases,
    "head_input": head_input_cases,
    "sample": sample_cases,
    "accept": accept_cases,
    "grow": grow_cases,
    "soft_cross_entropy": soft_cross_entropy_cases,
}
