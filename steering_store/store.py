"""The store: publish, resolve, list, load, verify, name, yank, delete and collect artifacts under one folder.

<root>/store.sqlite      which versions exist, their aliases, and who changed what
<root>/leases.sqlite     which of them running requests need
<root>/blobs/sha256/ab/  their files, by digest
<root>/tmp/              files on their way in
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Unpack

from steering_store import aliases, audit, garbage, presets
from steering_store.aliases import Alias
from steering_store.audit import Stated
from steering_store.blobs import Blobs, Incoming, Source, StagedFile, check_hash, corrupt
from steering_store.db import connect, migrate, transaction
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InUse, InvalidManifest, InvalidTensor, TooLarge
from steering_store.garbage import GRACE_SECONDS, Garbage
from steering_store.holders import holders
from steering_store.labels import FeaturePage, Label, check_labels, find_features, read_features, read_labels
from steering_store.leases import Lease, Leases
from steering_store.lookup import Remembered
from steering_store.manifest import FileEntry, Manifest, canonical_json, digest_of, parse_manifest, read_published
from steering_store.records import (
    ArtifactVersion,
    AuditEntry,
    Page,
    Problem,
    Publication,
    find_row,
    listed,
    not_found,
    page_of,
    problems_of,
    version_of,
)
from steering_store.reference import Reference, check_alias, check_file_path, check_name, parse_reference
from steering_store.tensors import Tensor, check_tensors, read_hashed, read_tensors

ALL = (1 << 62) - 1
REMEMBERED_LABELS = 4
MOST_REMEMBERED_LABELS = 8 << 20
"""Bytes of a file; its lines take several times that."""


class Store:
    """The artifacts under `root`, which is created if needed. Safe to use from several threads and processes."""

    def __init__(self, root: Path, *, max_files: int = 16, max_bytes: int = 1 << 30) -> None:
        self.max_files = max_files
        self.max_bytes = max_bytes
        self._blobs = Blobs(root)
        self._database = root / "store.sqlite"
        migrate(self._database)
        self._leases = Leases(self._database)
        self._remembered: Remembered[ArtifactVersion] = Remembered(self._database)
        self._features_lock = threading.Lock()
        self._known_features: dict[str, tuple[Label, ...]] = {}

    def publish(
        self,
        name: str,
        manifest: Manifest | Mapping[str, object] | str | bytes,
        files: Mapping[str, Source],
        **stated: Unpack[Stated],
    ) -> Publication:
        """Publish files (by their path in the artifact) as the next version of `name`; all of it, or nothing.

        The manifest's `files` may be left out; where given, they must match. A preset has no files, and its references
        are pinned to what they mean now. Raises InvalidName, InvalidManifest, InvalidTensor, UnsupportedFile, TooLarge,
        ArtifactNotFound for an artifact of a preset, StoreBusy or StoreFull.
        """
        self._check_names(name, files)
        draft = presets.pinned(parse_manifest(manifest), self.resolve)
        _check_complete(draft, files)
        with ExitStack() as cleanup:
            staged = self._stage(files, cleanup)
            _check_content(draft, staged)
            complete = _with_files(draft, staged)
            return self._insert(name, complete, canonical_json(complete), staged, **stated)

    def publish_copy(
        self, name: str, text: bytes, files: Mapping[str, Source], **stated: Unpack[Stated]
    ) -> Publication:
        """Publish what another store has published, by its manifest's text, so that it keeps its digest.

        The text may be of an earlier schema. All is checked as `publish` does, and raises what that raises.
        """
        self._check_names(name, files)
        manifest = read_published(text)
        if presets.pinned(manifest, self.resolve) != manifest:
            raise InvalidManifest("interventions: they aren't pinned to digests; publish it instead", "interventions")
        _check_complete(manifest, files)
        with ExitStack() as cleanup:
            staged = self._stage(files, cleanup)
            _check_content(manifest, staged)
            _check_listed(manifest, staged)
            return self._insert(name, manifest, text, staged, **stated)

    def _check_names(self, name: str, files: Mapping[str, Source]) -> None:
        check_name(name)
        if len(files) > self.max_files:
            raise TooLarge(f"files: {len(files)} of them, and at most {self.max_files} are accepted", "files")
        for path in files:
            check_file_path(path)

    def incoming(self) -> Incoming:
        """A file of the store to write an upload to, which `publish` then takes without another copy. Close it."""
        return self._blobs.incoming()

    def resolve(self, ref: str | Reference) -> ArtifactVersion:
        """Find a version: `name@3`, `name@production`, `name@sha256:…`, or `name` for the highest that isn't yanked.

        Raises InvalidName, InvalidReference or ArtifactNotFound.
        """
        return self.known(ref)

    def known(self, ref: str | Reference) -> ArtifactVersion:
        """As `resolve`, from what is known here, for callers that mustn't wait for another machine."""
        return self._remembered.get(str(ref), lambda db: version_of(find_row(db, _reference(ref))))

    def learn(self) -> None:
        """Learn of all that has been published until now, elsewhere too. Here there is no elsewhere."""

    def list_artifacts(
        self, *, kind: str | None = None, model: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page:
        """The highest version of each artifact that isn't yanked, by name, beginning behind the name `after`.

        `model` is a model's name or architecture, as the manifest writes it.
        """
        query = """
            SELECT versions.* FROM versions
            JOIN (
                SELECT name, MAX(version) AS version FROM versions WHERE name > ?1 AND yanked_at IS NULL GROUP BY name
            ) USING (name, version)
            WHERE (?2 IS NULL OR kind = ?2) AND (
                ?3 IS NULL OR CASE WHEN json_valid(manifest)
                THEN ?3 IN (manifest ->> '$.model.name', manifest ->> '$.model.architecture') ELSE TRUE END
            ) ORDER BY name LIMIT ?4
        """
        with connect(self._database) as db:
            rows = db.execute(query, (after or "", kind, model, limit + 1)).fetchall()
        return page_of(rows, limit)

    def versions(self, name: str, *, include_yanked: bool = False) -> list[ArtifactVersion]:
        """The versions of an artifact that are whole, oldest first.

        Raises InvalidName, or ArtifactNotFound where there is none.
        """
        page = self.version_page(name, include_yanked=include_yanked, limit=ALL)
        if not page.rows:
            raise not_found(Reference(name))
        return page.items

    def version_page(self, name: str, *, include_yanked: bool = False, after: int = 0, limit: int = 100) -> Page:
        """Versions of an artifact, oldest first, beginning behind the number `after`. Raises InvalidName."""
        check_name(name)
        query = "SELECT * FROM versions WHERE name = ? AND version > ? AND (? OR yanked_at IS NULL) ORDER BY version"
        with connect(self._database) as db:
            rows = db.execute(query + " LIMIT ?", (name, after, include_yanked, limit + 1)).fetchall()
        return page_of(rows, limit)

    def annotated(self, name: str, key: str, value: str) -> ArtifactVersion | None:
        """The latest whole version whose manifest has this annotation, yanked ones among them, or None.

        Raises InvalidName.
        """
        check_name(name)
        query = """
            SELECT versions.* FROM versions,
                json_each(CASE WHEN json_valid(manifest) THEN manifest ELSE '{}' END, '$.annotations') AS annotation
            WHERE name = ? AND annotation.key = ? AND annotation.value = ? ORDER BY version DESC
        """
        with connect(self._database) as db:
            found = (listed(row) for row in db.execute(query, (name, key, value)))
            return next((each for each in found if isinstance(each, ArtifactVersion)), None)

    def head(self, name: str) -> ArtifactVersion:
        """What to show of an artifact: its highest version that is whole and not yanked, or else its highest whole one.

        Raises InvalidName, ArtifactNotFound, or CorruptArtifact where all are damaged.
        """
        check_name(name)
        problem = None
        with connect(self._database) as db:
            query = "SELECT * FROM versions WHERE name = ? ORDER BY yanked_at IS NOT NULL, version DESC"
            for row in db.execute(query, (name,)):
                found = listed(row)
                if isinstance(found, ArtifactVersion):
                    return found
                problem = problem or found
        if problem is None:
            raise not_found(Reference(name))
        raise CorruptArtifact(problem.message, "manifest")

    def file_path(self, version: ArtifactVersion, path: str) -> Path:
        """Where a file of a version lies, its bytes verified in the last half minute and not written to since.

        Raises ArtifactNotFound or CorruptArtifact.
        """
        with self._unless_deleted(version):
            return self._blobs.recent_path(_entry(version, path))

    def load_tensors(
        self, version: ArtifactVersion, wanted: Mapping[str, Sequence[int] | None] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of a version by name, as float32 or int64: all, or those `wanted`, of which only the given rows.

        Every file that is read is hashed. What is held in memory is what is returned, and a few megabytes. Raises
        CorruptArtifact, or ArtifactNotFound where the version was deleted since it was resolved.
        """
        tensors: dict[str, Tensor] = {}
        with self._unless_deleted(version):
            for entry in version.manifest.files:
                names = {site.tensor for site in version.manifest.sites if site.file == entry.path}
                if wanted is None and names:
                    tensors |= self._whole_file(entry)
                elif chosen := {name: rows for name, rows in (wanted or {}).items() if name in names}:
                    with self._blobs.open_verified(entry) as stream:
                        tensors |= read_tensors(stream, chosen)
        return tensors

    def feature_labels(self, version: ArtifactVersion, indices: Collection[int] | None = None) -> dict[int, str]:
        """What an SAE's features are called, by index: all that have a label, or those of `indices` that do.

        Empty for an artifact without labels. Raises CorruptArtifact or ArtifactNotFound.
        """
        if version.manifest.labels is None:
            return {}
        with self._unless_deleted(version), self._blobs.open_verified(_entry(version, version.manifest.labels)) as file:
            return read_labels(file, indices)

    def find_features(
        self, version: ArtifactVersion, query: str = "", *, after: int | None = None, limit: int = 100
    ) -> FeaturePage:
        """Features of an SAE whose label has all words of the query, by rising index, beginning behind `after`.

        Raises ArtifactNotFound for an artifact without labels, or CorruptArtifact.
        """
        labels = version.manifest.labels
        if labels is None:
            raise ArtifactNotFound(
                f"{version.ref} has no labels to find a feature by; publish some, or fit sae_examples", "ref"
            )
        return find_features(self._features(version, _entry(version, labels)), query, after, limit)

    def verify(self, ref: str | Reference | None = None) -> list[Problem]:
        """Hash one version, or every one, and say what is damaged; an empty list means nothing is."""
        with connect(self._database) as db:
            query = "SELECT * FROM versions ORDER BY name, version"
            rows = db.execute(query).fetchall() if ref is None else [find_row(db, _reference(ref))]
        return [problem for row in rows for problem in problems_of(row, self._blobs)]

    def aliases(self, name: str, *, after: str = "", limit: int = ALL) -> list[Alias]:
        """The aliases of an artifact, in order, each with the etag that a later move is compared with: those behind
        `after`, and at most `limit` of them.

        Raises InvalidName or ArtifactNotFound.
        """
        with self._artifact(name) as db:
            return aliases.of_artifact(db, name, after=after, limit=limit)

    def alias(self, name: str, alias: str) -> Alias | None:
        """One alias of an artifact, or None. Raises InvalidName or ArtifactNotFound."""
        with self._artifact(name) as db:
            return aliases.find(db, name, alias)

    def set_alias(
        self, name: str, alias: str, version: int, *, expected: str | None = None, **stated: Unpack[Stated]
    ) -> Alias:
        """Point an alias at a version, if it is still in the state that the caller has seen.

        `expected` is the etag that it must have, `ABSENT` where it must not exist yet, or None to move it in any case.
        Moving it to where it points changes nothing. Raises InvalidName, ArtifactNotFound, Yanked or
        PreconditionFailed, which carries the current etag.
        """
        check_alias(alias)
        with connect(self._database) as db, transaction(db):
            return aliases.move(db, name, alias, version, expected=expected, **stated)

    def delete_alias(self, name: str, alias: str, *, expected: str | None = None, **stated: Unpack[Stated]) -> None:
        """Delete an alias, if it has the etag `expected` (None: in any case).

        Raises InvalidName, ArtifactNotFound or PreconditionFailed.
        """
        check_alias(alias)
        with self._artifact(name) as db, transaction(db):
            aliases.remove(db, name, alias, expected=expected, **stated)

    def history(self, name: str, alias: str | None = None, *, after: int = 0, limit: int = ALL) -> list[AuditEntry]:
        """The audit trail of an artifact: publications, moves of aliases, yanks and deletions, oldest first: those
        behind the entry with the id `after`, and at most `limit` of them.

        Raises InvalidName or ArtifactNotFound.
        """
        with self._artifact(name) as db:
            return audit.entries(db, name, alias, after=after, limit=limit)

    def yank(self, name: str, version: int, **stated: Unpack[Stated]) -> ArtifactVersion:
        """Hide a version from lists and from `name` without a ref; its number, its digest and aliases that point at it
        still find it. Yanking it again changes nothing. Raises InvalidName or ArtifactNotFound."""
        now = datetime.now(UTC).isoformat()
        return self._set_yanked(name, version, "yank", now, **stated)

    def unyank(self, name: str, version: int, **stated: Unpack[Stated]) -> ArtifactVersion:
        """Show a yanked version again. Raises InvalidName or ArtifactNotFound."""
        return self._set_yanked(name, version, "unyank", None, **stated)

    def delete_version(self, name: str, version: int, **stated: Unpack[Stated]) -> None:
        """Delete a version for good. Its number is never given again; its files go with the next garbage collection.

        Raises InvalidName, ArtifactNotFound, or InUse while an alias, a preset or a lease holds it.
        """
        with self._leases.with_versions() as db, transaction(db):
            row = find_row(db, Reference(name, version))
            if held_by := holders(db, name, version, row["digest"]):
                raise InUse(
                    f"{name}@{version} is held by {', '.join(held_by)}; move, delete or end these first, or yank it",
                    "version",
                    holders=held_by,
                )
            self._drop(db, row, **stated)

    def lease(self, digest: str, holder: str, seconds: float) -> Lease:
        """Keep the versions with this digest from deletion for some seconds; again, to keep them for longer.

        `holder` names a process or a request, and is told to whoever tries to delete. Raises ArtifactNotFound.
        """
        return self._leases.take(digest, holder, seconds)

    def release(self, holder: str, digest: str | None = None) -> None:
        """End a holder's lease on a digest, or all its leases; one that has run out is no error."""
        self._leases.release(holder, digest)

    def collect_garbage(self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = True) -> Garbage:
        """Find the files that no version needs and nobody writes, untouched for `grace_seconds`; remove them unless
        `dry_run`. Safe at any grace while others publish. Raises CorruptArtifact where a manifest can't be trusted."""
        return garbage.collect(self._blobs, self._leases, grace_seconds=grace_seconds, dry_run=dry_run)

    def _stage(self, files: Mapping[str, Source], cleanup: ExitStack) -> dict[str, StagedFile]:
        staged: dict[str, StagedFile] = {}
        room = self.max_bytes
        for path, source in files.items():
            staged[path] = cleanup.enter_context(self._blobs.stage(source, room))
            room -= staged[path].size
        return staged

    def _insert(
        self, name: str, manifest: Manifest, text: bytes, staged: Mapping[str, StagedFile], **stated: Unpack[Stated]
    ) -> Publication:
        now = datetime.now(UTC).isoformat()
        row = (name, digest_of(text), manifest.kind, text.decode(), now)
        # The blobs are put in place under the same lock as the row, so that no sweep comes between the two.
        with connect(self._database) as db, transaction(db):
            for file in staged.values():
                self._blobs.adopt(file)
            for reference in presets.references(manifest):
                find_row(db, parse_reference(reference))
            found = db.execute("SELECT * FROM versions WHERE name = ? AND digest = ?", row[:2]).fetchone()
            if found is not None:
                return Publication(version_of(found), created=False)
            number = db.execute(
                "INSERT INTO artifacts VALUES (?, 1, ?) "
                "ON CONFLICT (name) DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
                (name, now),
            ).fetchone()[0]
            added = db.execute(
                "INSERT INTO versions (name, version, digest, kind, manifest, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?) RETURNING *",
                (name, number, *row[1:]),
            ).fetchone()
            audit.record(db, name, "publish", after=number, **stated)
        return Publication(version_of(added), created=True)

    def _drop(self, db: sqlite3.Connection, row: sqlite3.Row, **stated: Unpack[Stated]) -> None:
        name, version = row["name"], row["version"]
        audit.record(db, name, "delete", before=version, **stated)
        db.execute("DELETE FROM versions WHERE name = ? AND version = ?", (name, version))
        garbage.begin_grace(self._blobs, row)

    def _set_yanked(
        self, name: str, version: int, action: str, at: str | None, **stated: Unpack[Stated]
    ) -> ArtifactVersion:
        reference = Reference(name, version)
        with connect(self._database) as db, transaction(db):
            if (find_row(db, reference)["yanked_at"] is None) != (at is None):
                audit.record(db, name, action, before=version, after=version, **stated)
                db.execute(
                    "UPDATE versions SET yanked_at = ?, yank_reason = ? WHERE name = ? AND version = ?",
                    (at, stated.get("reason") if at else None, name, version),
                )
            return version_of(find_row(db, reference))

    def _features(self, version: ArtifactVersion, entry: FileEntry) -> tuple[Label, ...]:
        """The lines of a labels file; those of the last few are remembered, for whoever turns the pages of one."""
        with self._unless_deleted(version), self._features_lock:
            if (known := self._known_features.get(entry.sha256)) is None:
                with self._blobs.open_verified(entry) as file:
                    known = tuple(read_features(file))
                if entry.size <= MOST_REMEMBERED_LABELS:
                    if len(self._known_features) >= REMEMBERED_LABELS:
                        del self._known_features[next(iter(self._known_features))]
                    self._known_features[entry.sha256] = known
            return known

    def _whole_file(self, entry: FileEntry) -> dict[str, Tensor]:
        with self._blobs.open(entry) as stream:
            try:
                tensors, found = read_hashed(stream, entry.path)
            except InvalidTensor as exc:
                # It was a whole file when it was published.
                raise corrupt(entry, "no longer has the bytes that were published") from exc
        check_hash(entry, found)
        return tensors

    @contextmanager
    def _artifact(self, name: str) -> Iterator[sqlite3.Connection]:
        """The database, once the artifact is known to exist."""
        check_name(name)
        with connect(self._database) as db:
            if db.execute("SELECT 1 FROM artifacts WHERE name = ?", (name,)).fetchone() is None:
                raise not_found(Reference(name))
            yield db

    @contextmanager
    def _unless_deleted(self, version: ArtifactVersion) -> Iterator[None]:
        try:
            yield
        except CorruptArtifact:
            # A file that is gone with its version isn't damage.
            with connect(self._database) as db:
                find_row(db, Reference(version.name, digest=version.digest))
            raise


def _reference(ref: str | Reference) -> Reference:
    return parse_reference(ref) if isinstance(ref, str) else ref


def _entry(version: ArtifactVersion, path: str) -> FileEntry:
    for entry in version.manifest.files:
        if entry.path == path:
            return entry
    known = [entry.path for entry in version.manifest.files]
    raise ArtifactNotFound(f"{version.ref} has no file {path!r}; it has {known}", "path")


def _check_complete(manifest: Manifest, files: Mapping[str, Source]) -> None:
    needed = {site.file for site in manifest.sites} | ({manifest.labels} if manifest.labels else set())
    if needed - set(files):
        raise InvalidManifest(f"files: {sorted(needed - set(files))} are named and missing; send them", "files")
    if set(files) - needed:
        raise InvalidManifest(f"files: no field names {sorted(set(files) - needed)}; leave them out", "files")


def _check_content(manifest: Manifest, staged: Mapping[str, StagedFile]) -> None:
    check_tensors(manifest, {path: file.path for path, file in staged.items() if path != manifest.labels})
    if manifest.labels is not None:
        with staged[manifest.labels].path.open("rb") as stream:
            check_labels(manifest, stream)


def _with_files(manifest: Manifest, staged: Mapping[str, StagedFile]) -> Manifest:
    if manifest.files:
        _check_listed(manifest, staged)
    return manifest.model_copy(update={"files": _entries(staged)})


def _check_listed(manifest: Manifest, staged: Mapping[str, StagedFile]) -> None:
    if sorted(manifest.files, key=lambda entry: entry.path) != _entries(staged):
        raise InvalidManifest("files: the list differs from the files sent; correct it, or leave it out", "files")


def _entries(staged: Mapping[str, StagedFile]) -> list[FileEntry]:
    return [FileEntry(path=path, size=file.size, sha256=file.sha256) for path, file in sorted(staged.items())]
