from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import pytest

from steering_store import ABSENT, Store
from steering_store.errors import (
    ArtifactNotFound,
    CorruptArtifact,
    InUse,
    PreconditionFailed,
    RemoteUnavailable,
    StoreError,
    Yanked,
)
from steering_store.remote import RemoteStore
from steering_store.remote_replica import RemoteBackedStore, open_store
from steering_store.transfer import push

FILE = "vectors.safetensors"
Vectors = Callable[..., dict[str, bytes]]


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Callable[..., RemoteBackedStore]:
    def make(name: str, **options: Any) -> RemoteBackedStore:
        return RemoteBackedStore(tmp_path / name, RemoteStore(url), **options)

    return make


Machine = Callable[..., RemoteBackedStore]


def test_what_one_machine_publishes_another_serves(
    machine: Machine, manifest: dict[str, Any], vectors: Vectors
) -> None:
    here, there = machine("here"), machine("there")
    published, created = here.publish("mood", manifest, vectors())
    assert (published.ref, created) == ("mood@1", True)
    there.refresh()
    found = there.resolve("mood")
    assert found == published
    assert there.load_tensors(found)["layer.2"].tolist() == here.load_tensors(published)["layer.2"].tolist()
    assert there.publish("mood", manifest, vectors()) == (published, False)
    assert there.publish("mood", manifest, vectors(2.0)).version.version == 2
    assert here.publish("mood", manifest, vectors(3.0)).version.version == 3
    assert there.verify() == []


def test_what_is_new_elsewhere_is_found_at_once(machine: Machine, manifest: dict[str, Any], vectors: Vectors) -> None:
    here, there = machine("here"), machine("there")
    for version in (1, 2, 3):
        here.publish("mood", manifest, vectors(float(version)))
        assert there.resolve(f"mood@{version}").version == version
        here.set_alias("mood", f"alias-{version}", version)
        with pytest.raises(ArtifactNotFound):
            there.known(f"mood@alias-{version}")
        assert there.resolve(f"mood@alias-{version}").version == version


@pytest.mark.parametrize("trouble", [None, RemoteUnavailable("memory://x: away"), CorruptArtifact("an event")])
def test_one_look_elsewhere_serves_all_who_wait_for_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, trouble: StoreError | None
) -> None:
    there, looks, called, ended = machine("there"), [], Semaphore(0), Event()
    locked = there._locked

    def events(position: int) -> Iterator[Any]:
        looks.append(position)
        assert ended.wait(60)
        if trouble is not None:
            raise trouble
        return iter(())

    def counted() -> AbstractContextManager[None]:
        called.release()
        return locked()

    monkeypatch.setattr(there._remote, "events", events)
    monkeypatch.setattr(there, "_locked", counted)
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(there.resolve, f"mood@{number}") for number in range(1, 21)]
        for _ in waiting:
            assert called.acquire(timeout=60)
        ended.set()
        expected = ArtifactNotFound if trouble is None else type(trouble)
        assert all(isinstance(each.exception(60), expected) for each in waiting)
    if not isinstance(trouble, CorruptArtifact):
        assert len(looks) <= 2, "the one that was begun, and one for all who came since"


def test_followers_learn_by_themselves(machine: Machine, manifest: dict[str, Any], vectors: Vectors) -> None:
    here, there = machine("here"), machine("there")
    end = there.follow(0.05)
    here.publish("mood", manifest, vectors())
    deadline = time.monotonic() + 20
    while not there.list_artifacts().items:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end()
    here.publish("mood", manifest, vectors(2.0))
    time.sleep(0.3)
    assert len(there.list_artifacts().items) == 1


def test_aliases_yanks_and_deletions_are_the_same_everywhere(
    machine: Machine, manifest: dict[str, Any], vectors: Vectors
) -> None:
    here, there = machine("here"), machine("there")
    for fill in (1.0, 2.0, 3.0):
        here.publish("mood", manifest, vectors(fill))
    first = there.set_alias("mood", "production", 1, expected=ABSENT, by="ada", reason="first")
    assert here.set_alias("mood", "production", 2, expected=first.etag).version == 2
    with pytest.raises(PreconditionFailed):
        there.set_alias("mood", "production", 3, expected=first.etag)
    here.set_alias("mood", "production", 2)
    there.yank("mood", 3, reason="too strong")
    with pytest.raises(Yanked):
        here.set_alias("mood", "staging", 3)
    with pytest.raises(InUse, match="alias production"):
        there.delete_version("mood", 2)
    here.delete_alias("mood", "production")
    there.delete_version("mood", 2, by="bob")
    with pytest.raises(ArtifactNotFound):
        there.delete_alias("mood", "production")
    here.unyank("mood", 3)
    here.yank("mood", 1)
    third = machine("third")
    for store in (here, there):
        store.refresh()
        assert store.history("mood") == third.history("mood")
        assert store.versions("mood", include_yanked=True) == third.versions("mood", include_yanked=True)
    assert [each.version for each in third.versions("mood")] == [3]
    actions = [(e.action, e.by, e.reason) for e in third.history("mood") if e.action != "publish"]
    assert actions == [
        ("set_alias", "ada", "first"), ("set_alias", None, None), ("yank", None, "too strong"),
        ("delete_alias", None, None), ("delete", "bob", None), ("unyank", None, None), ("yank", None, None),
    ]  # fmt: skip
    assert third.publish("mood", manifest, vectors(9.0)).version.version == 4


