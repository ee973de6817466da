"""Kills processes in the store, again and again, and compares what is left with a model of it. A program:

python -m tests.steering_store.crashes FOLDER MANIFEST SEED DEATHS [local | remote]

Children are forked from a warm process. Each performs a few random operations and is killed (-9) at a random point:
before an fsync, rename, unlink, a piece of a file, or an SQL statement that writes, or before it says that it is done.
After each death the store must be where the acknowledged operations leave it, or one further: the one that was under
way may have been done in full, and never in part. Prints a JSON line of where they died.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from steering_store import Store, blobs
from steering_store.remote import RemoteStore
from steering_store.remote_replica import RemoteBackedStore
from tests.steering_store.store_model import Model, Operation, contents, observed, perform

NAMES = ("a", "b")
PRESET = "p"
ALIASES = ("production", "canary")
FILLS = tuple(float(fill) for fill in range(1, 11))
ACTIONS = {"publish": 6, "publish_pair": 4, "publish_preset": 2, "set_alias": 5, "delete_alias": 2, "yank": 3,
           "unyank": 1, "delete_version": 6, "collect": 4}  # fmt: skip
REMOTE = sys.argv[5:] == ["remote"]
OPERATIONS = 5
MOST_POINTS = 70


class Death(NamedTuple):
    """What a child was acknowledged before it died, what was under way then, and the point; or that it lived."""

    acknowledged: list[tuple[Operation, Any]]
    pending: Operation | None
    point: str
    killed: bool


def opened(root: Path) -> Store:
    """The store; where it is one of several machines, its copy and what they share are below the folder."""
    if not REMOTE:
        return Store(root)
    return RemoteBackedStore(root / "copy", RemoteStore(f"file://{root}/shared"))


def main(root: Path, manifest: dict[str, Any], seed: int, deaths: int) -> None:
    chance = random.Random(seed)
    model = Model()
    where: Counter[str] = Counter()
    children = 0
    while sum(where.values()) < deaths:
        operations = drawn(chance, model)
        death = run_and_die(root, manifest, operations, chance.randint(1, MOST_POINTS * (3 if REMOTE else 1)))
        model = after(root, model, death, collect=chance.random() < 0.4)
        children += 1
        if death.killed:
            where[f"{death.pending[0] if death.pending else 'open'}: {death.point}"] += 1
    told = {"seed": seed, "deaths": deaths, "children": children, "where": where, "versions": model.last}
    print(json.dumps(told))


def drawn(chance: random.Random, model: Model) -> list[Operation]:
    """Some operations; of few names, numbers and contents, so that they meet."""
    model = copy.deepcopy(model)
    operations: list[Operation] = []
    for _ in range(OPERATIONS):
        action = chance.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        name = chance.choice(NAMES if action.startswith("publish") else (*NAMES, PRESET))
        numbers = [number for other, number in model.versions if other == name] or [1]
        arguments: dict[str, list[Any]] = {
            "publish": [name, chance.choice(FILLS)],
            "publish_pair": [name, chance.choice(FILLS)],
            "publish_preset": [PRESET, name, chance.choice(numbers)],
            "set_alias": [name, chance.choice(ALIASES), chance.choice(numbers)],
            "delete_alias": [name, chance.choice(ALIASES)],
            "collect": [],
        }
        operations.append([action, *arguments.get(action, [name, chance.choice(numbers)])])
        model.apply(operations[-1])
    return operations


def after(root: Path, model: Model, death: Death, *, collect: bool) -> Model:
    """Check the store after a death, and return the state that it is in."""
    for operation, acknowledged in death.acknowledged:
        assert model.apply(operation) == acknowledged, (operation, acknowledged)
    further = copy.deepcopy(model)
    if death.pending is not None:
        further.apply(death.pending)
    store = opened(root)
    seen = observed(store, (*NAMES, PRESET))
    found = next((state for state in (model, further) if state.visible() == seen.visible()), None)
    assert found is not None, (death, seen, model, further)
    if collect:
        store.collect_garbage(grace_seconds=0, dry_run=False)
        folder = root / "copy" if REMOTE else root
        assert list((folder / "tmp").iterdir()) == [], death
        assert [path for path in (root / "shared").rglob(".*") if path.is_file()] == [], death
        left = {path.name for path in (folder / "blobs").rglob("*") if path.is_file()}
        files = [file for value in found.versions.values() for file in contents(value).values()]
        assert left == {hashlib.sha256(file).hexdigest() for file in files}, death
        assert store.verify() == []
    return found


def run_and_die(root: Path, manifest: dict[str, Any], operations: list[Operation], die_at: int) -> Death:
    """Fork, perform the operations, and die at the point of that number; a child with fewer points just ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(root, manifest, operations, die_at, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"a child failed: {lines}"
    begun = [line["begun"] for line in lines if "begun" in line]
    done = [line["done"] for line in lines if "done" in line]
    point = next((line["dies"] for line in lines if "dies" in line), "lived")
    pending = begun[len(done)] if len(begun) > len(done) else None
    return Death(list(zip(begun, done, strict=False)), pending, point, killed)


def _child(root: Path, manifest: dict[str, Any], operations: list[Operation], die_at: int, writer: int) -> NoReturn:
    def tell(**line: Any) -> None:
        os.write(writer, (json.dumps(line) + "\n").encode())

    def die(point: str) -> None:
        tell(dies=point)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        point = _count_points(die_at, die)
        store = opened(root)
        point("opening")
        for operation in operations:
            tell(begun=operation)
            done = perform(store, manifest, operation)
            point("acknowledge")
            tell(done=done)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _count_points(die_at: int, die: Callable[[str], None]) -> Callable[[str], None]:
    """From here on, each effect of this process on the disk is a point; before the one of that number, die."""
    passed = 0

    def point(what: str) -> None:
        nonlocal passed
        passed += 1
        if passed == die_at:
            die(what)

    def before(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            point(name)
            return call(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "link", "unlink", "utime", "mkdir"):
        setattr(os, name, before(name))
    reader = blobs._reader
    blobs._reader = lambda source: (  # type: ignore[assignment]
        _InPieces(source, point) if isinstance(source, bytes) else reader(source)
    )
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(*args, **kwargs)
        db.set_trace_callback(lambda sql: point(sql.split()[0]) if sql.split()[0] in WRITES else None)
        return db

    sqlite3.connect = traced  # type: ignore[assignment]
    return point


WRITES = ("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT")


class _InPieces:
    """A file that arrives in three pieces, with a point before each."""

    def __init__(self, source: bytes, point: Callable[[str], None]) -> None:
        self._left, self._piece, self._point = source, len(source) // 3 + 1, point

    def __enter__(self) -> _InPieces:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        self._point("write")
        piece, self._left = self._left[: self._piece], self._left[self._piece :]
        return piece


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
