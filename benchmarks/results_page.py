"""docs/results.md: one section per script, which replaces its own and leaves the others alone.

.venv/bin/python benchmarks/results_page.py      # write the whole page again, from results/*.json

With POLYHELM_BENCH_OUT set to a folder, results and page are written there: for a trial run.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
PAGE = BENCHMARKS.parent / "docs" / "results.md"
SCRIPTS = (
    "incline_alignment",
    "incline_effect",
    "sadi_effect",
    "lf_steering_sae",
    "lf_steering_effect",
    "expertsteer_effect",
    "shared_neurons",
    "rfm_comparison",
    "remake_mzsre",
    "methods_cost",
)
"""In the order of the page. Each has a function `section` from its results to Markdown."""
HEAD = """# What the methods do

Each section is made by the script that it names; don't edit. Every number is in `benchmarks/results/`. The data is not
part of polyhelm: each script says where it comes from and takes its folder as an argument. Sizes are those of small
models on one CPU; an interval that holds 0 is a result, too. Other programs ran on the same machine, so that only times
measured in turns are to be compared.
"""


def publish(script: str, results: dict[str, Any], section: str) -> None:
    """Write `results/SCRIPT.json` and the script's section, which begins with its heading."""
    folder, page = _places()
    (folder / f"{script}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    _write({**_sections(page), script: section}, page)


def _places() -> tuple[Path, Path]:
    """The folder of the results, and the page."""
    if (trial := os.environ.get("POLYHELM_BENCH_OUT")) is None:
        return RESULTS, PAGE
    folder = Path(trial)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, folder / PAGE.name


def _sections(file: Path) -> dict[str, str]:
    """By script, those that the page has."""
    page = file.read_text("utf-8") if file.exists() else ""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end of \1 -->\n", page, re.S))


def _write(sections: dict[str, str], page: Path) -> None:
    blocks = [
        f"\n<!-- {name} -->\n{_wrapped(sections[name])}\n<!-- end of {name} -->\n"
        for name in SCRIPTS
        if name in sections
    ]
    missing = ", ".join(f"`benchmarks/{name}.py`" for name in SCRIPTS if name not in sections)
    note = f"\n{_wrapped(f'Without results yet: {missing}.')}\n" if missing else ""
    page.write_text(HEAD + note + "".join(blocks), "utf-8")


def _wrapped(section: str) -> str:
    """Paragraphs filled to the width of the other pages; tables and headings as they are."""
    blocks = section.strip().split("\n\n")
    fill = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(block if block[0] in "|#" else fill(block) for block in blocks)


def main() -> None:
    found = {}
    for script in SCRIPTS:
        if (file := RESULTS / f"{script}.json").exists():
            found[script] = importlib.import_module(script).section(json.loads(file.read_text("utf-8")))
    _write(found, PAGE)


if __name__ == "__main__":
    main()
