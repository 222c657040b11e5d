"""Small fused pieces: a draft head's input, and RoPE with the cache write, which fused layers of the target run too.

    head_input     out[r] = rms(embedding[tokens[r]]) | rms(hidden[rows[r]])    (| joins; a norm that is None copies)
    rope_append    q, k, v of one row; q, k <- rope(rms(q)), rope(rms(k));          cache rows slots[b] + t <- k, v

    rms(x) = weight * x / sqrt(mean(x^2) + eps)          rope(x) = x cos[position] + turn(x) sin[position]
    turn(x) = (-x[D/2:], x[:D/2]), or interleaved (-x[1], x[0], -x[3], x[2], ...)

    R rows   N hidden states   B sequences   T rows of a sequence   E, H embedding and hidden size   V vocabulary
    P positions   L cache rows   Hq, Hkv heads   D head size

Bytes: every input is read and every output written once. A level of 10 rows of an EAGLE-3 head for Llama-3.1-8B in bf16
moves 0.33 MB (head_input) and 0.24 MB (rope_append): 0.1 us at 3.08 TB/s, so what counts is how few launches there are,
and that they overlap (`overlap.py`). qkv may come in parts, fp32 [S, ...] from `linear.few_rows_sums`, which are added
up here in order and rounded to the cache's dtype, to the bits of a product that comes whole. Arithmetic is fp32; norms
round where LlamaRMSNorm does. rope_append, which a target runs, fuses no products with sums: however many rows a
program takes, and in whatever form they come, a row has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import HUGE, flag, number, whole
from .draft_head_inputs import check_head_input, check_rope_append
from .embedding import bytes_and_scales, embedding_rows_ref, packed_columns
from .launch import device_guard, resources, use_triton
from .overlap import after_earlier_kernels, dependent_launch
from .packed_layout import Packed
from .rms_norm import given_norm_ref, normalize, num_warps, rms_norm_ref, sum_parts, sum_parts_ref

# rope_append: a program takes one head of a row, or of up to MOST_ROWS where that would be more than PROGRAMS for every
# multiprocessor
PROGRAMS, MOST_ROWS = 24, 8


@triton.jit
def _store_normed(x, norm_ptr, target, width, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    wide = x.to(tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + i, mask=i < width, other=0.0).to(tl.float32)
        wide, _ = normalize(wide, wide, weight, weight, width, eps, x.dtype)
    tl.store(target + i, wide.to(target.dtype.element_ty), mask=i < width)


@triton.jit
def _head_input_kernel(
    tokens_ptr, hidden_ptr, rows_ptr, embedding_ptr, scale_ptr, embed_norm_ptr, hidden_norm_ptr, out_ptr, taken_ptr,
    eps, stride_h, stride_e, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """scale_ptr: of a packed embedding's rows."""
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    target = out_ptr + row * (E + H)
    if tl.program_id(1) == 0:
        token = tl.maximum(tl.load(tokens_ptr + row), 0)
        entry = embedding_ptr + token * stride_e
        if scale_ptr is not None:
            e = packed_columns(entry, tl.load(scale_ptr + token), i, i < E, out_ptr.dtype.element_ty)
        else:
            e = tl.load(entry + i, mask=i < E, other=0.0)
        _store_normed(e, embed_norm_ptr, target, E, eps, BLOCK)
    else:
        source = row if rows_ptr is None else tl.load(rows_ptr + row)
        h = tl.load(hidden_ptr + source * stride_h + i, mask=i < H, other=0.0)
        if rows_ptr is not None:
            tl.store(taken_ptr + row * H + i, h, mask=i < H)
        _store_normed(h, hidden_norm_ptr, target + E, H, eps, BLOCK)


