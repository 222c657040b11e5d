"""The kernels of `packed.py`: a tile of weights out of a tile of words, the product, and the whole weight made dense.

Codes become 16-bit floats by moving bits: 4 bits of a code below 0x4300 are 128 + code in bf16, below 0x6400 1024 +
code in float16, and a sum and a product, in the dtype of x, make (code - zero) * scale of it, rounded once. Two
neighbours of a row share a register. int8 as in `linear_kernels.py`; fp8 (e4m3) has its bits put where those of the
wider format are, times the power of two that their exponents differ by, denormal numbers included. About two
instructions a weight at 4 bits, under a third of what the multiprocessor issues while the bytes arrive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_kernels import after_fetching_rows
from .overlap import after_earlier_kernels

WORDS = tl.constexpr(32)  # as in packed_layout.py
ROWS = tl.constexpr(8)  # of gate and of up in turns: matrix instructions keep rows that are 8 apart in one thread


@triton.constexpr_function
def assembly(kind, code, bf16, grouped, zeros):
    """Code `code` of the words in $1 and $2 as two floats in $0. $3 holds the scale twice, $5 what is added to the
    code twice; both may be any registers where they are not used."""
    fma = "fma.rn.bf16x2" if bf16 else "fma.rn.f16x2"
    one, nothing = "0x3f803f80" if bf16 else "0x3c003c00", "0x80008000"  # 1 and -0, each twice
    per_word = 4 if kind == "int4" else 2
    word, shift = ("$1", "$2")[code // per_word], code % per_word * (16 // per_word)
    lines = [".reg .b32 a, b, c, one, nothing;", f"mov.b32 one, {one};", f"mov.b32 nothing, {nothing};"]
    if kind == "fp8":
        right, mask, power = (4, "0x07f007f0", "0x7b807b80") if bf16 else (1, "0x3f803f80", "0x5c005c00")
        lines += [
            f"shl.b32 a, {word}, {8 - shift};", f"shr.u32 b, a, {right};", f"and.b32 b, b, {mask};",
            f"lop3.b32 a, a, {nothing}, b, 0xEA;", f"mov.b32 c, {power};", f"{fma} a, a, c, nothing;",
        ]  # fmt: skip
    else:
        lines.append(f"shr.u32 a, {word}, {shift};")
    if kind == "int4":
        magic, middle = ("0x43004300", "0xc308c308") if bf16 else ("0x64006400", "0xe408e408")
        lines.append(f"lop3.b32 a, a, 0x000f000f, {magic}, 0xEA;")
        lines.append(f"{fma} a, a, one, {'$5' if zeros else 'c'};")
        lines.insert(1, f"mov.b32 c, {middle};")
    elif kind == "int8" and bf16:  # 128 and the low seven bits, less 128 or 256
        lines += [
            "lop3.b32 b, a, 0x00800080, 0x43004300, 0xEA;", "lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA;",
            "mov.b32 c, 0xbf80bf80;", f"{fma} a, b, c, a;",
        ]  # fmt: skip
    elif kind == "int8":  # 1024 and the byte with its top bit turned, less 1024 + 128
        lines += [
            "lop3.b32 a, a, 0x00ff00ff, 0x64806480, 0x6A;", "mov.b32 c, 0xe480e480;", f"{fma} a, a, one, c;",
        ]  # fmt: skip
    if kind == "int8" and zeros:
        lines.append(f"{fma} a, a, one, $5;")
    if grouped:
        lines.append(f"{fma} a, a, $3, nothing;")
    return "{" + " ".join(lines) + " mov.b32 $0, a;}"


@triton.jit
def _float(bits, DTYPE: tl.constexpr):
    """The number in fp32 whose 16 bits in DTYPE these are."""
    if tl.bfloat16 == DTYPE:
        return (bits << 16).to(tl.float32, bitcast=True)
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rounded(w, DTYPE: tl.constexpr):
    """To the nearest, as the interpreter's cast to bf16 does not."""
    if tl.bfloat16 == DTYPE:
        bits = w.to(tl.int32, bitcast=True)
        w = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    return w.to(DTYPE)


