"""Which code runs: the release, and the commit where that is known."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from server import __version__

_COMMIT = re.compile(r"[0-9a-f]{7,64}")


@cache
def code_version() -> str:
    """`0.1.0+COMMIT` in a checkout, or where POLYHELM_COMMIT says it, as an image's build may; else `0.1.0`."""
    commit = os.environ.get("POLYHELM_COMMIT") or commit_of(Path(__file__).parents[1] / ".git")
    return f"{__version__}+{commit}" if commit and _COMMIT.fullmatch(commit) else __version__


def commit_of(git: Path) -> str | None:
    """What HEAD of a repository points at, read from its files; None where that isn't one."""
    head = _text(git / "HEAD")
    if head is None or not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    packed = (line.split(" ", 1) for line in (_text(git / "packed-refs") or "").splitlines() if " " in line)
    return _text(git / name) or next((commit for commit, ref in packed if ref == name), None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None
