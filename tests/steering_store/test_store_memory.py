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

PROGRAM = """
import json, sys
from pathlib import Path
from steering_store import Store

def status(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024

def extra(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    returned = sum(array.nbytes for array in (call() or {}).values()) / 2**20
    return status("VmHWM") - before - returned, returned

root, file, manifest = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
store = Store(root)
steps = {"publish": lambda: store.publish("sae", manifest, {file.name: file}) and None}
steps["rows"] = lambda: store.load_tensors(store.resolve("sae"), {"encoder": [0, 20_000], "decoder": [7]})
steps["verify"] = lambda: store.verify() and None
steps["whole"] = lambda: store.load_tensors(store.resolve("sae"))
print(json.dumps({step: extra(call) for step, call in steps.items()}))
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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), str(file), json.dumps(content)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert taken["whole"][1] > 190, "nothing large was loaded: this proves nothing"
    assert {step: extra for step, (extra, _) in taken.items() if extra > ROOM_MIB} == {}
