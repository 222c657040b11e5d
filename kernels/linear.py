"""Products of a few rows with a large weight: out [R, N] = x [R, K] weight[N, K]^T.

Bytes: the weight once, 2 N K in bf16; at R up to 60 that is the whole cost on an H100 (floor 5 ms for 7.5 B weights at
3.08 TB/s). On a GPU this is cuBLAS for now.

On a CPU the BLAS that torch ships is slow at 2 to 30 rows: it packs the weight for a tall x. With the operands swapped
the weight is the tall one. 240 projections of a 135M model in fp32, 2 cores, ms (1 row: 36 either way):

    rows                 8     12     16     24
    x @ weight.T        81    105    109    128
    (weight @ x.T).T    45     78     69    100
"""

from __future__ import annotations

import torch

MOST_ROWS = 32
ROW_STEP = 8  # whole vectors of rows are fast, what is left over is not


def few_rows_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N], by the faster of two ways to say it."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or not 1 < rows <= MOST_ROWS:
        return x @ weight.T
    flat = x.reshape(rows, -1)
    padding = -rows % ROW_STEP
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding, flat.shape[1])])
    return (weight @ flat.T)[:, :rows].T.contiguous().view(*x.shape[:-1], -1)
