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
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from steering_store import aliases
from steering_store.aliases import Alias
from steering_store.blobs import StagedFile, fsync
from steering_store.db import connect, transaction
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InUse, StoreBusy, StoreError
from steering_store.holders import holders
from steering_store.manifest import Manifest, canonical_json, digest_of, parse_manifest
from steering_store.presets import references
from steering_store.records import ArtifactVersion, Publication, find_row
from steering_store.reference import Reference, check_alias, parse_reference
from steering_store.remote import RemoteStore, new_event
from steering_store.remote_cache import RemoteBlobs
from steering_store.remote_state import Event
from steering_store.store import Store

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 1.0


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
        self._refreshed_at = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Learn what has happened in the remote store since the last time."""
        with self._locked(), suppress(InUse):
            # A version that a lease holds here goes when that ends; what happened after it waits so long.
            self._catch_up()
        self._refreshed_at = time.monotonic()

    def follow(self, seconds: float) -> Callable[[], None]:
        """Refresh every so many seconds, in a thread of its own, until what this returns is called."""
        ended = threading.Event()

        def until_ended() -> None:
            while not ended.wait(seconds):
                try:
                    self.refresh()
                except StoreError as exc:
                    log.warning("what others publish isn't seen for now: %s", exc)

        thread = threading.Thread(target=until_ended, name="remote-store", daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join()

        return end

    def resolve(self, ref: str | Reference) -> ArtifactVersion:
        """As in a local store; what isn't known is looked for in the remote store, at most once a second."""
        try:
            return super().resolve(ref)
        except ArtifactNotFound:
            if time.monotonic() - self._refreshed_at < LOOK_AGAIN_SECONDS:
                raise
        self.refresh()
        return super().resolve(ref)

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: str | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> Alias:
        """As in a local store. Raises RemoteUnavailable too."""
        check_alias(alias)

        def attempt(db: sqlite3.Connection) -> Event | None:
            before = aliases.find(db, name, alias)
            if aliases.move(db, name, alias, version, expected=expected, by=by, reason=reason) == before:
                return None
            return new_event("set_alias", name, alias=alias, version=version, by=by, reason=reason)

        self._change(attempt)
        return next(each for each in self.aliases(name) if each.alias == alias)

    def delete_alias(
        self, name: str, alias: str, *, expected: str | None = None, by: str | None = None, reason: str | None = None
    ) -> None:
        """As in a local store. Raises RemoteUnavailable too."""
        check_alias(alias)

        def attempt(db: sqlite3.Connection) -> Event | None:
            before = aliases.find(db, name, alias)
            aliases.remove(db, name, alias, expected=expected, by=by, reason=reason)
            return None if before is None else new_event("delete_alias", name, alias=alias, by=by, reason=reason)

        self._change(attempt)

    def delete_version(self, name: str, version: int, *, by: str | None = None, reason: str | None = None) -> None:
        """As in a local store, but the leases that count are this machine's. Raises RemoteUnavailable too."""

        def attempt(db: sqlite3.Connection) -> Event:
            row = find_row(db, Reference(name, version))
            if held_by := holders(db, name, version, row["digest"]):
                held = ", ".join(held_by)
                raise InUse(
                    f"{name}@{version} is held by {held}; end them first, or yank it", "version", holders=held_by
                )
            return new_event("delete", name, version=version, by=by, reason=reason)

        self._change(attempt)

    def _set_yanked(
        self, name: str, version: int, action: str, at: str | None, by: str | None, reason: str | None
    ) -> ArtifactVersion:
        def attempt(db: sqlite3.Connection) -> Event | None:
            if (find_row(db, Reference(name, version))["yanked_at"] is None) == (at is None):
                return None
            return new_event(action, name, version=version, by=by, reason=reason)

        self._change(attempt)
        return super().resolve(Reference(name, version))

    def _insert(self, name: str, manifest: Manifest, staged: Mapping[str, StagedFile]) -> Publication:
        text = canonical_json(manifest)
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
            return new_event("publish", name, version=number, digest=digest) if created else None

        self._change(attempt)
        for file in staged.values():
            self._blobs.adopt(file)
        self._blobs.make_room()
        return Publication(super().resolve(Reference(name, digest=digest)), created)

    def _change(self, attempt: Callable[[sqlite3.Connection], Event | None]) -> None:
        """Append the event that `attempt` decides on, in a transaction that is undone, with all that happened before
        in the database; again where another machine was first."""
        with self._locked():
            while True:
                try:
                    self._catch_up()
                except InUse as exc:
                    raise StoreBusy(f"a version was deleted elsewhere while it is needed here: {exc.message}") from exc
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
        name, version, stated = event.name, event.version or 0, {"by": event.by, "reason": event.reason}
        match event.action:
            case "publish":
                self._apply_publication(event)
            case "delete":
                with suppress(ArtifactNotFound):
                    super().delete_version(name, version, **stated)
            case "yank" | "unyank":
                at = event.at.isoformat() if event.action == "yank" else None
                super()._set_yanked(name, version, event.action, at, event.by, event.reason)
            case "set_alias":
                super().set_alias(name, event.alias or "", version, **stated)
            case "delete_alias":
                with suppress(ArtifactNotFound):
                    super().delete_alias(name, event.alias or "", **stated)
        self._date(event)

    def _apply_publication(self, event: Event) -> None:
        assert event.digest is not None
        manifest = parse_manifest(self._remote.manifest(event.digest))
        version = super()._insert(event.name, manifest, {}).version
        if (version.version, version.digest) != (event.version, event.digest):
            raise CorruptArtifact(
                f"{event.name}@{event.version} of {self._remote.url} would be version {version.version} here; remove "
                f"the folder {self._root.name!r}, which is only a copy, and start again"
            )

    def _date(self, event: Event) -> None:
        """It happened when it happened, not when this machine heard of it."""
        at = event.at.isoformat()
        with connect(self._database) as db, transaction(db):
            if event.action == "publish":
                db.execute(
                    "UPDATE versions SET created_at = ? WHERE name = ? AND version = ?", (at, event.name, event.version)
                )
            else:
                db.execute("UPDATE audit SET at = ? WHERE id = (SELECT MAX(id) FROM audit)", (at,))

    def _position(self) -> int:
        """How many events this folder has seen. Raises StoreError for a folder of another remote store."""
        try:
            seen = json.loads((self._root / "remote.json").read_text("utf-8"))
        except FileNotFoundError:
            return 0
        if seen["url"] != self._remote.url:
            raise StoreError(f"{self._root.name!r} is a copy of {seen['url']}, not of {self._remote.url}", "store")
        return int(seen["events"])

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
