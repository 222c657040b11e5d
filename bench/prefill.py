"""Time to take in a prompt, against the stock model's own forward with SDPA.

    python bench/prefill.py llama-3.1-8b --context 8192

Random weights at real shapes. Ours fills the target's cache and the draft head's; the stock forward returns a cache and
the logits of the last token. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from round import begin
from shapes import SHAPES, build_head, build_target

from eagle_fast import EaModel, TreeConfig
from eagle_fast.round import Round


def median(work: Callable[[], object], repeats: int) -> float:
    """Milliseconds between two events around `work`; the host runs ahead of what takes this long."""
    times = []
    for repeat in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if repeat:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="whose shapes the target has")
    parser.add_argument("--context", type=int, nargs="+", default=[8192], metavar="L", help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    args = parser.parse_args()
    target, tree, rows = build_target(args.shape, "cuda"), TreeConfig(), []
    target.set_attn_implementation("sdpa")
    tokens = torch.randint(0, target.config.vocab_size, (args.batch, max(args.context)), device="cuda")
    for length in args.context:
        ids = tokens[:, :length]
        stock = median(lambda ids=ids: target(input_ids=ids, use_cache=True, logits_to_keep=1), args.repeats)
        rows.append({"context": length, "stock_ms": round(stock, 2)})
    model = EaModel(target, build_head(target), tree=tree)
    for row in rows:
        for name, head in (("prefill_ms", model.ea_layer), ("target_alone_ms", None)):
            state = Round(model.target, head, tree, args.batch, row["context"] + tree.max_path)
            row[name] = round(median(lambda state=state, row=row: begin(state, row["context"], 0.0), args.repeats), 2)
            del state
        row["over_stock"] = round(row["prefill_ms"] / row["stock_ms"], 3)
        print(
            f"{args.shape}, B={args.batch}, {row['context']} tokens: {row['prefill_ms']:.1f} ms, of it the target "
            f"{row['target_alone_ms']:.1f}; stock with SDPA {row['stock_ms']:.1f}; ratio {row['over_stock']:.2f}"
        )
    record = {"bench": "prefill", "shape": args.shape, "batch": args.batch, "rows": rows}
    print(json.dumps(record | {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
