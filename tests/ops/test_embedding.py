"""Rows of packed tables, alone and as a head's input."""

import pytest
import torch
from eagle_fast_kernels import draft_head
from eagle_fast_kernels.embedding import embedding_rows
from no_gpu import run_program
from packed_weights import packed_case

WAYS = pytest.mark.parametrize("way", ["ref", "triton"])


def table(columns, device, num_rows=9):
    """(a packed table, the numbers that it holds in fp64)."""
    packed, _, given = packed_case("int8, a scale a row", num_rows, columns, device=device)
    return packed, (given["codes"].double() - 128) * given["scales"].double()


@WAYS
@pytest.mark.parametrize("columns", [48, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_are_numbers_times_scales_rounded_once(columns, dtype, way, monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    packed, dense = table(columns, device)
    tokens = torch.tensor([[4, 0, 8], [4, 4, 1]], device=device)
    found = embedding_rows(tokens, packed, dtype)
    assert torch.equal(found, dense.float().to(dtype)[tokens])
    assert embedding_rows(tokens[:0], packed, dtype).shape == (0, 3, columns)


def test_rows_in_bfloat16(device):
    packed, dense = table(128, device)
    tokens = torch.arange(9, device=device)
    assert torch.equal(embedding_rows(tokens, packed, torch.bfloat16), dense.float().bfloat16())


@WAYS
@pytest.mark.parametrize("normed", [True, False])
def test_a_head_reads_a_packed_table_as_the_dense_one(normed, way, monkeypatch, device):
    monkeypatch.setenv("EAGLE_FAST_KERNELS", way)
    packed, dense = table(96, device)
    hidden, tokens = torch.randn(3, 48, device=device), torch.tensor([4, 0, -1], device=device)
    norms = (torch.rand(96, device=device) + 0.5, torch.rand(48, device=device) + 0.5) if normed else (None, None)
    for rows in (None, torch.tensor([2, 0, 2], device=device)):
        found = draft_head.head_input(tokens, hidden, packed, *norms, 1e-5, rows)
        expected = draft_head.head_input(tokens, hidden, dense.float(), *norms, 1e-5, rows)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_other_tables_are_refused():
    tokens = torch.zeros(2, dtype=torch.long)
    for name in ("int4, a scale a row", "int8, groups of 64", "int8, zeros", "fp8, a scale a row"):
        with pytest.raises(ValueError, match="table is packed as"):
            embedding_rows(tokens, packed_case(name, 4, 256)[0], torch.float32)
        with pytest.raises(ValueError, match="embedding is packed as"):
            draft_head.head_input(tokens, torch.randn(2, 8), packed_case(name, 4, 256)[0])


COMPILE = """
import sys, torch
from no_gpu import overlap_of, pretend, recorded

capability = int(sys.argv[1])

pretend(capability)
from eagle_fast_kernels import draft_head, embedding
from packed_weights import packed_case

compiled = recorded((draft_head, "_head_input_kernel"), (embedding, "_embedding_kernel"))
for module in (draft_head, embedding):
    module.use_triton = lambda *tensors: True
    module.dependent_launch = lambda device: overlap_of(capability)
packed, _, _ = packed_case("int8, a scale a row", 16, 1024)
tokens = torch.zeros(2, dtype=torch.long)
for dtype in (torch.bfloat16, torch.float16):
    embedding.embedding_rows(tokens, packed, dtype)
    hidden, norm = torch.zeros(2, 512, dtype=dtype), torch.zeros(1024, dtype=dtype)
    for rows in (None, tokens):
        for table in (packed, torch.zeros(16, 1024, dtype=dtype)):
            draft_head.head_input(tokens, hidden, table, norm, None, 1e-5, rows)
print("compiled", len(compiled))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_on_any_machine(capability):
    done = run_program(COMPILE, capability)
    assert done.stdout.split() == ["compiled", "10"], done.stderr[-3000:]
