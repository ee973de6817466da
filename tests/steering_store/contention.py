"""One of several processes that publish, move an alias and read it at once, and write down when. A program:

python -m tests.steering_store.contention FOLDER MANIFEST WORKER OPERATIONS

Every move is to a version that was never the target before, so that a version that is read tells which move it is from.
Prints a JSON line for each operation. Times are CLOCK_MONOTONIC's, which all processes share.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steering_store import ABSENT, Store
from steering_store.errors import ArtifactNotFound, PreconditionFailed
from tests.steering_store.store_model import FILE, content

NAME, ALIAS = "shared", "production"


def main(root: Path, manifest: dict[str, Any], worker: int, operations: int) -> None:
    store, chance = Store(root), random.Random(worker)
    fresh: list[int] = []
    etag = ABSENT
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(operations):
        action = chance.choice(["publish", "move", "resolve"])
        if action == "move" and fresh:
            done = timed("move", lambda etag=etag: move(store, fresh[-1], etag))
            etag = done["etag"]
            if done["moved"]:
                fresh.pop()
        elif action == "resolve":
            timed("resolve", lambda: resolve(store))
        else:
            done = timed("publish", lambda number=number: publish(store, manifest, float(worker * 10_000 + number + 1)))
            fresh.append(done["version"])


def publish(store: Store, manifest: dict[str, Any], fill: float) -> dict[str, Any]:
    version, created = store.publish(NAME, manifest, {FILE: content(fill)})
    assert created
    return {"version": version.version, "fill": fill}


def move(store: Store, version: int, expected: str) -> dict[str, Any]:
    try:
        moved = store.set_alias(NAME, ALIAS, version, expected=expected)
    except PreconditionFailed as exc:
        return {"moved": False, "expected": expected, "etag": exc.current or ABSENT}
    return {"moved": True, "expected": expected, "etag": moved.etag}


def resolve(store: Store) -> dict[str, Any]:
    try:
        return {"version": store.resolve(f"{NAME}@{ALIAS}").version}
    except ArtifactNotFound:
        return {"version": None}


def timed(action: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.monotonic_ns()
    done = call()
    print(json.dumps({"action": action, "start": start, "end": time.monotonic_ns(), **done}))
    return done


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
