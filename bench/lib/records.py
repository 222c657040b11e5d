"""Records of benches: one JSON file each, with what is needed to tell where its figures come from."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"


def environment(commit: str = "") -> dict:
    """Hardware, versions, day and commit of a run; `commit` names the code where there is no git checkout to ask."""
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "commit": commit or git_commit(ROOT) or "unknown",
    }


def git_commit(folder: Path) -> str:
    """The commit of the git checkout whose top `folder` is, with a + where its code was changed; else nothing."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not folder.is_dir() or Path(git("rev-parse", "--show-toplevel") or "/").resolve() != folder.resolve():
            return ""  # no checkout, or a copy inside another one
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:  # git is not installed
        return ""


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
