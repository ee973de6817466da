"""What a large artifact costs in memory: a fraction of its size. `benchmarks/store_benchmark.py` does it with 2 GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
WIDTH, FEATURES = 1024, 25_000
ROOM_MIB = 60

MEASURE = """
import io, json, sys
from pathlib import Path
from steering_store import Store
from steering_store.errors import InvalidTensor
from steering_store.tensors import MAX_HEADER_BYTES, read_header

def status(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024

def extra(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    returned = sum(array.nbytes for array in (call() or {}).values()) / 2**20
    return status("VmHWM") - before - returned, returned
"""
PUBLISH = """
root, file, manifest = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
store = Store(root)
steps = {"publish": lambda: store.publish("sae", manifest, {file.name: file}) and None}
steps["rows"] = lambda: store.load_tensors(store.resolve("sae"), {"encoder": [0, 20_000], "decoder": [7]})
steps["verify"] = lambda: store.verify() and None
steps["whole"] = lambda: store.load_tensors(store.resolve("sae"))
print(json.dumps({step: extra(call) for step, call in steps.items()}))
"""
HEADERS = """
def written(size):
    count = (size - 100) // 70
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = ",".join(f'"{i:09}":{entry}' for i in range(count))
    path = Path(sys.argv[1]) / f"{size}.safetensors"
    header = ("{" + entries + "}").encode().ljust(size)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path, count

def read(path, count):
    with path.open("rb") as stream:
        assert len(read_header(stream, path.name)) == count

def refused(text):
    header = text.encode().ljust(MAX_HEADER_BYTES)[:MAX_HEADER_BYTES]
    stream = io.BytesIO(len(header).to_bytes(8, "little") + header)
    try:
        read_header(stream, "x")
    except InvalidTensor:
        return
    raise AssertionError("accepted")

n = MAX_HEADER_BYTES
words = ",".join(f'"{i:x}":[]' for i in range(n // 11))
print(json.dumps({
    "largest": extra(lambda: read(*written(n))),
    "nested": extra(lambda: refused('{"a":[' + "{}," * (n // 3 - 10) + "{}]}")),
    "wrong": extra(lambda: refused("{" + ",".join(f'"{i:x}":0' for i in range(n // 9)) + "}")),
    "metadata": extra(lambda: refused('{"a":0,"__metadata__":{' + words + "}}")),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_publishing_and_loading_200_mb_takes_a_fraction_of_it(tmp_path: Path, manifest: dict[str, Any]) -> None:
    file = tmp_path / "sae.safetensors"
    weights = np.random.default_rng(0).standard_normal((FEATURES, WIDTH), np.float32)
    tensors = {"encoder": weights, "decoder": weights, "encoder_bias": np.zeros(FEATURES, np.float32)}
    save_file(tensors, file)
    assert file.stat().st_size > 200e6
    model = manifest["model"] | {"hidden_size": WIDTH}
    site = manifest["sites"][0] | {"file": file.name}
    sites = [site | {"role": name, "tensor": name, "shape": list(array.shape)} for name, array in tensors.items()]
    content = manifest | {"kind": "sae", "activation": "relu", "model": model, "sites": sites}
    taken = measured(PUBLISH, str(tmp_path / "store"), str(file), json.dumps(content))
    assert taken["whole"][1] > 190, "nothing large was loaded: this proves nothing"
    assert {step: extra for step, (extra, _) in taken.items() if extra > ROOM_MIB} == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_largest_header_takes_little_memory(tmp_path: Path) -> None:
    """A header is parsed whole: of 30,000 tensors, which are as many as one may list, or of what isn't any."""
    taken = measured(HEADERS, str(tmp_path))
    assert {step: extra for step, (extra, _) in taken.items() if extra > ROOM_MIB} == {}


def measured(program: str, *arguments: str) -> dict[str, tuple[float, float]]:
    """What a program of its own says of its steps: MiB above what it began with and returned, and MiB returned."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    taken: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return taken
