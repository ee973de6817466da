"""Several processes at one store, and processes that die in it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import steering_store
from steering_store import Store

PREAMBLE = """
import json, os, signal, sqlite3, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save
from steering_store import Store

root, manifest, first = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

def publish(store, name, fill):
    version, _ = store.publish(name, manifest, {"vectors.safetensors": save({"layer.2": np.full(8, fill, np.float32)})})
    return version
"""

PUBLISH_SIX = """
store = Store(root)
for fill in (-1, *range(first, first + 5)):
    print(publish(store, "shared", fill).ref, flush=True)
"""

PUBLISH_FOREVER = """
store = Store(root)
while True:
    first += 1
    print(publish(store, "endless", first).ref, flush=True)
"""

# Forks once for each point of a publication, and dies there: at every fsync, rename and SQL statement.
DIE_AT_EVERY_POINT = """
publish(Store(root), "base", 1)

def die_at(point):
    seen = []
    def step(what):
        seen.append(what)
        if len(seen) == point:
            os.write(1, (what + "\\n").encode())
            os.kill(os.getpid(), signal.SIGKILL)
    def before(name, call):
        def wrapped(*args, **kwargs):
            step(name)
            return call(*args, **kwargs)
        return wrapped
    connect = sqlite3.connect
    def traced(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.set_trace_callback(lambda sql: step(sql.split()[0]))
        return db
    store = Store(root)
    os.fsync, os.replace, sqlite3.connect = before("fsync", os.fsync), before("replace", os.replace), traced
    publish(store, f"p{point}", point)
    step("acknowledge")
    os._exit(0)

for point in range(1, 100):
    pid = os.fork()
    if pid == 0:
        die_at(point)
    if os.waitpid(pid, 0)[1] == 0:
        break
"""


def start(script: str, root: Path, manifest: dict[str, Any], first: int = 0) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(steering_store.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, str(root), json.dumps(manifest), str(first)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    with process:
        return process.communicate(timeout=60)[0].splitlines()


def test_processes_that_publish_at_once_get_dense_unique_versions(tmp_path: Path, manifest: dict[str, Any]) -> None:
    # They also race to create the store. All of them publish fill 0; it is one version.
    processes = [start(PUBLISH_SIX, tmp_path, manifest, first) for first in (10, 20, 30)]
    refs = [output(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    store = Store(tmp_path)
    versions = store.versions("shared")
    assert [version.version for version in versions] == list(range(1, 17))
    assert len({version.digest for version in versions}) == 16
    assert {line for lines in refs for line in lines} == {version.ref for version in versions}
    assert store.verify() == []


def test_death_at_any_point_of_a_publication_leaves_nothing_half_done(tmp_path: Path, manifest: dict[str, Any]) -> None:
    process = start(DIE_AT_EVERY_POINT, tmp_path, manifest)
    points = output(process)
    assert process.returncode == 0
    assert points[:1] + points[-2:] == ["fsync", "COMMIT", "acknowledge"]
    assert {"replace", "BEGIN", "INSERT"} < set(points)
    store = Store(tmp_path)
    visible = {version.name for version in store.list_artifacts().items}
    # Committed: before the last death, and by the process that no point was left for.
    assert visible == {"base", f"p{len(points)}", f"p{len(points) + 1}"}
    assert store.verify() == []
    assert len(list((tmp_path / "tmp").iterdir())) >= 2, "no process died while its file was on its way"
    assert publish_again(store, "p1", manifest, store.resolve("base").digest) == 1


def publish_again(store: Store, name: str, manifest: dict[str, Any], digest: str) -> int:
    base = store.resolve(f"base@{digest}")
    path = store.file_path(base, "vectors.safetensors")
    return store.publish(name, manifest, {"vectors.safetensors": path}).version.version


def test_acknowledged_versions_survive_a_kill_at_any_moment(tmp_path: Path, manifest: dict[str, Any]) -> None:
    chance = random.Random()
    acknowledged: list[str] = []
    for attempt in range(3):
        with start(PUBLISH_FOREVER, tmp_path, manifest, 1000 * attempt) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(chance.randint(1, 8))]
            time.sleep(chance.random() / 50)
            process.send_signal(signal.SIGKILL)
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        store = Store(tmp_path)
        versions = store.versions("endless")
        # One may have been committed and not yet acknowledged, once for each death.
        assert len(acknowledged) <= len(versions) <= len(acknowledged) + attempt + 1
        assert {version.ref for version in versions} >= set(acknowledged)
        assert [version.version for version in versions] == list(range(1, len(versions) + 1))
        assert store.verify() == []