@triton.jit
def _spelled(code, scale, offset, KIND: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """`_weights` of codes [N, 32] without the instructions of one maker."""
    if KIND == "fp8":
        w = ((code & 127) << 20 | (code >> 7) << 31).to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif KIND == "int8":
        w = ((code ^ 128) - 128).to(tl.float32)
    else:
        w = code.to(tl.float32)
    if KIND == "int4":
        if ZEROS:
            w += _float(offset, DTYPE) + (128.0 if tl.bfloat16 == DTYPE else 1024.0)
        else:
            w -= 8.0
    elif ZEROS:
        w += _float(offset, DTYPE)
    if GROUPED:
        w *= _float(scale, DTYPE)
    return _rounded(w, DTYPE)


@triton.jit
def _weights(
    words, row_ptrs, scale, offset, CODE: tl.constexpr, KIND: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Tile CODE of a step, [N, 32] in DTYPE, of words [N, 32] from rows at row_ptrs [N, 1]. scale and offset, what is
    added to a code: the 16 bits of each number twice in 32, [N, 1]."""
    if PTX:
        w = tl.inline_asm_elementwise(
            assembly(KIND, CODE, tl.bfloat16 == DTYPE, GROUPED, ZEROS), "=r,r,r,r,r,r,r", [words, scale, offset],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
        return w.to(DTYPE, bitcast=True)
    BITS: tl.constexpr = 4 if KIND == "int4" else 8
    i = tl.arange(0, WORDS)[None, :]
    words = tl.load(row_ptrs + i // 2 * 2 + CODE * BITS // 16)
    code = words >> (CODE * BITS % 16 + i % 2 * 16) & ((1 << BITS) - 1)
    return _spelled(code, scale, offset, KIND, GROUPED, ZEROS, DTYPE)


@triton.jit
def _twice(half):
    """The low 16 bits in both halves, of [N] as [N, 1]."""
    return ((half & 0xFFFF) * 0x10001)[:, None]


@triton.jit
def _factors(
    factors_ptr, last, weight_rows, all_rows, step, CODE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
):  # fmt: skip
    """(scale, offset, what was loaded) from tile CODE of a step on, where a group begins there. last: the loaded
    before."""
    group = (step * STEP + CODE * WORDS) // GROUP
    if ZEROS:
        pair = tl.load(factors_ptr + group * all_rows + weight_rows)
        return _twice(pair), _twice(pair >> 16), pair
    EVEN: tl.constexpr = STEP % (2 * GROUP) == 0  # both groups of a pair in one step
    if EVEN and CODE * WORDS % (2 * GROUP) > 0:
        scale = _twice(last >> 16)
        return scale, scale, last
    pair = tl.load(factors_ptr + group // 2 * all_rows + weight_rows)
    scale = _twice(pair) if EVEN else _twice(pair >> (group % 2 * 16))
    return scale, scale, pair


@triton.jit(do_not_specialize=["num_rows", "steps", "splits"])
def packed_kernel(
    x_ptr, words_ptr, factors_ptr, bias_ptr, out_ptr, num_rows, num_columns, inner, steps, stride_x, splits,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATED: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr, UPCAST: tl.constexpr, PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """num_columns: of the output; steps: of a row of the weight. GROUP 0: one scale a row, fp32, for the sum.

    The weight is the left operand: on Hopper it goes from registers into the matrix instructions.
    """
    CODES: tl.constexpr = 8 if KIND == "int4" else 4
    STEP: tl.constexpr = CODES * WORDS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile, split = tl.program_id(1), tl.program_id(2)
    n, i = tl.arange(0, BLOCK_N), tl.arange(0, WORDS)
    if GATED:
        all_rows = 2 * num_columns
        of_half = tile * (BLOCK_N // 2) + n // (2 * ROWS) * ROWS + n % ROWS
        weight_rows = n // ROWS % 2 * num_columns + tl.minimum(of_half, num_columns - 1)
    else:
        all_rows = num_columns
        weight_rows = tl.minimum(tile * BLOCK_N + n, num_columns - 1)
    share = tl.cdiv(steps, splits)
    first = split * share
    row_ptrs = words_ptr + (weight_rows.to(tl.int64) * steps + first)[:, None] * WORDS
    after_fetching_rows(row_ptrs, PIECES, PDL)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * stride_x + first * STEP + i[:, None]
    live = (m < num_rows)[None, :]
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        words = tl.load(row_ptrs + i[None, :])
        scale, offset, pair = words, words, weight_rows
        for code in tl.static_range(CODES):
            if GROUP > 0 and (code * WORDS % GROUP == 0 if GROUP < STEP else code == 0):
                scale, offset, pair = _factors(
                    factors_ptr, pair, weight_rows, all_rows, step, code, STEP, GROUP, ZEROS
                )  # fmt: skip
            if EVEN:
                x = tl.load(x_ptrs + code * WORDS, mask=live, other=0.0)
            else:
                inside = (i < inner - step * STEP - code * WORDS)[:, None]
                x = tl.load(x_ptrs + code * WORDS, mask=live & inside, other=0.0)
            w = _weights(words, row_ptrs, scale, offset, code, KIND, GROUP > 0, ZEROS, DTYPE, PTX)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            z = tl.dot(w, x, z, input_precision="ieee")
        row_ptrs += WORDS
        x_ptrs += STEP
    if GROUP == 0:
        z *= tl.load(factors_ptr + weight_rows)[:, None]
    if bias_ptr is not None:
        z += tl.where(split == 0, tl.load(bias_ptr + weight_rows).to(tl.float32), 0.0)[:, None]
    if GATED:
        z = tl.reshape(z.to(out_ptr.dtype.element_ty).to(tl.float32), (BLOCK_N // (2 * ROWS), 2, ROWS, BLOCK_M))
        gate, up = tl.split(tl.permute(z, (0, 2, 3, 1)))
        z = tl.reshape(gate * tl.sigmoid(gate) * up, (BLOCK_N // 2, BLOCK_M))
        columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        columns = tile * BLOCK_N + n
    out_rows = split.to(tl.int64) * num_rows + m
    out_ptrs = out_ptr + out_rows[None, :] * num_columns + columns[:, None]
    tl.store(out_ptrs, z.to(out_ptr.dtype.element_ty), mask=live & (columns < num_columns)[:, None])


@triton.jit(do_not_specialize=["num_rows", "steps"])
def dense_kernel(
    words_ptr, factors_ptr, out_ptr, num_rows, inner, steps, all_rows, stride_out,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A step of BLOCK_N rows of the weight, in the dtype of out. SCALED: times the one scale of a row, if GROUP is 0.

    num_rows: of these rows; all_rows: of the weight.
    """
    after_earlier_kernels(PDL)
    CODES: tl.constexpr = 8 if KIND == "int4" else 4
    STEP: tl.constexpr = CODES * WORDS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    step = tl.program_id(0)
    n, i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WORDS)
    live = (n < num_rows)[:, None]
    n = tl.minimum(n, num_rows - 1)
    row_ptrs = words_ptr + (n.to(tl.int64) * steps + step)[:, None] * WORDS
    out_ptrs = out_ptr + n.to(tl.int64)[:, None] * stride_out + step * STEP + i[None, :]
    words = tl.load(row_ptrs + i[None, :])
    scale, offset, pair = words, words, n
    for code in tl.static_range(CODES):
        if GROUP > 0 and (code * WORDS % GROUP == 0 if GROUP < STEP else code == 0):
            scale, offset, pair = _factors(factors_ptr, pair, n, all_rows, step, code, STEP, GROUP, ZEROS)
        w = _weights(words, row_ptrs, scale, offset, code, KIND, GROUP > 0, ZEROS, DTYPE, PTX)
        if GROUP == 0 and SCALED:
            one = _rounded(tl.load(factors_ptr + n), DTYPE).to(tl.float32)
            w = _rounded(w.to(tl.float32) * one[:, None], DTYPE)
        if EVEN:
            tl.store(out_ptrs + code * WORDS, w, mask=live)
        else:
            tl.store(out_ptrs + code * WORDS, w, mask=live & (i < inner - step * STEP - code * WORDS)[None, :])
