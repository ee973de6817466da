"""Eight processes at one store: dense and unique versions, and an alias that is one register for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steering_store import Store
from tests.steering_store.contention import ALIAS, NAME

ROOT = Path(__file__).parents[2]
PROCESSES, OPERATIONS = 8, 200

Event = dict[str, Any]


def run(root: Path, manifest: dict[str, Any]) -> list[Event]:
    """What the processes wrote down. They race to create the store, and then begin all at once."""
    program = [sys.executable, "-m", "tests.steering_store.contention", str(root), json.dumps(manifest)]
    workers = [
        subprocess.Popen(
            [*program, str(worker), str(OPERATIONS)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    told = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES
    return [json.loads(line) for text in told for line in text.splitlines()]


def check_register(writes: list[Event], reads: list[Event]) -> None:
    """Raise AssertionError unless a register explains it all: `position` is the place of a write in the order that the
    store gives, and in a read the place of the write that it saw; -1 is none.

    With the order of the writes known and every value unique, these conditions are what linearizability asks.
    """
    began = {write["position"]: write["start"] for write in writes}
    # What has ended, in time: an operation that begins later comes behind it.
    ended = sorted((each["end"], each["position"]) for each in [*writes, *reads])
    newest, done = -1, 0
    steps = [(write["start"], True, write) for write in writes] + [(read["start"], False, read) for read in reads]
    for start, is_write, each in sorted(steps, key=lambda step: step[0]):
        while done < len(ended) and ended[done][0] < start:
            newest = max(newest, ended[done][1])
            done += 1
        assert each["position"] >= newest + is_write, f"{newest} was known before it began: {each}"
        assert began.get(each["position"], -1) < each["end"], f"saw a write that had not begun: {each}"


def test_versions_are_dense_and_the_alias_is_linearizable(tmp_path: Path, manifest: dict[str, Any]) -> None:
    events = run(tmp_path, manifest)
    assert len(events) == PROCESSES * OPERATIONS
    store = Store(tmp_path)
    published = [event for event in events if event["action"] == "publish"]
    versions = store.versions(NAME)
    assert [version.version for version in versions] == list(range(1, len(published) + 1))
    assert sorted(event["version"] for event in published) == [version.version for version in versions]
    fills = {event["version"]: event["fill"] for event in published}
    assert {v.version: float(store.load_tensors(v)["layer.2"][0]) for v in versions} == fills

    history = store.history(NAME, ALIAS)
    etags = [f"{entry.to_version}-{entry.id}" for entry in history]
    position = {etag: number for number, etag in enumerate(etags)} | {"absent": -1}
    target = {entry.to_version: number for number, entry in enumerate(history)} | {None: -1}
    assert len(target) == len(position) == len(history) + 1
    moves = [event for event in events if event["action"] == "move"]
    moved = [event | {"position": position[event["etag"]]} for event in moves if event["moved"]]
    assert sorted(event["position"] for event in moved) == list(range(len(history)))
    for event in moved:
        assert position[event["expected"]] == event["position"] - 1, "a move overwrote what its mover had not seen"
    assert [entry.from_version for entry in history] == [None, *(entry.to_version for entry in history[:-1])]
    refused = [event | {"position": position[event["etag"]]} for event in moves if not event["moved"]]
    resolved = [event | {"position": target[event["version"]]} for event in events if event["action"] == "resolve"]
    check_register(moved, refused + resolved)
    check_register([event | {"position": event["version"]} for event in published], [])
    assert min(len(moved), len(refused), len({event["version"] for event in resolved})) > 20, "too little was met"
    assert store.verify() == []


def event(position: int, start: int, end: int) -> Event:
    return {"position": position, "start": start, "end": end}


@pytest.mark.parametrize(
    ("writes", "reads"),
    [
        ([event(0, 5, 6), event(1, 1, 2)], []),
        ([event(0, 1, 2), event(1, 3, 4)], [event(0, 5, 6)]),
        ([event(0, 1, 2), event(1, 5, 6)], [event(1, 3, 4)]),
        ([event(0, 1, 2), event(1, 3, 9)], [event(1, 4, 5), event(0, 6, 7)]),
        ([event(0, 1, 2)], [event(-1, 3, 4)]),
        ([event(1, 1, 9), event(0, 5, 6)], [event(1, 2, 3)]),
    ],
)
def test_the_check_finds_what_no_register_does(writes: list[Event], reads: list[Event]) -> None:
    with pytest.raises(AssertionError):
        check_register(writes, reads)


def test_the_check_lets_pass_what_a_register_does() -> None:
    writes = [event(0, 1, 4), event(1, 2, 9), event(2, 10, 12)]
    check_register(writes, [event(-1, 0, 3), event(0, 3, 8), event(1, 5, 8), event(1, 9, 11), event(2, 11, 13)])