@triton.jit
def _rope_append_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, q_ptr,
    num_rows, total_rows, eps, stride_xs, stride_xb, stride_xt, stride_pb, stride_pt,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes one head of ROWS rows, counted over all sequences."""
    after_earlier_kernels(PDL)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        partner, sign = d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner, sign = (d + R // 2) % R, tl.where(d < R // 2, -1.0, 1.0)
    for i in tl.static_range(ROWS):
        pid = tl.program_id(0).to(tl.int64) * ROWS + i
        here = pid < total_rows
        # not `here & ...`: Triton 3.9's interpreter takes no scalar condition in a mask
        mask, turns = tl.where(here, d < D, False), tl.where(here, d < R, False)
        sequence, row = pid // num_rows, pid % num_rows
        source = qkv_ptr + sequence * stride_xb + row * stride_xt + head * D
        x = sum_parts(source, d, mask, stride_xs, PARTS, q_ptr.dtype.element_ty)
        slot = tl.load(slots_ptr + sequence, mask=here, other=0) + row
        if head >= HQ + HKV:
            target = v_ptr + sequence * stride_vb + (head - HQ - HKV) * stride_vh + slot * stride_vl
            tl.store(target + d, x.to(v_ptr.dtype.element_ty), mask=mask)
        else:
            turned = sum_parts(source, partner, turns, stride_xs, PARTS, q_ptr.dtype.element_ty)
            if q_norm_ptr is not None:
                of_q, of_k = tl.where(head < HQ, mask, False), tl.where(head >= HQ, mask, False)
                weight = tl.load(q_norm_ptr + d, mask=of_q, other=0.0).to(tl.float32)
                weight += tl.load(k_norm_ptr + d, mask=of_k, other=0.0).to(tl.float32)
                turned_weight = tl.load(q_norm_ptr + partner, mask=of_q & (d < R), other=0.0).to(tl.float32)
                turned_weight += tl.load(k_norm_ptr + partner, mask=of_k & (d < R), other=0.0).to(tl.float32)
                x, turned = normalize(x, turned, weight, turned_weight, D, eps, q_ptr.dtype.element_ty)
            position = pid
            if positions_ptr is not None:
                position = tl.load(positions_ptr + sequence * stride_pb + row * stride_pt, mask=here, other=0)
            table = position * R + d
            cos = tl.load(cos_ptr + table, mask=turns, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + table, mask=turns, other=0.0).to(tl.float32)
            rotated = x * cos + sign * turned * sin
            if head < HQ:
                tl.store(q_ptr + (pid * HQ + head) * D + d, rotated.to(q_ptr.dtype.element_ty), mask=mask)
            else:
                target = k_ptr + sequence * stride_kb + (head - HQ) * stride_kh + slot * stride_kl
                tl.store(target + d, rotated.to(k_ptr.dtype.element_ty), mask=mask)


def head_input(
    tokens: Tensor, hidden: Tensor, embedding: Tensor | Packed, embed_norm: Tensor | None = None,
    hidden_norm: Tensor | None = None, eps: float = 1e-6, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """([R, E+H] in hidden's dtype, hidden[rows] [R, H]): embedding [V, E] rows of tokens [R], then the hidden states,
    each through its RMSNorm.

    hidden is [N, H], rows [R]; without rows N = R and hidden itself is returned. A token of -1 (the target had no valid
    choice) reads row 0. An embedding may be packed, in int8 with a scale a row (`embedding.py`).
    """
    eps = check_head_input(tokens, hidden, embedding, embed_norm, hidden_norm, eps, rows)
    table, scale = bytes_and_scales(embedding) if isinstance(embedding, Packed) else (embedding, None)
    embed_size = embedding.in_features if isinstance(embedding, Packed) else embedding.shape[1]
    num_rows, hidden_size = len(tokens), hidden.shape[1]
    if not use_triton(hidden, table, embed_norm, hidden_norm):
        return head_input_ref(tokens, hidden, embedding, embed_norm, hidden_norm, eps, rows)
    out = hidden.new_empty(num_rows, embed_size + hidden_size)
    taken = hidden if rows is None else hidden.new_empty(num_rows, hidden_size)
    block = triton.next_power_of_2(max(embed_size, hidden_size))
    with device_guard(hidden):
        _head_input_kernel[(num_rows, 2)](
            tokens, hidden, rows, table, scale, embed_norm, hidden_norm, out, taken, eps,
            hidden.stride(0), table.stride(0), E=embed_size, H=hidden_size,
            BLOCK=block, num_warps=num_warps(block), **dependent_launch(hidden.device),
        )  # fmt: skip
    return out, taken


def rope_append(
    qkv: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, k_slab: Tensor, v_slab: Tensor, slots: Tensor,
    num_heads: int, num_kv_heads: int, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 1e-6, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """Rotated queries [B, Hq, T, D] (a view of [B, T, Hq, D]); rotated keys and values go to the cache.

    qkv [B, T, (Hq + 2 Hkv) D], or parts of it [S, B, T, ...], whose sum is rounded to the cache's dtype; positions
    [B, T], or None where row t of sequence b has position b T + t; cos, sin [P, R], laid out as the dimensions they
    multiply, which are the first R <= D of a head: the others pass; k_slab, v_slab [B, Hkv, L, D] get rows
    slots[b] + t; q_norm, k_norm [D] are given together or not at all.
    """
    num_heads, num_kv_heads = whole("num_heads", num_heads, 1), whole("num_kv_heads", num_kv_heads, 1)
    eps, interleaved = number("eps", eps, 0, HUGE), flag("interleaved", interleaved)
    check_rope_append(qkv, positions, cos, sin, k_slab, v_slab, slots, num_heads, num_kv_heads, q_norm, k_norm)
    return run_rope_append(
        qkv, positions, cos, sin, k_slab, v_slab, slots, num_heads, num_kv_heads,
        q_norm=q_norm, k_norm=k_norm, eps=eps, interleaved=interleaved,
    )  # fmt: skip


def run_rope_append(
    qkv: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, k_slab: Tensor, v_slab: Tensor, slots: Tensor,
    num_heads: int, num_kv_heads: int, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 1e-6, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """`rope_append` of arguments that are known to fit: nothing is checked."""
    (num_sequences, num_rows), head_dim, rotary_dim = qkv.shape[-3:-1], k_slab.shape[3], cos.shape[1]
    if not use_triton(qkv, k_slab, cos, sin, q_norm, k_norm):
        return rope_append_ref(
            qkv, positions, cos, sin, k_slab, v_slab, slots, num_heads, num_kv_heads,
            q_norm=q_norm, k_norm=k_norm, eps=eps, interleaved=interleaved,
        )  # fmt: skip
    num_parts, stride_s = (qkv.shape[0], qkv.stride(0)) if qkv.dim() == 4 else (1, 0)
    q = qkv.new_empty(num_sequences, num_rows, num_heads, head_dim, dtype=_whole_dtype(qkv, k_slab))
    total_rows, heads = num_sequences * num_rows, num_heads + 2 * num_kv_heads
    wanted = triton.cdiv(total_rows * heads, PROGRAMS * resources(qkv.device).num_sms)
    rows = min(MOST_ROWS, triton.next_power_of_2(wanted))
    with device_guard(qkv):
        _rope_append_kernel[(triton.cdiv(total_rows, rows), heads)](
            qkv, positions, cos, sin, k_slab, v_slab, slots, q_norm, k_norm, q, num_rows, total_rows, eps,
            stride_s, *qkv.stride()[-3:-1], *((0, 0) if positions is None else positions.stride()),
            *k_slab.stride()[:3], *v_slab.stride()[:3],
            HQ=num_heads, HKV=num_kv_heads, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), R=rotary_dim,
            INTERLEAVED=interleaved, PARTS=num_parts, ROWS=rows, num_warps=1, enable_fp_fusion=False,
            **dependent_launch(qkv.device),
        )  # fmt: skip
    return q.transpose(1, 2)


def _whole_dtype(x: Tensor, slab: Tensor) -> torch.dtype:
    """Of what parts add up to."""
    return slab.dtype if x.dim() == 4 else x.dtype


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows_at(table: Tensor, positions: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Rows of a table [P, R] at positions [B, T], or one after the other for `shape` [B, T]: [B, T, 1, R]."""
    if positions is None:
        return table[: shape[0] * shape[1]].view(*shape, 1, -1)
    return table[positions].unsqueeze(-2)


def rope_ref(x: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys x [B, T, heads, D] to positions [B, T] (None: see `rope_append`) by tables [P, R];
    dimensions from R on pass."""
    rotary_dim = cos.shape[-1]
    wide = _wide(x[..., :rotary_dim])
    if interleaved:
        even, odd = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((-odd, even), -1).flatten(-2)
    else:
        low, high = wide.chunk(2, -1)
        turned = torch.cat((-high, low), -1)
    cos, sin = (_rows_at(_wide(table), positions, x.shape[:2]) for table in (cos, sin))
    rotated = (wide * cos + turned * sin).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), -1)


def head_input_ref(
    tokens: Tensor, hidden: Tensor, embedding: Tensor | Packed, embed_norm: Tensor | None = None,
    hidden_norm: Tensor | None = None, eps: float = 1e-6, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`head_input` in plain PyTorch, differentiable."""
    taken = hidden if rows is None else hidden[rows]
    tokens = tokens.clamp(min=0)
    if isinstance(embedding, Packed):
        embedded = embedding_rows_ref(tokens, embedding, hidden.dtype)
    else:
        embedded = embedding[tokens]
    embedded = given_norm_ref(embedded, embed_norm, eps).to(hidden.dtype)
    return torch.cat((embedded, given_norm_ref(taken, hidden_norm, eps)), -1), taken


def rope_append_ref(
    qkv: Tensor, positions: Tensor | None, cos: Tensor, sin: Tensor, k_slab: Tensor, v_slab: Tensor, slots: Tensor,
    num_heads: int, num_kv_heads: int, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 1e-6, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """`rope_append` in plain PyTorch."""
    head_dim = k_slab.shape[-1]
    if qkv.dim() == 4:
        qkv = sum_parts_ref(qkv, k_slab.dtype)
    heads = qkv.reshape(*qkv.shape[:2], -1, head_dim)
    num_rotated = num_heads + num_kv_heads
    qk, v = heads[:, :, :num_rotated], heads[:, :, num_rotated:]
    if q_norm is not None and k_norm is not None:
        q, k = qk[:, :, :num_heads], qk[:, :, num_heads:]
        qk = torch.cat((rms_norm_ref(q, q_norm, eps), rms_norm_ref(k, k_norm, eps)), 2)
    qk = rope_ref(qk, positions, cos, sin, interleaved)
    q, k = qk[:, :, :num_heads].contiguous(), qk[:, :, num_heads:]
    if slots.is_cpu and slots.shape[0] == 1:  # where it costs nothing to read where they go
        first = int(slots)
        k_slab[:, :, first : first + k.shape[1]] = k.transpose(1, 2)
        v_slab[:, :, first : first + v.shape[1]] = v.transpose(1, 2)
        return q.transpose(1, 2)
    rows = slots[:, None] + torch.arange(qkv.shape[1], device=qkv.device)
    index = rows[:, None, :, None].expand(-1, num_kv_heads, -1, head_dim)
    k_slab.scatter_(2, index, k.transpose(1, 2).to(k_slab.dtype))
    v_slab.scatter_(2, index, v.transpose(1, 2).to(v_slab.dtype))
    return q.transpose(1, 2)
