"""All benches of record, on one GPU and on all that are there: `make bench` runs this.

Writes bench/results and the README's tables.

    python bench/suite.py --prompts mt_bench.jsonl gsm8k.jsonl humaneval.jsonl

Every bench is a process of its own. One that fails is named at the end, and the others are run all the same. The pair
(SmolLM2-135M-Instruct and the head that the package ships) is measured where its model is in the user's cache, as after
`make demo`, and prompt files are given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lib.records import RESULTS, environment, write
from report import BATCH, EXCHANGE, OVER_TWO, OVER_TWO_70B, README, SHAPES, render

from eagle_fast.pairs import SMOLLM2, smollm2_head, user_cache

HERE = Path(__file__).parent
SMALLER = ("--tree", "32", "6", "8")
ROUNDS = {  # record -> arguments of round.py
    "round-llama-3.1-8b": ["llama-3.1-8b"],
    "round-llama-3.1-8b-t1": ["llama-3.1-8b", "--temperature", "1"],
    "round-llama-3.1-8b-8k": ["llama-3.1-8b", "--context", "8192"],
    "round-llama-3.1-8b-32k": ["llama-3.1-8b", "--context", "32768"],
    "round-llama-3.1-8b-batch8": ["llama-3.1-8b", "--batch", "8"],
    "round-llama-3.1-8b-8bits": ["llama-3.1-8b", "--target-bits", "8"],
    "round-llama-3.1-8b-4bits": ["llama-3.1-8b", "--target-bits", "4", *SMALLER],
    "round-llama-3.1-8b-4bits-lm-head": ["llama-3.1-8b", "--target-bits", "4", "--lm-head-bits", "8", *SMALLER],
    "round-llama-3.2-1b": ["llama-3.2-1b"],
    "round-qwen3-8b": ["qwen3-8b"],
    "round-qwen3-32b": ["qwen3-32b"],
    "round-smollm2-135m": ["smollm2-135m"],
}
BITS = {  # record -> arguments of bits.py
    "bits-llama-3.1-8b": [],
    "bits-llama-3.1-8b-float16": ["--dtype", "float16"],
}
ON_TWO = {  # the same where there are two GPUs, and beside them on one, or with half of the layers on each
    OVER_TWO: ["llama-3.1-8b", "--tensor-parallel", "2"],
    f"{OVER_TWO}-32k": ["llama-3.1-8b", "--tensor-parallel", "2", "--context", "32768"],
    f"{OVER_TWO}-beside": ["llama-3.1-8b"],
    OVER_TWO_70B: ["llama-3.3-70b", "--tensor-parallel", "2"],
    f"{OVER_TWO_70B}-beside": ["llama-3.3-70b", "--device-map", "2"],
}
LOSSLESS = ("float32", "bfloat16", "float16")
OVER_SEVERAL = ("llama-3.1-8b", "llama-3.3-70b")  # over 2, 4 and 8 GPUs, where there are as many


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="*", type=Path, default=[], metavar="FILE", help="for the pair")
    parser.add_argument("--only", nargs="+", metavar="RECORD", help="just the records whose names begin so")
    parser.add_argument("--upstream", default="", metavar="PATH", help="see round.py; timed beside the first record")
    parser.add_argument("--upstream-python", default=sys.executable, metavar="COMMAND")
    parser.add_argument("--commit", default="", help="to note in the records, instead of what git says")
    return parser.parse_args()


def run(script: str, *arguments: str) -> bool:
    command = [sys.executable, str(HERE / script), *arguments]
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def rounds() -> dict[str, list[str]]:
    """Record -> arguments of round.py, for this machine."""
    counts = [count for count in (2, 4, 8) if count <= torch.cuda.device_count()]
    several = {
        f"round-{shape}-{count}gpus": [shape, "--device-map", str(count)] for count in counts for shape in OVER_SEVERAL
    }
    return ROUNDS | several | (ON_TWO if counts else {})


def run_round(name: str, args: argparse.Namespace) -> bool:
    arguments = [*rounds()[name], "--out", str(RESULTS / f"{name}.json"), "--commit", args.commit]
    if args.upstream and name == next(iter(ROUNDS)):
        arguments += ["--upstream", args.upstream, "--upstream-python", args.upstream_python]
    return run("round.py", *arguments)


def run_bits(name: str, args: argparse.Namespace) -> bool:
    return run("bits.py", *BITS[name], "--out", str(RESULTS / f"{name}.json"), "--commit", args.commit)


def run_ops(args: argparse.Namespace) -> bool:
    if not run("ops.py", "--out", str(RESULTS)):
        return False
    for path in RESULTS.glob("ops*.json"):
        complete(path, args)
    return True


def complete(path: Path, args: argparse.Namespace, **more) -> None:
    """Say in a record where it comes from."""
    write({**json.loads(path.read_text()), **more, **environment(args.commit)}, path)


def pair_arguments(args: argparse.Namespace) -> list[str]:
    target = user_cache() / SMOLLM2
    return ["--model", str(target), "--head", str(smollm2_head()), "--prompts", *map(str, args.prompts)]


def run_decode(args: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if not run("decode.py", *pair_arguments(args), "--out", folder):
            return False
        for kind in ("json", "png"):
            shutil.copy(Path(folder) / f"decode.{kind}", RESULTS / f"decode-smollm2-135m.{kind}")
    complete(RESULTS / "decode-smollm2-135m.json", args, model=SMOLLM2, head=f"eagle_fast/heads/{SMOLLM2}")
    return True


def of_pair() -> dict[str, list[str]]:
    """Record -> script and its arguments; each writes its own record."""
    count = torch.cuda.device_count()
    several = {f"placements-smollm2-135m-{count}gpus": ["placements.py"]} if count > 1 else {}
    return {
        **{f"lossless-{dtype}": ["lossless.py", "--chat", "--dtype", dtype] for dtype in LOSSLESS},
        "int8-head-smollm2-135m": ["int8_head.py"],
        BATCH: ["batch.py", "--shape", "none"],
        **several,
    }


def run_of_pair(name: str, args: argparse.Namespace) -> bool:
    path, arguments = RESULTS / f"{name}.json", of_pair()[name]
    if not run(*arguments, *pair_arguments(args), "--out", str(path)):
        return False
    complete(path, args, model=SMOLLM2, head=f"eagle_fast/heads/{SMOLLM2}")
    return True


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("bench: the benches of record need a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 1
    benches = {name: lambda name=name: run_round(name, args) for name in rounds()}
    benches |= {name: lambda name=name: run_bits(name, args) for name in BITS}
    if torch.cuda.device_count() > 1:
        benches[EXCHANGE] = lambda: run(
            "exchange.py", "llama-3.1-8b", "--out", str(RESULTS / f"{EXCHANGE}.json"), "--commit", args.commit
        )
    benches[SHAPES] = lambda: run("batch.py", "--out", str(RESULTS / f"{SHAPES}.json"), "--commit", args.commit)
    benches["ops"] = lambda: run_ops(args)
    if args.prompts and (user_cache() / SMOLLM2 / "model.safetensors").is_file():
        benches["decode-smollm2-135m"] = lambda: run_decode(args)
        benches |= {name: lambda name=name: run_of_pair(name, args) for name in of_pair()}
    else:
        print(f"bench: the pair is left out: {SMOLLM2} is not in {user_cache()} (make demo), or no --prompts")
    wanted = [name for name in benches if not args.only or name.startswith(tuple(args.only))]
    failed = [name for name in wanted if not benches[name]()]
    README.write_text(render(README.read_text()))
    if failed:
        print(f"bench: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
