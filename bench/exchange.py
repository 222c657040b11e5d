"""What the exchanges of ranks cost: a verify over all of them, less that of a rank's part which adds up nothing.

    python bench/exchange.py llama-3.1-8b --context 512 --rows 60

    verify   of so many tree nodes over the ranks, as a CUDA graph a rank
    apart    the same without exchanges: each rank adds its own product to the residual. No text comes of that
    an exchange takes the difference, over the two of every layer

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from eagle_fast_kernels.rms_norm import add_rms_norm
from lib.records import environment, write
from lib.shapes import SHAPES, build_cut_target
from lib.timing import milliseconds

from eagle_fast.decoding.tree import chain_masks
from eagle_fast.layers.attention import TreeStep
from eagle_fast.layers.links import Links
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.ranked import RankedTarget


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="whose shapes the target has")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="GPUs (default %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 1], metavar="T", help="nodes (default 60, then 1)")
    parser.add_argument("--context", type=int, default=512, metavar="L", help="tokens before them (default 512)")
    parser.add_argument("--repeats", type=int, default=50, metavar="N")
    parser.add_argument("--commit", default="", help="to note in the record, instead of what git says")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


@contextmanager
def apart(links: Links) -> Iterator[None]:
    """Sums of each rank alone."""

    def add_alone(products, residuals, weights, eps):
        sums = [add_rms_norm(*each, eps) for each in zip(products, residuals, weights, strict=True)]
        return [normed for normed, _ in sums], [total for _, total in sums]

    links.add_rms_norm = add_alone  # type: ignore[method-assign]
    try:
        yield
    finally:
        del links.add_rms_norm


@torch.no_grad()
def measure(target: RankedTarget, rows: int, args: argparse.Namespace) -> dict:
    """A chain of so many nodes: what a verify takes depends on their number alone."""
    device = target.device
    cache = target.new_cache(1, -(-(args.context + rows) // 64) * 64)
    tokens = torch.randint(0, target.vocab_size, (1, rows), device=device)
    depths = torch.arange(rows, device=device)[None]
    step = TreeStep(torch.full((1,), args.context, device=device), chain_masks(rows, device)[None], depths)

    def verify() -> None:
        target.verify(tokens, step, cache)

    took = {"verify": milliseconds(verify, args.repeats, target.devices, target.links)}
    with apart(target.links):
        took["apart"] = milliseconds(verify, args.repeats, target.devices, target.links)
    exchanges = 2 * target.anatomy.num_layers
    cost = (took["verify"] - took["apart"]) / exchanges * 1e3
    return {
        "rows": rows, **{f"{name}_ms": round(each, 4) for name, each in took.items()}, "exchanges": exchanges,
        "exchange_us": round(cost, 2),
    }  # fmt: skip


def main() -> None:
    args = parse()
    model = build_cut_target(args.shape, [torch.device("cuda", rank) for rank in range(args.ranks)])
    cut = cut_of(model)
    assert cut is not None
    target = RankedTarget(model, cut.ranks, cut.order)
    table = [measure(target, rows, args) for rows in args.rows]
    print(f"{args.shape} over {args.ranks} GPUs, context {args.context}, {torch.cuda.get_device_name(0)}")
    print(f"{'rows':>6}{'verify, ms':>12}{'apart, ms':>12}{'an exchange, us':>17}")
    for row in table:
        print(f"{row['rows']:>6}{row['verify_ms']:>12.3f}{row['apart_ms']:>12.3f}{row['exchange_us']:>17.2f}")
    record = {
        "bench": "exchange", "shape": args.shape, "tensor_parallel": args.ranks, "context": args.context,
        "table": table, **environment(args.commit),
    }  # fmt: skip
    if args.out:
        write(record, args.out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