def test_concurrent_machines_agree(tmp_path: Path, s3: str, manifest: dict[str, Any], vectors: Vectors) -> None:
    """Publications and compare-and-set of one alias; every success is in the history, in the order of the etags."""
    for place, url in (("disk", f"file://{tmp_path}/remote"), ("s3", s3)):
        machines = [RemoteBackedStore(tmp_path / place / str(i), RemoteStore(url)) for i in range(4)]

        def work(i: int, machines: list[RemoteBackedStore] = machines) -> int:
            store = machines[i % 4]
            number = store.publish("mood", manifest, vectors(float(i + 1))).version.version
            while True:
                seen = {alias.alias: alias.etag for alias in store.aliases("mood")}
                try:
                    store.set_alias("mood", "production", number, expected=seen.get("production", ABSENT), by=str(i))
                    return number
                except PreconditionFailed:
                    continue

        with ThreadPoolExecutor(8) as pool:
            numbers = list(pool.map(work, range(12)))
        assert sorted(numbers) == list(range(1, 13))
        for store in machines:
            store.refresh()
        histories = [store.history("mood") for store in machines]
        assert all(history == histories[0] for history in histories)
        moves = [(entry.from_version, entry.to_version) for entry in histories[0] if entry.alias]
        assert [to for _, to in moves] == [before for before, _ in moves[1:]] + [moves[-1][1]]
        assert sorted(to for _, to in moves if to) == list(range(1, 13))


def test_cache_is_bounded_and_fetches_again(machine: Machine, manifest: dict[str, Any], vectors: Vectors) -> None:
    size = len(vectors()[FILE])
    store = machine("here", cache_bytes=2 * size)
    for fill in range(1, 6):
        version = store.publish("mood", manifest, vectors(float(fill))).version
        long_ago = time.time() - 600 + fill
        os.utime(store.file_path(version, FILE), (long_ago, long_ago))
    store._blobs.make_room()
    assert len(list(store._blobs.all())) == 2
    assert store.load_tensors(store.resolve("mood@1"))["layer.2"][0] == 1.0
    assert len(list(store._blobs.all())) == 2
    assert store.verify() == []


def test_file_that_is_damaged_there_is_named_and_never_kept(
    machine: Machine, url: str, manifest: dict[str, Any], vectors: Vectors
) -> None:
    from tests.steering_store.test_remote import write

    version = machine("here").publish("mood", manifest, vectors()).version
    sha256 = version.manifest.files[0].sha256
    write(url, f"blobs/sha256/{sha256[:2]}/{sha256}", b"x" * version.manifest.files[0].size)
    there = machine("there")
    with pytest.raises(CorruptArtifact, match=FILE):
        there.load_tensors(there.resolve("mood"))
    assert list(there._blobs.all()) == []


def test_death_between_an_event_and_the_note_of_it_changes_nothing(
    machine: Machine, tmp_path: Path, manifest: dict[str, Any], vectors: Vectors
) -> None:
    here = machine("here")
    seen = tmp_path / "there" / "remote.json"

    def again() -> None:
        """Let the last event happen once more in a folder that has seen it."""
        there = machine("there")
        state = json.loads(seen.read_text())
        seen.write_text(json.dumps(state | {"events": state["events"] - 1}))
        there = machine("there")
        assert json.loads(seen.read_text()) == state
        assert there.history("mood") == here.history("mood")
        assert there.aliases("mood") == here.aliases("mood")

    here.publish("mood", manifest, vectors(1.0))
    here.publish("mood", manifest, vectors(2.0))
    again()
    for change in (
        lambda: here.set_alias("mood", "production", 1),
        lambda: here.delete_alias("mood", "production"),
        lambda: here.yank("mood", 2),
        lambda: here.unyank("mood", 2),
        lambda: here.delete_version("mood", 2),
    ):
        change()
        again()


