"""A store at a URL, used as if it were a local one.

The remote store's events are the truth. They are replayed, in their order, into a local store: its database is the
index from which every reference is resolved, and its blobs are a cache. A change is checked against the local database,
and then made by appending an event, which fails where another machine came first; then it is checked anew. So all
machines have the same versions, aliases and etags, and those that read ask nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from steering_store import aliases
from steering_store.aliases import Alias
from steering_store.audit import Stated
from steering_store.blobs import StagedFile, fsync
from steering_store.db import connect, transaction
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InUse, RemoteUnavailable, StoreError
from steering_store.garbage import GRACE_SECONDS, Garbage
from steering_store.holders import holders
from steering_store.manifest import Manifest, digest_of, read_manifest
from steering_store.presets import references
from steering_store.records import ArtifactVersion, Publication, find_row
from steering_store.reference import Reference, check_alias, parse_reference
from steering_store.remote import RemoteStore, new_event
from steering_store.remote_cache import RemoteBlobs
from steering_store.remote_state import Event
from steering_store.store import Store

log = logging.getLogger(__name__)


class RemoteBackedStore(Store):
    """The store at `remote`, with its index and at most `cache_bytes` of its files under `root`.

    Several processes may share `root`. Raises RemoteUnavailable where the index can't be brought up to date.
    """

    def __init__(
        self,
        root: Path,
        remote: RemoteStore,
        *,
        cache_bytes: int = 10 << 30,
        max_files: int = 16,
        max_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(root, max_files=max_files, max_bytes=max_bytes)
        self._remote = remote
        self._blobs: RemoteBlobs = RemoteBlobs(root, remote, cache_bytes)
        self._root = root
        self._began = -math.inf
        """When the last refresh began."""
        self._trouble: RemoteUnavailable | None = None
        """Which it ended with."""
        self.refresh()

    def refresh(self) -> None:
        """Learn what has happened in the remote store since the last time."""
        with self._locked():
            self._refresh()

    def _refresh(self) -> None:
        self._began, self._trouble = time.monotonic(), None
        try:
            self._catch_up()
        except RemoteUnavailable as error:
            self._trouble = error
            raise
        except BaseException:
            # Whoever waits for this one is to meet the trouble himself.
            self._began = -math.inf
            raise

    def follow(self, seconds: float) -> Callable[[], None]:
        """Refresh every so many seconds, in a thread of its own, until what this returns is called."""
        ended = threading.Event()

        def until_ended() -> None:
            while not ended.wait(seconds):
                try:
                    self.refresh()
                except (StoreError, OSError) as exc:
                    log.warning("what others publish isn't seen for now: %s", exc)
                except Exception:
                    # A thread that ended would do so unseen, and this server never hear of anything again.
                    log.exception("what others publish isn't seen for now")

        thread = threading.Thread(target=until_ended, name="remote-store", daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join()

        return end

    def resolve(self, ref: str | Reference) -> ArtifactVersion:
        """As in a local store; what isn't known is looked for in the remote store. Raises RemoteUnavailable too."""
        with suppress(ArtifactNotFound):
            return self.known(ref)
        self.learn()
        return self.known(ref)

    def learn(self) -> None:
        """Refresh; of many threads that call this at once, one does it for all. Raises RemoteUnavailable."""
        called = time.monotonic()
        with self._locked():
            if self._began < called:
                self._refresh()
            elif self._trouble is not None:
                raise RemoteUnavailable(str(self._trouble)) from self._trouble

    def set_alias(
        self, name: str, alias: str, version: int, *, expected: str | None = None, **stated: Unpack[Stated]
    ) -> Alias:
        """As in a local store. Raises RemoteUnavailable too."""
        check_alias(alias)

        def attempt(db: sqlite3.Connection) -> Event | None:
            before = aliases.find(db, name, alias)
            if aliases.move(db, name, alias, version, expected=expected, **stated) == before:
                return None
            return new_event("set_alias", name, alias=alias, version=version, **stated)

        self._change(attempt)
        moved = self.alias(name, alias)
        assert moved is not None
        return moved

    def delete_alias(self, name: str, alias: str, *, expected: str | None = None, **stated: Unpack[Stated]) -> None:
        """As in a local store. Raises RemoteUnavailable too."""
        check_alias(alias)

        def attempt(db: sqlite3.Connection) -> Event | None:
            before = aliases.find(db, name, alias)
            aliases.remove(db, name, alias, expected=expected, **stated)
            return None if before is None else new_event("delete_alias", name, alias=alias, **stated)

        self._change(attempt)

    def delete_version(self, name: str, version: int, **stated: Unpack[Stated]) -> None:
        """As in a local store, but the leases that count are this machine's. Raises RemoteUnavailable too."""

        def attempt(db: sqlite3.Connection) -> Event:
            row = find_row(db, Reference(name, version))
            if held_by := holders(db, name, version, row["digest"]):
                held = ", ".join(held_by)
                raise InUse(
                    f"{name}@{version} is held by {held}; end them first, or yank it", "version", holders=held_by
                )
            return new_event("delete", name, version=version, **stated)

        self._change(attempt)

    def collect_garbage(self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = True) -> Garbage:
        """As in a local store, of the copy; and of the remote store what writers that died left unfinished there."""
        local = super().collect_garbage(grace_seconds=grace_seconds, dry_run=dry_run)
        swept = self._remote.sweep(time.time() - grace_seconds, dry_run=dry_run)
        tmp = local.tmp + [path for path, _ in swept]
        return replace(local, tmp=tmp, size=local.size + sum(size for _, size in swept))

    def _set_yanked(
        self, name: str, version: int, action: str, at: str | None, **stated: Unpack[Stated]
    ) -> ArtifactVersion:
        def attempt(db: sqlite3.Connection) -> Event | None:
            if (find_row(db, Reference(name, version))["yanked_at"] is None) == (at is None):
                return None
            return new_event(action, name, version=version, **stated)

        self._change(attempt)
        return self.known(Reference(name, version))

    def _insert(
        self, name: str, manifest: Manifest, text: bytes, staged: Mapping[str, StagedFile], **stated: Unpack[Stated]
    ) -> Publication:
        digest = digest_of(text)
        for entry in manifest.files:
            self._remote.put_file(entry, staged[entry.path].path)
        self._remote.put_manifest(text)
        created = False

        def attempt(db: sqlite3.Connection) -> Event | None:
            nonlocal created
            for reference in references(manifest):
                find_row(db, parse_reference(reference))
            known = db.execute("SELECT 1 FROM versions WHERE name = ? AND digest = ?", (name, digest)).fetchone()
            created = known is None
            last = db.execute("SELECT last_version FROM artifacts WHERE name = ?", (name,)).fetchone()
            number = 1 if last is None else last[0] + 1
            if not created:
                return None
            return new_event("publish", name, version=number, digest=digest, **stated)

        self._change(attempt)
        for file in staged.values():
            self._blobs.adopt(file)
        self._blobs.make_room()
        return Publication(self.known(Reference(name, digest=digest)), created)

    def _change(self, attempt: Callable[[sqlite3.Connection], Event | None]) -> None:
        """Append the event that `attempt` decides on, in a transaction that is undone, with all that happened before
        in the database; again where another machine was first."""
        with self._locked():
            while True:
                self._catch_up()
                with self._undone() as db:
                    event = attempt(db)
                if event is None or self._remote.append(self._position() + 1, event):
                    break
            self._catch_up()

    def _catch_up(self) -> None:
        position = self._position()
        for event in self._remote.events(position):
            self._apply(event)
            position += 1
            self._record(position)

    def _apply(self, event: Event) -> None:
        """Do here what happened there. Doing the last event again, after a crash, changes nothing."""
        name, version = event.name, event.version or 0
        match event.action:
            case "publish":
                self._apply_publication(event)
            case "delete":
                with suppress(ArtifactNotFound):
                    self._apply_deletion(event)
            case "yank" | "unyank":
                at = event.at.isoformat() if event.action == "yank" else None
                super()._set_yanked(name, version, event.action, at, **event.stated)
            case "set_alias":
                super().set_alias(name, event.alias or "", version, **event.stated)
            case "delete_alias":
                with suppress(ArtifactNotFound):
                    super().delete_alias(name, event.alias or "", **event.stated)
        self._date(event)

    def _apply_publication(self, event: Event) -> None:
        assert event.digest is not None
        text = self._remote.manifest(event.digest)
        version = super()._insert(event.name, read_manifest(text), text, {}, **event.stated).version
        if (version.version, version.digest) != (event.version, event.digest):
            raise CorruptArtifact(
                f"{event.name}@{event.version} of {self._remote.url} would be version {version.version} here; remove "
                f"the folder {self._root.name!r}, which is only a copy, and start again"
            )

    def _apply_deletion(self, event: Event) -> None:
        """Elsewhere nobody knows of the leases here: the version is gone, and only its files wait for their end."""
        with self._leases.with_versions() as db, transaction(db):
            row = find_row(db, Reference(event.name, event.version))
            if self._leases.held(db, row["digest"]):
                db.execute(
                    "INSERT OR REPLACE INTO leaving VALUES (?, ?, ?, ?)",
                    (row["name"], row["version"], row["digest"], row["manifest"]),
                )
            self._drop(db, row, **event.stated)

    def _date(self, event: Event) -> None:
        """It happened when it happened, not when this machine heard of it."""
        at = event.at.isoformat()
        with connect(self._database) as db, transaction(db):
            db.execute("UPDATE audit SET at = ? WHERE id = (SELECT MAX(id) FROM audit)", (at,))
            if event.action == "publish":
                db.execute(
                    "UPDATE versions SET created_at = ? WHERE name = ? AND version = ?", (at, event.name, event.version)
                )

    def _position(self) -> int:
        """How many events this folder has seen. Raises StoreError for a folder of another remote store."""
        try:
            seen = json.loads((self._root / "remote.json").read_text("utf-8"))
            url, events = str(seen["url"]), int(seen["events"])
        except FileNotFoundError:
            return 0
        except (ValueError, TypeError, KeyError) as exc:
            raise CorruptArtifact(
                f"{self._root.name}/remote.json can't be read ({exc!r}); remove that folder, which is only a copy"
            ) from exc
        if url != self._remote.url:
            raise StoreError(f"{self._root.name!r} is a copy of {url}, not of {self._remote.url}", "store")
        return events

    def _record(self, position: int) -> None:
        temporary = self._root / "remote.json.new"
        temporary.write_text(json.dumps({"url": self._remote.url, "events": position}), "utf-8")
        fsync(temporary)
        os.replace(temporary, self._root / "remote.json")
        fsync(self._root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, of all threads and processes that share the folder."""
        with (self._root / "remote.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _undone(self) -> Iterator[sqlite3.Connection]:
        """The database, with the leases, in a transaction whose changes are undone."""
        with self._leases.with_versions() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            finally:
                db.execute("ROLLBACK")


def open_store(
    data_dir: Path,
    url: str | None = None,
    *,
    cache_bytes: int = 10 << 30,
    max_files: int = 16,
    max_bytes: int = 1 << 30,
) -> Store:
    """The store at a URL, with a copy in `<data_dir>/remote`; without one, that in `<data_dir>/artifacts`."""
    if url is None:
        return Store(data_dir / "artifacts", max_files=max_files, max_bytes=max_bytes)
    remote = RemoteStore(url)
    folder = data_dir / "remote" / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    return RemoteBackedStore(folder, remote, cache_bytes=cache_bytes, max_files=max_files, max_bytes=max_bytes)
