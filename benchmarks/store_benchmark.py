"""What the store needs: memory to publish and to load an artifact of 2 GiB, also over HTTP, and time to resolve one of
10,000.

Memory is the peak of the resident set of a fresh process, above what it was when the store was open. A whole load
returns 2 GiB of arrays, which are the caller's; they are subtracted. `--folder` needs room for 7 GiB.

    make bench-setup && .venv/bin/python benchmarks/store_benchmark.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import uvicorn
from environment import environment
from fastapi import FastAPI
from safetensors.numpy import save

from server.api import artifact_files, artifacts, errors
from server.api.leases import Leases
from server.settings import Settings
from server.version import code_version
from steering_store import Store

WIDTH, FEATURES = 2048, 1 << 17
"""Of the SAE: encoder and decoder have 1 GiB each."""
ROWS = 256
RANGE = 64 << 20
ARTIFACTS, LOOKUPS = 10_000, 20_000
CHUNK = 1 << 12
RESULTS = Path(__file__).parent / "results" / "store.json"

Numbers = dict[str, Any]


def sae(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An SAE of 2 GiB as a file, written in pieces, and its manifest."""
    shapes = {"encoder": [FEATURES, WIDTH], "decoder": [FEATURES, WIDTH], "encoder_bias": [FEATURES]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    chance = np.random.default_rng(0)
    path = folder / "sae.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in range(0, 2 * FEATURES, CHUNK):
            file.write(chance.standard_normal((CHUNK, WIDTH), np.float32).tobytes())
        file.write(np.zeros(FEATURES, np.float32).tobytes())
    site = {"point": "resid_post", "layer": 2, "file": path.name, "dtype": "F32"}
    sites = [site | {"role": name, "tensor": name, "shape": shape} for name, shape in shapes.items()]
    return path, manifest("sae", WIDTH) | {"activation": "relu", "sites": sites}


def manifest(kind: str, hidden: int) -> dict[str, Any]:
    model = {"architecture": "LlamaForCausalLM", "hidden_size": hidden, "num_layers": 4}
    common = {"default_strength": 1.0, "provenance": {"method": "random"}}
    return {"schema_version": 1, "kind": kind, "model": model, **common}


def publish(store: Store, path: Path, content: dict[str, Any]) -> int:
    store.publish("sae", content, {path.name: path})
    return 0


def load_rows(store: Store, path: Path, content: dict[str, Any]) -> int:
    rows = list(range(0, FEATURES, FEATURES // ROWS))
    return sum(array.nbytes for array in store.load_tensors(store.resolve("sae"), dict.fromkeys(ROLES, rows)).values())


def load_whole(store: Store, path: Path, content: dict[str, Any]) -> int:
    return sum(array.nbytes for array in store.load_tensors(store.resolve("sae")).values())


def verify(store: Store, path: Path, content: dict[str, Any]) -> int:
    assert store.verify() == []
    return 0


ROLES = ("encoder", "decoder")
STEPS: dict[str, Callable[[Store, Path, dict[str, Any]], int]] = {
    "publish": publish,
    "load_rows": load_rows,
    "load_whole": load_whole,
    "verify": verify,
}


def measured(step: str, root: Path, path: Path, content: dict[str, Any]) -> Numbers:
    """Run a step in this process, which is a fresh one: seconds, and MiB above the start and above what it returned."""
    store = Store(root, max_bytes=4 << 30)
    before = _reset_peak()
    start = time.perf_counter()
    returned = STEPS[step](store, path, content)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "returned_mib": round(returned / 2**20, 1),
        "extra_mib": round((_status("VmHWM") - before - returned) / 2**20, 1),
    }


def _reset_peak(process: str | int = "self") -> int:
    """Forget the peak so far, and return the resident set in bytes."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _status("VmRSS", process)


def _status(field: str, process: str | int = "self") -> int:
    text = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def large(folder: Path, path: Path, content: dict[str, Any]) -> Numbers:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        steps = {step: pool.apply(measured, (step, folder / "large", path, content)) for step in STEPS}
    return {"file_mib": round(path.stat().st_size / 2**20, 1), "rows": ROWS * len(ROLES), "steps": steps}


def http(folder: Path, path: Path, content: dict[str, Any]) -> Numbers:
    """Publish the large file over HTTP, and read it back in ranges: what the server's process takes in memory for it,
    and its temporary folder on the disk. The routes are the server's own, without the engine's beside them.
    """
    temporary = folder / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder / "http", temporary, port))
    server.daemon = True
    server.start()
    assert server.pid is not None
    steps = {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/artifacts/sae", timeout=600) as client:
        _until_up(client)
        for step in ("publish", "ranges"):
            before = _reset_peak(server.pid)
            start = time.perf_counter()
            if step == "publish":
                with path.open("rb") as file:
                    answer = client.post(
                        "/versions", data={"manifest": json.dumps(content)}, files={"f": (path.name, file)}
                    )
                assert answer.status_code == 201, answer.text
            else:
                for begin in range(0, path.stat().st_size, RANGE):
                    wanted = {"Range": f"bytes={begin}-{begin + RANGE - 1}"}
                    answer = client.get(f"/versions/1/files/{path.name}", headers=wanted)
                    assert answer.status_code == 206, answer.text
            seconds = time.perf_counter() - start
            extra = (_status("VmHWM", server.pid) - before) / 2**20
            steps[step] = {"seconds": round(seconds, 2), "extra_mib": round(extra, 1)}
    server.terminate()
    server.join()
    left = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    return {"steps": steps, "range_mib": RANGE / 2**20, "left_in_temporary_folder": left}


def serve(root: Path, temporary: Path, port: int) -> None:
    tempfile.tempdir = str(temporary)
    store = Store(root, max_bytes=4 << 30)
    app = FastAPI()
    app.state.polyhelm = SimpleNamespace(store=store, settings=Settings(), leases=Leases(store))
    for module in (artifact_files, artifacts):
        app.include_router(module.router)
    errors.install(app)
    uvicorn.run(app, port=port, log_level="warning")


def _until_up(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            client.get("/versions/latest")
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server didn't start")


def many(folder: Path) -> Numbers:
    """Latencies of `Store.resolve` among many artifacts: remembered, first asked for, and while others publish."""
    store = Store(folder / "many")
    content = manifest("steering_vector", 8)
    site = {"point": "resid_post", "layer": 2, "file": "v.safetensors", "tensor": "v", "shape": [8], "dtype": "F32"}
    content["sites"] = [site]
    files = {"v.safetensors": save({"v": np.ones(8, np.float32)})}
    start = time.perf_counter()
    for number in range(ARTIFACTS):
        store.publish(f"artifact-{number}", content | {"annotations": {"number": str(number)}}, files)
        if number % 4 == 0:
            store.set_alias(f"artifact-{number}", "production", 1)
    publishing = time.perf_counter() - start
    refs = list(_refs(store))
    fresh = Store(folder / "many")
    writer = multiprocessing.get_context("spawn").Process(
        target=publish_forever, args=(folder / "many", content, files)
    )
    numbers = {
        "artifacts": ARTIFACTS,
        "publications_per_second": round(ARTIFACTS * 1.25 / publishing, 1),
        "first": latencies(fresh, refs[:ARTIFACTS]),
        "again": latencies(fresh, random.Random(1).choices(refs, k=LOOKUPS)),
        "one_name": latencies(fresh, ["artifact-7"] * LOOKUPS),
    }
    writer.start()
    while not any(version.name == "busy" for version in fresh.list_artifacts(after="artifact-~").items):
        time.sleep(0.1)
    before = len(fresh.versions("busy"))
    numbers["while_another_process_publishes"] = latencies(fresh, random.Random(2).choices(refs, k=LOOKUPS))
    numbers["while_another_process_publishes"]["publications"] = len(fresh.versions("busy")) - before
    writer.terminate()
    writer.join()
    return numbers


def _refs(store: Store) -> Iterator[str]:
    """References of every form, to artifacts in random order."""
    order = list(range(ARTIFACTS))
    random.Random(0).shuffle(order)
    for number in order:
        name = f"artifact-{number}"
        if number % 4 == 0:
            yield f"{name}@production"
        elif number % 4 == 1:
            yield f"{name}@1"
        elif number % 4 == 2:
            yield f"{name}@{store.resolve(name).digest}"
        else:
            yield name


def latencies(store: Store, refs: list[str]) -> Numbers:
    """Milliseconds of each `resolve`."""
    taken = []
    for ref in refs:
        start = time.perf_counter()
        store.resolve(ref)
        taken.append((time.perf_counter() - start) * 1e3)
    p50, p99, worst = np.percentile(taken, [50, 99, 100])
    return {"p50_ms": round(p50, 4), "p99_ms": round(p99, 4), "max_ms": round(worst, 3), "lookups": len(refs)}


def publish_forever(root: Path, content: dict[str, Any], files: dict[str, bytes]) -> None:
    store = Store(root)
    for number in range(1 << 30):
        store.publish("busy", content | {"annotations": {"number": str(number)}}, files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put the files; by default the system's temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        file = sae(folder)
        results = {
            "environment": environment() | {"sqlite": sqlite3.sqlite_version},
            "code_version": code_version(),
            "load_average": round(os.getloadavg()[0], 1),
            "large": large(folder, *file),
            "http": http(folder, *file),
            "resolve": many(folder),
        }
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
