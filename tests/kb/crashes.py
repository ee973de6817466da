"""Kills processes in a knowledge base, again and again, and compares what is left with a model of it. A program:

python -m tests.kb.crashes FOLDER SEED DEATHS

Children are forked from a warm process. Each performs a few random operations and is killed (-9) at a random point:
before an fsync, rename, unlink, a piece of a snapshot, or an SQL statement that writes, or before it says that it is
done. After each death the collection must be where the acknowledged operations leave it, or one further: the one that
was under way may have been done in full, and never in part; and the index of a new process must equal it. Prints a JSON
line of where they died. A kill is not a power cut: what fsync is for isn't shown here.
"""

from __future__ import annotations

import copy
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

from kb.knowledge_base import KnowledgeBase
from tests.kb.fact_model import ENCODER, Model, Operation, check, observed, perform

IDS = tuple("abcdefgh")
SUBJECTS = ("s", "t", "u", "v", "w", "x")
ANSWERS = ("1", "2", "3")
ACTIONS = {"upsert": 8, "delete": 4, "delete_of": 2, "snapshot": 4, "rebuild": 2}
OPERATIONS = 5
MOST_POINTS = 45
WRITES = ("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT")


class Death(NamedTuple):
    """What a child was acknowledged before it died, what was under way then, and the point; or that it lived."""

    acknowledged: list[tuple[Operation, Any]]
    pending: Operation | None
    point: str
    killed: bool


def main(root: Path, seed: int, deaths: int) -> None:
    chance = random.Random(seed)
    model = Model()
    where: Counter[str] = Counter()
    from_snapshot = 0
    base = KnowledgeBase.open(root)
    base.create("facts", ENCODER.identity)
    base.close()
    while sum(where.values()) < deaths:
        death = run_and_die(root, drawn(chance), chance.randint(1, MOST_POINTS))
        for operation, acknowledged in death.acknowledged:
            assert model.apply(operation) == acknowledged, (operation, acknowledged)
        further = copy.deepcopy(model)
        if death.pending is not None:
            further.apply(death.pending)
        base = KnowledgeBase.open(root)
        collection = base.collection("facts")
        seen = observed(collection)
        assert seen in (model, further), (death, seen, model, further)
        model = seen
        check(collection, model)
        from_snapshot += collection.stats().index["made_from"] == "snapshot"
        base.close()
        if death.killed:
            where[f"{death.pending[0] if death.pending else 'open'}: {death.point}"] += 1
    print(json.dumps({"where": where, "from_snapshot": from_snapshot}))


def drawn(chance: random.Random) -> list[Operation]:
    """Some operations; of few ids, subjects and answers, so that they meet."""
    operations: list[Operation] = []
    for _ in range(OPERATIONS):
        action = chance.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        ids = chance.sample(IDS, chance.randint(1, 4))
        facts = [[id, chance.choice(SUBJECTS), chance.choice(ANSWERS)] for id in ids]
        arguments: dict[str, list[Any]] = {"upsert": [facts], "delete": [ids], "delete_of": [chance.choice(SUBJECTS)]}
        operations.append([action, *arguments.get(action, [])])
    return operations


def run_and_die(root: Path, operations: list[Operation], die_at: int) -> Death:
    """Fork, perform the operations, and die at the point of that number; a child with fewer points just ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(root, operations, die_at, writer)
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


def _child(root: Path, operations: list[Operation], die_at: int, writer: int) -> NoReturn:
    def tell(**line: Any) -> None:
        os.write(writer, (json.dumps(line) + "\n").encode())

    def die(point: str) -> None:
        tell(dies=point)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        point = _count_points(die_at, die)
        collection = KnowledgeBase.open(root).collection("facts")
        point("opening")
        for operation in operations:
            tell(begun=operation)
            done = perform(collection, operation)
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

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            point(name)
            return call(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, before(name, getattr(os, name)))
    opened = Path.open
    Path.open = lambda path, *args, **kwargs: _InPieces(opened(path, *args, **kwargs), point)  # type: ignore[assignment, method-assign]
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(*args, **kwargs)
        db.set_trace_callback(lambda sql: point(sql.split()[0]) if sql.split()[0] in WRITES else None)
        return db

    sqlite3.connect = traced  # type: ignore[assignment]
    return point


class _InPieces:
    """A file of which each write reaches the disk at once, with a point before it."""

    def __init__(self, file: Any, point: Callable[[str], None]) -> None:
        self._file, self._point = file, point

    def __enter__(self) -> _InPieces:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, piece: Any) -> None:
        self._point("write")
        self._file.write(piece)
        self._file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
