"""docs/results.md: one section per script, which replaces its own and leaves the others alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
PAGE = BENCHMARKS.parent / "docs" / "results.md"
HEAD = """# What the methods do

Each section is made by the script that it names; don't edit. Every number is in `benchmarks/results/`. The data is not
part of polyhelm: each script says where it comes from and takes its folder as an argument.
"""


def publish(script: str, results: dict[str, Any], section: str) -> None:
    """Write `results/SCRIPT.json` and the script's section, which begins with its heading."""
    (RESULTS / f"{script}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    begin, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->\n"
    block = f"{begin}{section.strip()}\n{end}"
    page = PAGE.read_text("utf-8") if PAGE.exists() else HEAD
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    known = pattern.search(page)
    page = pattern.sub(lambda _: block, page) if known else f"{page.rstrip()}\n\n{block}"
    PAGE.write_text(page, "utf-8")
