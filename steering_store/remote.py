"""A store at a URL, which many machines share. Everything in it is created once and never changed.

polyhelm-store.json           which layout this is
blobs/sha256/ab/HEX           files of artifacts, by digest
manifests/sha256/ab/HEX.json  manifests in canonical form, by digest
events/000000001.json         what happened: publications, moves of aliases, yanks, deletions; numbered without gaps

Only one writer can create the event with the next number, after it has seen all before it. That alone makes versions
dense and never reused, and puts moves of aliases into one order with a history; it needs nothing of the file system but
create-only. What an event names was uploaded before it, so that readers never see half.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pydantic import ValidationError

from steering_store.blobs import CHUNK_BYTES, corrupt
from steering_store.errors import CorruptArtifact, StoreError
from steering_store.manifest import MAX_MANIFEST_BYTES, FileEntry, digest_of, read_manifest
from steering_store.presets import references
from steering_store.reference import Reference, check_name, parse_reference
from steering_store.remote_objects import Objects
from steering_store.remote_state import Event, RemoteArtifact, RemoteState, RemoteVersion
from steering_store.transfer_stream import VerifiedReader

MARKER = "polyhelm-store.json"
LAYOUT = b'{"layout": 1}\n'
EVENTS = "events"
MAX_EVENT_BYTES = 1 << 16


class RemotePublication(NamedTuple):
    """What a publication led to; `created` is False where the same artifact was there already."""

    version: RemoteVersion
    created: bool


class RemoteStore:
    """The store at `url`, any fsspec URL. Raises StoreError for one of a newer layout, RemoteUnavailable.

    Safe to use from several threads and processes.
    """

    def __init__(self, url: str) -> None:
        self._objects = Objects(url)
        self.url = self._objects.url
        self._lock = threading.Lock()
        self._state = RemoteState()
        with contextlib.suppress(FileNotFoundError):
            self._check_layout()

    def resolve(self, reference: Reference) -> RemoteVersion:
        """Find a version. Raises ArtifactNotFound."""
        with self._lock:
            return self._caught_up().resolve(reference)

    def publish(self, name: str, manifest: bytes, by: str | None = None) -> RemotePublication:
        """Publish a manifest, in canonical form, whose files have been uploaded: the last step of a publication.

        Raises ArtifactNotFound where the store lacks what a preset names.
        """
        check_name(name)
        digest = self.put_manifest(manifest)
        needed = [parse_reference(reference) for reference in references(read_manifest(manifest))]
        created = False

        def next_version(state: RemoteState) -> Event | None:
            nonlocal created
            for reference in needed:
                state.resolve(reference)
            artifact = state.artifacts.get(name, RemoteArtifact())
            created = all(version.digest != digest for version in artifact.versions.values())
            if not created:
                return None
            return new_event("publish", name, version=artifact.last_version + 1, digest=digest, by=by)

        self.change(next_version)
        return RemotePublication(self.resolve(Reference(name, digest=digest)), created)

    def change(self, decide: Callable[[RemoteState], Event | None]) -> None:
        """Append the event that `decide` makes of the present state, or none; it is asked again where another writer
        came first.
        """
        with self._lock:
            while event := decide(self._caught_up()):
                if self.append(self._state.events + 1, event):
                    return

    def append(self, number: int, event: Event) -> bool:
        """Let an event be the one with this number; False where another came first."""
        if number == 1 and not self._objects.create(MARKER, LAYOUT):
            self._check_layout()
        if self._objects.create(_event_path(number), event.model_dump_json(exclude_none=True).encode()):
            return True
        # A driver that repeats a request whose answer was lost finds its own object there.
        return self._event(number).nonce == event.nonce

    def events(self, after: int) -> Iterator[Event]:
        """The events behind the first `after`, in order. Raises CorruptArtifact where one is damaged or missing."""
        listed = 0
        if after == 0:
            # Many at once: one by one, a long history would take as many round trips.
            paths = self._objects.list(EVENTS)
            listed = len(paths)
            # A list that is made while others write may leave out what the loop below then finds.
            dense = [path for number, path in enumerate(paths, start=1) if path == _event_path(number)]
            for raw in self._objects.read_many(dense, MAX_EVENT_BYTES):
                after += 1
                yield self._parsed(after, raw)
        with contextlib.suppress(FileNotFoundError):
            while True:
                event = self._event(after + 1)
                after += 1
                yield event
        if after < listed:
            raise CorruptArtifact(f"{self.url}/{EVENTS}: event {after + 1} is missing, or other files are there")

    def manifest(self, digest: str) -> bytes:
        """A manifest in canonical form, verified. Raises CorruptArtifact."""
        path = _manifest_path(digest)
        try:
            text = self._objects.read(path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise CorruptArtifact(f"{self.url}/{path} is missing; restore it", "manifest") from None
        if digest_of(text) != digest:
            raise CorruptArtifact(f"{self.url}/{path} no longer has its digest; remove it and push again", "manifest")
        return text

    def put_manifest(self, text: bytes) -> str:
        """Upload a manifest in canonical form, and return its digest. Raises CorruptArtifact."""
        digest = digest_of(text)
        self._objects.create(_manifest_path(digest), text)
        self.manifest(digest)
        return digest

    def put_file(self, entry: FileEntry, source: Path) -> None:
        """Upload a file unless it is there whole, and read back what was uploaded. Raises CorruptArtifact."""
        if not self._has(entry):
            self._objects.upload(_blob_path(entry), source)
            with self.open_file(entry) as stream:
                _drain(stream)

    @contextlib.contextmanager
    def open_file(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """Read a file. Its last piece comes only once the whole has proved to be what was published, and
        CorruptArtifact otherwise.
        """
        with contextlib.ExitStack() as opened:
            try:
                stream = opened.enter_context(self._objects.open(_blob_path(entry)))
            except FileNotFoundError:
                raise corrupt(entry, f"is missing in {self.url}") from None
            yield cast(BinaryIO, VerifiedReader(stream, entry))

    def sweep(self, older_than: float, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove the unfinished files of dead writers, where the store is on a disk; returns them and their sizes."""
        return list(self._objects.sweep(older_than, dry_run=dry_run))

    def _has(self, entry: FileEntry) -> bool:
        try:
            with self.open_file(entry) as stream:
                _drain(stream)
        except CorruptArtifact:
            return False
        return True

    def _caught_up(self) -> RemoteState:
        self._state.apply(self.events(self._state.events))
        return self._state

    def _event(self, number: int) -> Event:
        return self._parsed(number, self._objects.read(_event_path(number), MAX_EVENT_BYTES))

    def _parsed(self, number: int, raw: bytes) -> Event:
        try:
            return Event.model_validate_json(raw)
        except ValidationError as exc:
            where = f"{self.url}/{_event_path(number)}"
            raise CorruptArtifact(f"{where}: {exc.errors()[0]['msg']}; restore it, or upgrade polyhelm") from None

    def _check_layout(self) -> None:
        found = self._objects.read(MARKER, MAX_EVENT_BYTES)
        if found != LAYOUT:
            raise StoreError(f"{self.url}/{MARKER} holds {found[:80]!r}, not {LAYOUT!r}; upgrade polyhelm", "store")


def new_event(action: str, name: str, **fields: object) -> Event:
    """An event that happens now."""
    common = {"action": action, "name": name, "at": datetime.now(UTC), "nonce": uuid.uuid4().hex}
    return Event.model_validate(common | fields)


def _event_path(number: int) -> str:
    return f"{EVENTS}/{number:09}.json"


def _manifest_path(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"manifests/sha256/{hexadecimal[:2]}/{hexadecimal}.json"


def _blob_path(entry: FileEntry) -> str:
    return f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def _drain(stream: BinaryIO) -> None:
    while stream.read(CHUNK_BYTES):
        pass
