"""What the knowledge base costs: importing 100,000 facts with embeddings, and searching 1,000 to 100,000.

The vectors are random mixtures around 1,000 centres, so that they crowd as sentence embeddings do; time doesn't depend
on what they mean. Each step runs in a fresh process; memory is its resident set above what it was when the modules were
loaded.

    make bench-setup && .venv/bin/python benchmarks/kb_benchmark.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from environment import describe, environment
from pydantic_core import to_json

from kb.collection import Collection
from kb.encoders import load as load_encoder
from kb.encoders.base import EncoderIdentity
from kb.facts import FactDraft
from kb.filters import Filter
from kb.imports import Importer
from kb.index import IndexOptions
from kb.knowledge_base import KnowledgeBase

DIMENSION, CENTRES = 384, 1000
SIZES = (1_000, 10_000, 100_000)
QUERIES = 300
ENCODER = EncoderIdentity("random", DIMENSION, "sha256:random")
RESULTS = Path(__file__).parent / "results" / "kb.json"
PAGE = Path(__file__).parent.parent / "docs" / "knowledge.md"
BEGIN, END = "<!-- kb_benchmark -->\n", "<!-- end of kb_benchmark -->\n"

Numbers = dict[str, Any]


def vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors, float32 [count, DIMENSION], of which two have a cosine of 0.8 or so."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIMENSION)).astype(np.float32)
    chance = np.random.default_rng(seed)
    rows = 2 * centres[chance.integers(CENTRES, size=count)] + centres[0] * 4
    rows += chance.standard_normal(rows.shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def facts(count: int) -> Iterator[Numbers]:
    for number in range(count):
        yield {
            "id": f"fact-{number}",
            "question": f"Which city is the capital of country number {number} in the year {1900 + number % 120}?",
            "answer": f"City number {number * 7 % 100_003}",
            "language": ("en", "de", "fr", "zh")[number % 4] if number % 100 else "sw",
            "subject": f"country {number}",
            "relation": "capital",
        }


def lines(count: int) -> Iterator[bytes]:
    """Facts as lines of JSON with their embeddings."""
    rows = np.round(vectors(count, 1).astype(np.float64), 6)
    for fact, vector in zip(facts(count), rows, strict=True):
        yield to_json(fact | {"embedding": vector.tolist()}) + b"\n"


def import_stream(folder: Path, size: int) -> Numbers:
    """From a file of NDJSON, as `polyhelm kb import` and the HTTP route do."""
    file = folder / "facts.jsonl"
    with file.open("wb") as out:
        out.writelines(lines(size))
    base = KnowledgeBase.open(folder / "stream")
    collection, _ = base.create("facts", ENCODER)
    importer = Importer(collection, None)
    before = _reset_peak()
    start = time.perf_counter()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            importer.feed(piece)
    importer.finish()
    seconds = time.perf_counter() - start
    assert importer.summary.created == size
    extra = _status("VmHWM") - before
    base.close()
    disk = sum(path.stat().st_size for path in (folder / "stream").rglob("*") if path.is_file())
    return {"seconds": round(seconds, 1), "extra_mib": _mib(extra), "disk_bytes_per_fact": round(disk / size)}


def import_again(folder: Path, size: int) -> Numbers:
    """The same file once more: nothing changes."""
    importer = Importer(KnowledgeBase.open(folder / "stream").collection("facts"), None)
    start = time.perf_counter()
    with (folder / "facts.jsonl").open("rb") as stream:
        while piece := stream.read(1 << 20):
            importer.feed(piece)
    importer.finish()
    assert importer.summary.unchanged == size
    return {"seconds": round(time.perf_counter() - start, 1)}


def fill(folder: Path, size: int) -> Numbers:
    """Write with the library."""
    base = KnowledgeBase.open(folder / str(size))
    collection, _ = base.create("facts", ENCODER)
    rows, drafts = vectors(size, 1), [FactDraft(**fact) for fact in facts(size)]
    for start in range(0, size, 1000):
        collection.upsert(drafts[start : start + 1000], rows[start : start + 1000])
    base.close()
    return {}


def first_search(folder: Path, size: int, made_from: str) -> Numbers:
    """In this process, with the index made from the facts, or read from a snapshot."""
    if made_from == "facts":
        shutil.rmtree(folder / str(size) / "indexes", ignore_errors=True)
    collection = KnowledgeBase.open(folder / str(size)).collection("facts")
    query = vectors(1, 2)
    start = time.perf_counter()
    collection.search(query, 1)
    seconds = time.perf_counter() - start
    assert collection.stats().index["made_from"] == made_from
    return {"seconds": round(seconds, 3)}


def snapshot(folder: Path, size: int) -> Numbers:
    base = KnowledgeBase.open(folder / str(size))
    collection = base.collection("facts")
    collection.search(vectors(1, 2), 1)
    start = time.perf_counter()
    made = collection.snapshot()
    return {"seconds": round(time.perf_counter() - start, 3), "mib": _mib(made["bytes"])}


def search(folder: Path, size: int, kind: Literal["flat", "hnsw"]) -> Numbers:
    """Milliseconds for one query of one vector, 8 facts wanted, from the loaded index to facts as objects; and how much
    of the exact answer the index finds."""
    shutil.rmtree(folder / str(size) / "indexes", ignore_errors=True)
    before = _reset_peak()
    base = KnowledgeBase.open(folder / str(size), IndexOptions(kind=kind))
    collection = base.collection("facts")
    start = time.perf_counter()
    collection.search(vectors(1, 2), 8)
    loaded = time.perf_counter() - start
    memory = _status("VmRSS") - before
    # Unasked, it would be kept in the background, while times are taken.
    collection.snapshot()
    assert collection.stats().index["kind"] == kind
    queries = vectors(QUERIES, 3 if kind == "flat" else 4)
    numbers: Numbers = {
        "memory_bytes_per_fact": round(memory / size),
        "seconds_to_make": round(loaded, 1),
        "recall_at_8": _recall(collection, queries, size),
        "all": _latencies(lambda query: collection.search(query, 8), queries),
        "one_language_of_four": _latencies(lambda query: collection.search(query, 8, where=_FOURTH), queries),
        "one_percent": _latencies(lambda query: collection.search(query, 8, where=_HUNDREDTH), queries),
    }
    written = 0

    def after_a_write(query: np.ndarray) -> None:
        nonlocal written
        written += 1
        collection.upsert([FactDraft(id=f"{kind}-{written}", text=f"new fact {written}, {kind}")], query)
        start = time.perf_counter()
        (hits,) = collection.search(query, 1)
        taken.append(time.perf_counter() - start)
        assert hits[0].fact.id == f"{kind}-{written}"

    encoder = load_encoder("e5-small")
    texts = [f"Which city is the capital of country number {number}?" for number in range(100)]
    asked = iter(texts)
    numbers["with_encoder"] = _latencies(
        lambda _: collection.search(encoder.encode_queries([next(asked)]), 8), queries[:100]
    )
    taken: list[float] = []
    writes = _latencies(after_a_write, queries[:100])
    assert collection.stats().index["kind"] == kind
    return numbers | {"write_and_read_back": writes, "index": kind}


def _recall(collection: Collection, queries: np.ndarray, size: int) -> float:
    """The share of the 8 nearest facts that are found, of those that `fill` wrote."""
    found = [[hit.fact.id for hit in hits if hit.fact.id.startswith("fact-")] for hits in collection.search(queries, 8)]
    nearest = np.argsort(-(queries @ vectors(size, 1).T), axis=1)[:, :8]
    shares = [
        len({f"fact-{number}" for number in row[: len(ids)]} & set(ids)) / len(ids)
        for ids, row in zip(found, nearest, strict=True)
    ]
    return round(float(np.mean(shares)), 3)


_FOURTH, _HUNDREDTH = Filter(language=["fr"]), Filter(language=["sw"])


def _latencies(call: Callable[[np.ndarray], Any], queries: np.ndarray) -> Numbers:
    taken = []
    for query in queries:
        start = time.perf_counter()
        call(query[None])
        taken.append((time.perf_counter() - start) * 1e3)
    p50, p99 = np.percentile(taken, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def _reset_peak() -> int:
    """Forget the peak so far, and return the resident set in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def apart(step: Callable[..., Numbers], *arguments: Any) -> Numbers:
    """Run a step in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(step, arguments)


def measured(folder: Path) -> Numbers:
    results: Numbers = {"facts": SIZES[-1], "dimension": DIMENSION}
    results["import"] = apart(import_stream, folder, SIZES[-1])
    results["import_again"] = apart(import_again, folder, SIZES[-1])
    results["search"] = {}
    for size in SIZES:
        apart(fill, folder, size)
        results["search"][str(size)] = apart(search, folder, size, "flat")
    results["load_from_facts"] = apart(first_search, folder, SIZES[-1], "facts")
    results["snapshot"] = apart(snapshot, folder, SIZES[-1])
    results["load_from_snapshot"] = apart(first_search, folder, SIZES[-1], "snapshot")
    results["hnsw"] = apart(search, folder, SIZES[-1], "hnsw")
    for name in ("all", "with_encoder"):
        few, many = (results["search"][str(size)][name]["p50_ms"] for size in (SIZES[0], SIZES[-1]))
        results[f"growth_{name}"] = round(many / few, 2)
    return results


def table(results: Numbers) -> str:
    """The section of docs/knowledge.md."""
    size = results["facts"]
    rows = [
        ("import from NDJSON with embeddings", f"{results['import']['seconds']} s", "60 s"),
        ("the same file again, nothing changed", f"{results['import_again']['seconds']} s", ""),
        ("memory of an import, above the start", f"{results['import']['extra_mib']} MiB", ""),
        ("disk, a fact", f"{results['import']['disk_bytes_per_fact']} bytes", ""),
        ("memory, a fact", f"{results['search'][str(size)]['memory_bytes_per_fact']} bytes", ""),
        ("first search of a process, index made from the facts", f"{results['load_from_facts']['seconds']} s", ""),
        ("first search of a process, index from a snapshot", f"{results['load_from_snapshot']['seconds']} s", ""),
        ("snapshot", f"{results['snapshot']['seconds']} s", ""),
        (
            "growth from 1,000 to 100,000 facts, exact, encoding the question with it",
            f"{results['growth_with_encoder']} times",
            "1.5 times",
        ),
        ("growth from 1,000 to 100,000 facts, exact, of the search alone", f"{results['growth_all']} times", ""),
        ("HNSW: share of the exact 8 best that it finds", f"{results['hnsw']['recall_at_8']:.1%}", ""),
        ("HNSW: made from the facts", f"{results['hnsw']['seconds_to_make']} s", ""),
    ]
    text = f"{size:,} facts of {results['dimension']} dimensions:\n\n| | measured | goal |\n|---|---|---|\n"
    text += "".join(f"| {name} | {value} | {goal} |\n" for name, value, goal in rows)
    text += (
        "\nOne query, 8 facts wanted (ms, p50 / p99). Goals for p50: 10 for a search, 40 with the embedded encoder.\n\n"
    )
    text += "| facts | index | search | in 1/4 of them, by language | in 1/100 | with encoding | write one, find it |\n"
    text += "|---|---|---|---|---|---|---|\n"
    searches = [*results["search"].items(), (str(size), results["hnsw"])]
    for number, found in searches:
        names = ("all", "one_language_of_four", "one_percent", "with_encoder", "write_and_read_back")
        cells = (found[name] for name in names)
        times = " | ".join(f"{cell['p50_ms']} / {cell['p99_ms']}" for cell in cells)
        text += f"| {int(number):,} | {found['index']} | {times} |\n"
    return text + (
        f"\nMeasured {describe(results['environment'])}; load of the machine before and after"
        f" {' and '.join(map(str, results['load']))}. Run it yourself: `make bench-setup && "
        ".venv/bin/python benchmarks/kb_benchmark.py`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put the files; by default the system's temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    block = environment() | {"sqlite": sqlite3.sqlite_version}
    load = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results = {"environment": block, "load": load, **measured(Path(name))}
    load.append(round(os.getloadavg()[0], 1))
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2], "utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
