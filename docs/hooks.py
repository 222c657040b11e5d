"""For mkdocs: the table of models, from those that the tests run (`tests/support/zoo.py`), and bench/results' plots."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- families -->"


def on_files(files, config):
    """The plots of bench/results, as plots/NAME.png."""
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"plots/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Put the tables where a page has the mark."""
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def tables() -> str:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    try:
        from zoo import FAMILIES, REFUSED
    finally:
        sys.path.pop(0)
    from eagle_fast.target.anatomy import LLAMA_LAYERS

    fused = {name.removesuffix("DecoderLayer").lower() for name in LLAMA_LAYERS}
    by_type: dict[str, list[str]] = {}
    for name, settings in FAMILIES.items():
        by_type.setdefault(settings.get("of", name), []).append(name)
    lines = ["| `model_type` | tried as | decoder layers |", "| --- | --- | --- |"]
    for kind, names in sorted(by_type.items()):
        lines.append(f"| `{kind}` | {', '.join(names)} | {'fused' if kind in fused else 'stock'} |")
    refused = sorted({settings.get("of", name) if name not in ("llama_dynamic_rope",) else name
                      for name, settings in REFUSED.items()})  # fmt: skip
    return "\n".join([*lines, "", "Refused when they are loaded: " + ", ".join(f"`{each}`" for each in refused) + "."])
