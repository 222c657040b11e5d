"""`pytest --failures FILE`: what went wrong in each test, with its whole message, written to a file as it happens.

A run on a machine that may end it at any moment leaves what it found until then.
"""

from __future__ import annotations

from pathlib import Path

import pytest


class Failures:
    """A plugin that writes for each failure its test, where in the code it was, and all that the errors say."""

    def __init__(self, file: Path):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            if report.failed:
                lines.write(f"{report.nodeid} ({report.when}, {report.duration:.1f} s)\n{_told(report.longrepr)}\n\n")
            elif report.when == "call":
                lines.write(f"{report.nodeid}: {report.outcome} ({report.duration:.1f} s)\n")


def _told(longrepr) -> str:
    chain = getattr(longrepr, "chain", None)
    if chain is None:
        return str(longrepr)
    said = []
    for traceback, crash, _ in chain:
        places = [each.reprfileloc for each in traceback.reprentries if getattr(each, "reprfileloc", None)]
        said += [f"    {place.path}:{place.lineno}" for place in places]
        said += [] if crash is None else [f"  {crash.message}"]
    return "\n".join(said)
