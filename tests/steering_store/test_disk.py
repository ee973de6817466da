"""Disks that take nothing: the refusal names them, nothing is half published, and what was there stays readable."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steering_store import Store, blobs, db
from steering_store.errors import StoreError, StoreFull, StoreReadOnly

Vectors = Callable[..., dict[str, bytes]]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreReadOnly),
        (errno.EACCES, StoreReadOnly),
    ],
)
def test_files_that_cannot_be_written(
    store: Store,
    manifest: dict[str, Any],
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[StoreError],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    store.publish("mood", manifest, vectors())
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "_copy", refuse)
        with pytest.raises(error):
            store.publish("mood", manifest, vectors(2.0))
        assert store.resolve("mood").version == 1
    assert store.publish("mood", manifest, vectors(2.0)).version.version == 2
    assert store.verify() == []


def test_database_that_cannot_be_written(
    store: Store, manifest: dict[str, Any], vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("mood", manifest, vectors())
    open_connection = db.open_connection

    def read_only(path: Path, check_same_thread: bool = True) -> sqlite3.Connection:
        connection = open_connection(path, check_same_thread)
        connection.execute("PRAGMA query_only = ON")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(db, "open_connection", read_only)
        with pytest.raises(StoreReadOnly, match="read-only"):
            store.set_alias("mood", "live", 1)
        assert store.resolve("mood@1").version == 1
    assert store.set_alias("mood", "live", 1).version == 1


@pytest.mark.parametrize(("free", "error"), [(0, StoreFull), (1 << 30, StoreError)])
def test_shared_memory_that_finds_no_room(
    store: Store, monkeypatch: pytest.MonkeyPatch, free: int, error: type[StoreError]
) -> None:
    def refuse(*_: object, **__: object) -> sqlite3.Connection:
        failure = sqlite3.OperationalError("disk I/O error")
        failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
        raise failure

    monkeypatch.setattr(db, "open_connection", refuse)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(StoreError) as refused:
        store.set_alias("mood", "live", 1)
    assert type(refused.value) is error


def test_folder_on_a_disk_that_is_mounted_read_only(
    store: Store, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    assert store.resolve("mood").version == 1
    folder = str(tmp_path / "artifacts")
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("only who may mount can see this")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        for change in (
            lambda: store.publish("mood", manifest, vectors(2.0)),
            lambda: store.set_alias("mood", "live", 1),
            lambda: store.lease(version.digest, "a test", 60),
            lambda: store.delete_version("mood", 1),
        ):
            with pytest.raises(StoreReadOnly):
                change()
        assert store.resolve("mood").version == 1
        assert store.load_tensors(version)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    assert store.publish("mood", manifest, vectors(2.0)).version.version == 2
