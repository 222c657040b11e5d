"""Would another tile be faster? The kernel of `linear.py` over a weight, under other tiles than `weight_tile` gives it.

    python bench/tiles.py 14336x4096:gated 4096x7168:parts 3072x4096:parts --rows 60

A weight is N x K, followed by how its product is asked for: whole (the default), in parts of K, or gated. For every
tile that fits: its time with weights that are not in L2, the share of the bandwidth that is, and whether the product
has the bits of the tile that is taken now. Parts of K are part of a tile: with others the bits are others, in all
products with that weight alike. Sorted by time, the tile that is taken now first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from eagle_fast_kernels import linear
from eagle_fast_kernels.linear import Tile, weight_tile
from lib.records import environment, write
from lib.timing import bandwidth, milliseconds
from torch import Tensor
from triton.runtime.errors import OutOfResources

HOW = ("whole", "parts", "gated")
COLD = 2**28  # bytes of different weights in a row: several times what L2 holds
BLOCKS, COLUMNS, WARPS, STAGES, SPLITS = (32, 64, 128), (64, 128), (4, 8), (3, 4, 5, 6), (1, 2, 3, 4)


class Product(NamedTuple):
    """A weight [N, K] and how its product is asked for."""

    rows: int
    columns: int
    how: str

    @classmethod
    def read(cls, text: str) -> Product:
        sizes, _, how = text.partition(":")
        try:
            rows, columns = map(int, sizes.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no N x K, as 4096x7168 or 4096x7168:parts") from None
        if (how or "whole") not in HOW:
            raise argparse.ArgumentTypeError(f"{text!r}: what follows the colon is one of {', '.join(HOW)}")
        return cls(rows, columns, how or "whole")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("products", nargs="+", type=Product.read, metavar="NxK[:how]")
    parser.add_argument("--rows", type=int, default=60, metavar="R", help="of x (default %(default)s)")
    parser.add_argument("--best", type=int, default=8, metavar="N", help="tiles of each that are shown (default 8)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--out", type=Path, help="all of them, as JSON")
    return parser.parse_args()


def tiles(product: Product, taken: Tile) -> Iterator[Tile]:
    """The one that is taken, and others. K is cut into parts where they are asked for, evenly."""
    yield taken
    splits = [s for s in SPLITS if product.columns % (s * taken.block_k) == 0] if product.how == "parts" else [1]
    for block_n, block_k, warps, stages, parts in itertools.product(BLOCKS, COLUMNS, WARPS, STAGES, splits):
        tile = Tile(taken.block_m, block_n, block_k, parts, warps, stages)
        if tile != taken and product.columns % (block_k * parts) == 0:
            yield tile


def multiply(x: Tensor, weight: Tensor, tile: Tile, how: str) -> Tensor:
    """The kernel's product [R, N], in parts [S, R, N] or gated [R, N / 2]."""
    shape = {"whole": (len(x), len(weight)), "parts": (tile.splits, len(x), len(weight))}
    out = x.new_empty(shape.get(how, (len(x), len(weight) // 2)), dtype=torch.float32 if how == "parts" else x.dtype)
    linear._launch(x, weight, None, None, out, tile, gated=how == "gated")
    return out


@torch.no_grad()
def measure(product: Product, args: argparse.Namespace, rate: float, device: str = "cuda") -> list[dict]:
    """A row for each tile that fits. rate: bytes a second."""
    size = product.rows * product.columns * 2
    weights = [
        torch.randn(product.rows, product.columns, device=device, dtype=torch.bfloat16)
        for _ in range(max(2, -(-COLD // size)))
    ]
    x = torch.randn(args.rows, product.columns, device=device, dtype=torch.bfloat16)
    taken = weight_tile(weights[0], args.rows, split=product.how == "parts")
    expected, found = multiply(x, weights[0], taken, product.how), []
    for tile in tiles(product, taken):
        try:
            same = torch.equal(multiply(x, weights[0], tile, product.how), expected)
            took = milliseconds(lambda tile=tile: [multiply(x, w, tile, product.how) for w in weights], args.repeats)
        except OutOfResources:
            continue
        us = took / len(weights) * 1e3
        found.append({"tile": list(tile), "us": round(us, 2), "share": round(size / rate / us * 1e6, 3), "same": same})
    return found[:1] + sorted(found[1:], key=lambda row: row["us"])


def main() -> None:
    args = parse()
    rate, table = bandwidth(), []
    for product in args.products:
        rows = measure(product, args, rate)
        table.append({"product": list(product), "tiles": rows})
        print(f"\n{product.rows} x {product.columns}, {product.how}, {args.rows} rows of x")
        print(f"{'rows, columns, step, parts, warps, stages':<44}{'us':>8}{'bandwidth':>11}   bits")
        for row in rows[: 1 + args.best]:
            print(f"{row['tile']!s:<44}{row['us']:>8.2f}{row['share']:>10.0%}   {'same' if row['same'] else 'others'}")
    record = {"bench": "tiles", "rows": args.rows, "table": table, **environment()}
    if args.out:
        write(record, args.out)
    print(json.dumps({**record, "table": [{**each, "tiles": each["tiles"][: 1 + args.best]} for each in table]}))


if __name__ == "__main__":
    main()