def test_version_deleted_elsewhere_is_gone_and_its_files_wait_for_the_last_lease_here(
    machine: Machine, manifest: dict[str, Any], vectors: Vectors
) -> None:
    here, there = machine("here"), machine("there")
    for fill in (1.0, 2.0, 3.0):
        here.publish("mood", manifest, vectors(fill))
    there.refresh()
    version = there.resolve("mood@1")
    there.file_path(version, FILE)
    there.lease(version.digest, "request 7", 60)
    here.delete_version("mood", 1)
    # What happened after the deletion doesn't wait for the lease.
    here.set_alias("mood", "production", 3)
    there.refresh()
    assert there.resolve("mood@production").version == 3
    assert there.history("mood") == here.history("mood")
    for ref in ("mood@1", f"mood@{version.digest}"):
        with pytest.raises(ArtifactNotFound):
            there.resolve(ref)
    assert there.set_alias("mood", "production", 2).version == 2
    assert [path.version for path in there.versions("mood")] == [2, 3]
    # The request that runs goes on, prolongs its lease, and keeps the file from collections.
    there.lease(version.digest, "request 7", 60)
    there.collect_garbage(grace_seconds=0, dry_run=False)
    assert there._blobs.path(version.manifest.files[0].sha256).exists()
    assert there.load_tensors(version)["layer.2"].tolist() == [1.0] * 8
    there.release("request 7")
    there.collect_garbage(grace_seconds=0, dry_run=False)
    assert not there._blobs.path(version.manifest.files[0].sha256).exists()
    with pytest.raises(ArtifactNotFound):
        there.lease(version.digest, "request 8", 60)


def test_moved_alias_is_seen_after_one_refresh(
    machine: Machine, manifest: dict[str, Any], vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So within the interval at which a server follows, whatever that is."""
    here, there = machine("here"), machine("there")
    for fill in (1.0, 2.0):
        here.publish("mood", manifest, vectors(fill))
    here.set_alias("mood", "production", 1)
    there.refresh()
    begin, done = Semaphore(0), Semaphore(0)
    refresh = there.refresh

    def counted() -> None:
        if begin.acquire(timeout=60):
            refresh()
            done.release()

    monkeypatch.setattr(there, "refresh", counted)
    end = there.follow(0.01)
    for version in (2, 1, 2):
        before = there.resolve("mood@production").version
        here.set_alias("mood", "production", version)
        assert there.resolve("mood@production").version == before != version
        begin.release()
        assert done.acquire(timeout=60)
        assert there.resolve("mood@production").version == version
    begin.release()
    end()


@pytest.mark.parametrize("trouble", [OSError("no such device"), ValueError("not JSON"), StoreError("away")])
def test_following_goes_on_after_any_trouble(
    machine: Machine,
    manifest: dict[str, Any],
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Exception,
) -> None:
    here, there = machine("here"), machine("there")
    refreshed, refresh = Semaphore(0), there.refresh
    troubles = [trouble]

    def troubled() -> None:
        if troubles:
            raise troubles.pop()
        refresh()
        refreshed.release()

    monkeypatch.setattr(there, "refresh", troubled)
    here.publish("mood", manifest, vectors())
    end = there.follow(0.01)
    assert refreshed.acquire(timeout=60)
    end()
    assert there.resolve("mood").version == 1
    assert "isn't seen for now" in caplog.text and str(trouble) in caplog.text


def test_broken_note_of_what_was_seen_is_named(machine: Machine, tmp_path: Path) -> None:
    there = machine("there")
    for text in ("{", "[]", '{"url": "x"}', '{"url": "x", "events": "y"}', '{"url": "x", "events": null}'):
        (tmp_path / "there" / "remote.json").write_text(text)
        with pytest.raises(CorruptArtifact, match="remote.json can't be read"):
            there.refresh()


def test_preset_cannot_be_published_on_what_another_machine_deleted(
    machine: Machine, manifest: dict[str, Any], vectors: Vectors
) -> None:
    here, there = machine("here"), machine("there")
    here.publish("mood", manifest, vectors())
    there.refresh()
    here.delete_version("mood", 1)
    preset = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    with pytest.raises(ArtifactNotFound):
        there.publish("cheer", preset | {"kind": "preset", "interventions": [{"artifact": "mood"}]}, {})


def test_pushed_version_is_seen_and_a_folder_belongs_to_one_store(
    url: str, store: Store, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    store.publish("mood", manifest, vectors())
    push(store, "mood", RemoteStore(url))
    opened = open_store(tmp_path / "data", url)
    assert opened.resolve("mood").digest == store.resolve("mood").digest
    assert isinstance(opened, RemoteBackedStore)
    assert type(open_store(tmp_path / "data")) is Store
    folder = next((tmp_path / "data" / "remote").iterdir())
    with pytest.raises(StoreError, match="is a copy of"):
        RemoteBackedStore(folder, RemoteStore(f"{url}-2"))
