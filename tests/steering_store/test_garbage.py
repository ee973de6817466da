from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from steering_store import Store
from steering_store.blobs import Blobs

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]
FILE = "vectors.safetensors"


def blobs_of(root: Path) -> set[str]:
    return {path.name for path in (root / "artifacts" / "blobs").rglob("*") if path.is_file()}


def make_old(root: Path, seconds: float = 1000.0) -> None:
    for path in (root / "artifacts").rglob("*"):
        if path.is_file() and path.suffix == "":
            os.utime(path, (time.time() - seconds,) * 2)


def test_only_files_that_no_version_needs_go(store: Store, manifest: Content, vectors: Vectors, tmp_path: Path) -> None:
    """A blob that two versions share stays until the second goes, yanked or not."""
    for name in ("a", "b"):
        store.publish(name, manifest, vectors(1.0))
    kept = store.publish("c", manifest, vectors(2.0)).version.manifest.files[0]
    shared = store.resolve("a").manifest.files[0]
    store.delete_version("a", 1)
    store.yank("b", 1)
    assert store.collect_garbage(grace_seconds=0, dry_run=False).blobs == []
    store.delete_version("b", 1)
    assert blobs_of(tmp_path) == {shared.sha256, kept.sha256}
    found = store.collect_garbage(grace_seconds=0, dry_run=False)
    assert (found.blobs, found.size, found.tmp, found.dry_run) == ([shared.sha256], shared.size, [], False)
    assert blobs_of(tmp_path) == {kept.sha256}
    assert store.verify() == []


def test_nothing_is_removed_unless_asked(store: Store, manifest: Content, vectors: Vectors, tmp_path: Path) -> None:
    store.publish("a", manifest, vectors())
    store.delete_version("a", 1)
    left = tmp_path / "artifacts" / "tmp" / "left"
    left.write_bytes(b"1234")
    before = blobs_of(tmp_path)
    found = store.collect_garbage(grace_seconds=0)
    assert (set(found.blobs), found.tmp, found.dry_run) == (before, ["left"], True)
    assert found.size > 4
    assert blobs_of(tmp_path) == before != set()
    assert left.exists()


def test_grace_begins_where_a_version_is_deleted(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    """Not where it was published: a backup of the database needs the file for as long again."""
    store.publish("a", manifest, vectors())
    make_old(tmp_path)
    store.delete_version("a", 1)
    assert store.collect_garbage(grace_seconds=100, dry_run=False).blobs == []
    make_old(tmp_path)
    assert len(store.collect_garbage(grace_seconds=100, dry_run=False).blobs) == 1


def test_orphan_that_is_published_again_begins_a_new_life(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    store.publish("a", manifest, vectors())
    store.delete_version("a", 1)
    make_old(tmp_path)
    store.publish("b", manifest, vectors())
    assert store.collect_garbage(grace_seconds=0, dry_run=False).blobs == []
    assert store.verify() == []


class Slow(BytesIO):
    """A stream that waits in the middle, until it is told to go on."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(64)
        if self.tell() == 64:
            self.reached.set()
            assert self.go_on.wait(10)
        return piece


def test_file_that_is_being_written_is_never_swept(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    slow = Slow(vectors()[FILE])
    sources: dict[str, BinaryIO] = {FILE: slow}
    writer = threading.Thread(target=store.publish, args=("a", manifest, sources))
    writer.start()
    assert slow.reached.wait(10)
    make_old(tmp_path)
    assert len(list((tmp_path / "artifacts" / "tmp").iterdir())) == 1
    assert store.collect_garbage(grace_seconds=0, dry_run=False).tmp == []
    slow.go_on.set()
    writer.join()
    assert store.resolve("a@1")
    assert store.verify() == []


def test_sweep_never_comes_between_a_blob_and_its_version(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection that begins when the blob is in place, and not yet anybody's, waits for the version."""
    adopted, adopt = threading.Event(), Blobs.adopt

    def adopt_and_wait(self: Blobs, staged: Any) -> None:
        adopt(self, staged)
        adopted.set()
        time.sleep(0.2)

    monkeypatch.setattr(Blobs, "adopt", adopt_and_wait)
    publisher = threading.Thread(target=store.publish, args=("a", manifest, vectors()))
    publisher.start()
    assert adopted.wait(10)
    assert len(blobs_of(tmp_path)) == 1
    collector = Store(tmp_path / "artifacts")
    assert collector.collect_garbage(grace_seconds=0).blobs, "there was nothing to lose: this proves nothing"
    assert collector.collect_garbage(grace_seconds=0, dry_run=False).blobs == []
    publisher.join()
    assert store.verify() == []


def test_publishing_and_deleting_while_garbage_is_collected_loses_nothing(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    """The same few blobs become orphans and somebody's again, all the time."""
    stop = threading.Event()
    swept = 0

    def collect() -> None:
        nonlocal swept
        collector = Store(tmp_path / "artifacts")
        while not stop.is_set():
            swept += len(collector.collect_garbage(grace_seconds=0, dry_run=False).blobs)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for round_ in range(60):
            version = store.publish("a", manifest, vectors(float(round_ % 3 + 1))).version
            assert store.load_tensors(version)
            store.delete_version("a", version.version)
    finally:
        stop.set()
        collector.join()
    assert swept > 0, "nothing was ever swept: this proves nothing"
    assert store.publish("a", manifest, vectors()).version.version == 61
