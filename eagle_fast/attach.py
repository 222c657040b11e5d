"""`eagle-fast attach`: a model's folder with a draft head in it, for tools that load models by themselves.

FOLDER gets links to the files of MODEL, links to those of HEAD in FOLDER/eagle_head, and a few lines in
FOLDER/custom_generate/generate.py, which transformers runs in the place of its own `generate` where a tool loads the
folder with trust_remote_code=True. Nothing is copied. Both may be folders or names on the hub.

    eagle-fast attach meta-llama/Llama-3.1-8B-Instruct yuhuili/EAGLE3-LLaMA3.1-Instruct-8B llama-with-head

    transformers serve llama-with-head --trust-remote-code             # any OpenAI client in front
    lm_eval --model hf --model_args pretrained=llama-with-head,trust_remote_code=True --tasks gsm8k

    model = AutoModelForCausalLM.from_pretrained("llama-with-head", trust_remote_code=True)
    model.generate(**inputs)                                           # with the head, the same text
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download

from eagle_fast.config import TreeConfig
from eagle_fast.head.checkpoint import check_folder
from eagle_fast.loading import known_path
from eagle_fast.loading_errors import find_damage, loading

HEAD = "eagle_head"
HOOK = '''"""The draft head in {head}, through transformers' custom_generate: written by `eagle-fast attach`."""

from eagle_fast.attached import hook

generate = hook("{head}", total_token={tree.total_token}, depth={tree.depth}, top_k={tree.top_k})
'''
NOT_LINKED = (".git", ".cache", "custom_generate", HEAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the target: a folder, or a name on the hub")
    parser.add_argument("head", metavar="HEAD", help="its draft head: a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", help="where to; must not be there yet, or be empty")
    default = TreeConfig()
    for name, what in (("total_token", "nodes of the draft tree"), ("depth", "its depth"), ("top_k", "its width")):
        value = getattr(default, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=value, metavar="N", help=f"{what} (default {value})")


def run(args: argparse.Namespace) -> int:
    attach(args.model, args.head, args.folder, TreeConfig(args.total_token, args.depth, args.top_k))
    print(f"{args.folder}: load it with trust_remote_code=True, `transformers serve` with --trust-remote-code")
    return 0


def attach(model: str, head: str, folder: str | Path, tree: TreeConfig | None = None) -> None:
    """Write the folder. ValueError for a model, a head or a place that won't do."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"FOLDER={str(place)!r} is there already: give another name, or remove it first")
    source, drafter = _local("MODEL", model), _local("HEAD", head)
    damage = find_damage(source)
    if damage:
        raise ValueError(f"MODEL={model!r} {damage}")
    check_folder(str(drafter))
    (place / HEAD).mkdir(parents=True)
    (place / "custom_generate").mkdir()
    for target, into in ((source, place), (drafter, place / HEAD)):
        for each in sorted(target.iterdir()):
            if each.name not in NOT_LINKED:
                (into / each.name).symlink_to(each.absolute())
    text = HOOK.format(head=HEAD, tree=tree or TreeConfig())
    (place / "custom_generate" / "generate.py").write_text(text, encoding="utf-8")


def _local(name: str, given: str) -> Path:
    path = known_path(name, given)
    if Path(path).is_dir():
        return Path(path)
    with loading(name, path, {}):
        return Path(snapshot_download(path, ignore_patterns=["*.gguf", "original/*", "*.onnx", "*.msgpack", "*.h5"]))
