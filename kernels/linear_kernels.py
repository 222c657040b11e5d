"""The kernel of `linear.py`, and what others take of it: weights as they come, fetched early, and a tile of a product.

int8 weights (a scale per row) become bf16 after the load, exactly: a byte with 0x43 above it is cut into 0x4300 | its
low seven bits, which is 128 more than they are, and 0x4300 | its top bit, 128 or 256; the difference is its value.
Launches overlap (`overlap.py`): the first bytes of each weight tile are fetched into L2 before the kernel waits for its
x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def to_dtype(w, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of weights in the dtype of x; int8 to bf16 four at a time, by moving bits and a subtraction."""
    if UPCAST:
        return w.to(tl.float32)
    if w.dtype == tl.int8 and DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, e;
            prmt.b32 a, $2, 0x43434343, 0x4140;
            prmt.b32 b, $2, 0x43434343, 0x4342;
            and.b32 c, a, 0xff80ff80;
            and.b32 d, b, 0xff80ff80;
            and.b32 a, a, 0xff7fff7f;
            and.b32 b, b, 0xff7fff7f;
            mov.b32 e, 0xbf80bf80;
            fma.rn.bf16x2 $0, c, e, a;
            fma.rn.bf16x2 $1, d, e, b;
            }""",
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return w.to(DTYPE)


@triton.jit
def _prefetch_rows(row_ptrs, PIECES: tl.constexpr):
    """Bring the first pieces of 256 bytes of each row [N, 1] into L2, one a thread where N is half of the threads."""
    addresses = row_ptrs.to(tl.int64) + tl.arange(0, PIECES)[None, :] * 256
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 256; // $0", "=r,l", [addresses],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def after_fetching_rows(row_ptrs, PIECES: tl.constexpr, PDL: tl.constexpr):
    """`after_earlier_kernels`, with the first pieces of the weight's rows asked for before the wait."""
    if PDL:
        gdc_launch_dependents()
        if PIECES:
            _prefetch_rows(row_ptrs, PIECES)
        gdc_wait()


@triton.jit
def tile_product(
    x_ptrs, weight_ptrs, row_mask, left, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[M, N] in fp32, from pointers to the first of `left` elements of x's rows [M, 1] and the weight's [N, 1].

    EVEN: left is a multiple of BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)
    x_ptrs += k[None, :]
    weight_ptrs += k[None, :]
    z = tl.zeros((x_ptrs.shape[0], weight_ptrs.shape[0]), tl.float32)
    for start in range(0, left, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs, mask=row_mask, other=0.0)
            w = tl.load(weight_ptrs)
        else:
            inside = (k < left - start)[None, :]
            x = tl.load(x_ptrs, mask=row_mask & inside, other=0.0)
            w = tl.load(weight_ptrs, mask=inside, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        z = tl.dot(x, tl.trans(to_dtype(w, x.dtype, UPCAST)), z, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return z


@triton.jit(do_not_specialize=["num_rows", "splits"])
def few_rows_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, num_columns, inner, stride_x, stride_weight, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    PIECES: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """num_columns: of the output. GATED tiles take rows of gate and up in turns, which end in one thread."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile, split = tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    if GATED:
        weight_rows = n % 2 * num_columns + tl.minimum(tile * (BLOCK_N // 2) + n // 2, num_columns - 1)
    else:
        weight_rows = tl.minimum(tile * BLOCK_N + n, num_columns - 1)
    share = tl.cdiv(tl.cdiv(inner, BLOCK_K), splits) * BLOCK_K
    first = split * share
    weight_ptrs = weight_ptr + weight_rows.to(tl.int64)[:, None] * stride_weight + first
    after_fetching_rows(weight_ptrs, PIECES, PDL)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x + first
    row_mask = (rows < num_rows)[:, None]
    z = tile_product(x_ptrs, weight_ptrs, row_mask, tl.minimum(share, inner - first), BLOCK_K, EVEN, UPCAST)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + weight_rows)[None, :]
    if bias_ptr is not None:
        z += tl.where(split == 0, tl.load(bias_ptr + weight_rows).to(tl.float32), 0.0)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(z.to(out_ptr.dtype.element_ty).to(tl.float32), (BLOCK_M, BLOCK_N // 2, 2)))
        z = gate * tl.sigmoid(gate) * up
        columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        columns = tile * BLOCK_N + n
    out_rows = split.to(tl.int64) * num_rows + rows
    out_ptrs = out_ptr + out_rows[:, None] * num_columns + columns[None, :]
    tl.store(out_ptrs, z.to(out_ptr.dtype.element_ty), mask=row_mask & (columns < num_columns)[None, :])
