"""Packed weights of every kind from random codes, and the dense ones that they stand for, said another way."""

import torch
from eagle_fast_kernels.many_rows import cancel
from eagle_fast_kernels.packed import pack

# name -> (kind, columns of a group or None for all, zero points, ragged last group)
KINDS = {
    "int4, groups of 32": ("int4", 32, False),
    "int4, groups of 64": ("int4", 64, False),
    "int4, groups of 128": ("int4", 128, False),
    "int4, zeros": ("int4", 64, True),
    "int4, a scale a row": ("int4", None, False),
    "int8, a scale a row": ("int8", None, False),
    "int8, groups of 64": ("int8", 64, False),
    "int8, zeros": ("int8", 32, True),
    "fp8, a scale a row": ("fp8", None, False),
    "fp8, blocks of 128": ("fp8", 128, False),
}


def packed_case(name, num_rows, columns, dtype=torch.float32, device="cpu", seed=0):
    """(packed weight, dtype -> the dense one, what `pack` was given). The last group is ragged where columns say so."""
    kind, size, has_zeros = KINDS[name]
    size = min(size or columns, columns)
    groups = -(-columns // size)
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def integers(most, *shape):
        return torch.randint(0, most, shape, dtype=torch.uint8, **options)

    codes = integers(16 if kind == "int4" else 256, num_rows, columns)
    zeros = integers(16 if kind == "int4" else 256, num_rows, groups) if has_zeros else None
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # not numbers
        codes = codes.view(torch.float8_e4m3fn)
    largest = {"int4": 8, "int8": 128, "fp8": 256}[kind]
    scales = (torch.rand(num_rows, groups, **options) + 0.5).to(dtype) * columns**-0.5 / largest
    given = {"codes": codes, "scales": scales, "zeros": zeros}

    def dense(dtype):
        column = torch.arange(columns, device=device) // size
        middle = {"int4": 8.0, "int8": 128.0, "fp8": 0.0}[kind]
        zero = given["zeros"].double()[:, column] if has_zeros else middle
        exact = (given["codes"].double() - zero) * given["scales"].to(dtype).double()[:, column]
        return exact.float().to(dtype)  # the products have at most 24 bits, in fp32 as many as are kept

    return pack(**given, kind=kind, group_size=size), dense, given


def cancelling_case(name, num_rows, columns, rows, dtype, device, seed=7):
    """(x [rows, K], packed weight): all that is left of their product is its roundings. One scale and zero a row."""
    kind, size, has_zeros = KINDS[name]
    size = min(size or columns, columns)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    x = torch.randn(rows, columns, **options).to(dtype)
    most = 16 if kind == "int4" else 256
    codes = torch.randint(0, most, (num_rows, columns), dtype=torch.uint8, **options)
    if kind == "fp8":
        codes[codes & 127 == 127] = 0
    cancel(x, codes, generator)
    scales = (torch.rand(num_rows, 1, **options) + 0.5).expand(-1, -(-columns // size))
    zeros = torch.randint(0, most, (num_rows, 1), dtype=torch.uint8, **options).expand_as(scales) if has_zeros else None
    given = codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes
    return x, pack(given, scales, kind=kind, zeros=zeros, group_size=size)
