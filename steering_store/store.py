"""The store: publish, resolve, list, load and verify artifacts under one folder.

<root>/store.sqlite      which versions exist
<root>/blobs/sha256/ab/  their files, by digest
<root>/tmp/              files on their way in
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from steering_store.blobs import Blobs, Source, StagedFile
from steering_store.db import connect, migrate, transaction
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidManifest, TooLarge
from steering_store.lookup import Remembered
from steering_store.manifest import (
    FileEntry,
    Manifest,
    canonical_json,
    digest_of,
    parse_manifest,
)
from steering_store.reference import Reference, check_file_path, check_name, parse_reference
from steering_store.tensors import Tensor, check_tensors, read_tensors


@dataclass(frozen=True)
class ArtifactVersion:
    """One published version. `digest` is `sha256:HEX64` of the manifest, `created_at` the time of publication (UTC)."""

    name: str
    version: int
    digest: str
    manifest: Manifest
    created_at: datetime

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Publication(NamedTuple):
    """What a publication led to; `created` is False where the same artifact was there already."""

    version: ArtifactVersion
    created: bool


class Page(NamedTuple):
    """A part of a list, and whether there is more behind it."""

    items: list[ArtifactVersion]
    has_more: bool


class Problem(NamedTuple):
    """Something that `verify` found: the version, the file (None: the manifest), and what to do."""

    ref: str
    file: str | None
    message: str


class Store:
    """The artifacts under `root`, which is created if needed. Safe to use from several threads and processes."""

    def __init__(self, root: Path, *, max_files: int = 16, max_bytes: int = 1 << 30) -> None:
        self.max_files = max_files
        self.max_bytes = max_bytes
        self._blobs = Blobs(root)
        self._database = root / "store.sqlite"
        migrate(self._database)
        self._remembered: Remembered[ArtifactVersion] = Remembered(self._database)

    def publish(
        self, name: str, manifest: Manifest | Mapping[str, object] | str | bytes, files: Mapping[str, Source]
    ) -> Publication:
        """Publish files (by their path in the artifact) as the next version of `name`; all of it, or nothing.

        The manifest's `files` may be left out; where given, they must match. Raises InvalidName, InvalidManifest,
        InvalidTensor, UnsupportedFile, TooLarge, StoreBusy or StoreFull.
        """
        check_name(name)
        if len(files) > self.max_files:
            raise TooLarge(f"files: {len(files)} of them, and at most {self.max_files} are accepted", "files")
        for path in files:
            check_file_path(path)
        draft = parse_manifest(manifest)
        _check_complete(draft, files)
        with ExitStack() as cleanup:
            staged = self._stage(files, cleanup)
            check_tensors(draft, {path: file.path for path, file in staged.items()})
            final = _with_files(draft, staged)
            for file in staged.values():
                self._blobs.adopt(file)
        return self._insert(name, final)

    def resolve(self, ref: str | Reference) -> ArtifactVersion:
        """Find a version; without a ref, the highest. Raises InvalidName, InvalidReference or ArtifactNotFound."""
        key = str(ref)
        known = self._remembered.get(key)
        if known is None:
            seen = self._remembered.seen
            known = _version(self._row(ref))
            self._remembered.put(key, known, seen)
        return known

    def list_artifacts(self, *, kind: str | None = None, after: str | None = None, limit: int = 100) -> Page:
        """The highest version of each artifact, by name, beginning behind the name `after`."""
        query = """
            SELECT versions.* FROM versions
            JOIN (SELECT name, MAX(version) AS version FROM versions WHERE name > ? GROUP BY name) USING (name, version)
            WHERE ? IS NULL OR kind = ? ORDER BY name LIMIT ?
        """
        with connect(self._database) as db:
            rows = db.execute(query, (after or "", kind, kind, limit + 1)).fetchall()
        return Page([_version(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def versions(self, name: str) -> list[ArtifactVersion]:
        """Every version of an artifact, oldest first. Raises InvalidName or ArtifactNotFound."""
        check_name(name)
        with connect(self._database) as db:
            rows = db.execute("SELECT * FROM versions WHERE name = ? ORDER BY version", (name,)).fetchall()
        if not rows:
            raise _not_found(Reference(name))
        return [_version(row) for row in rows]

    def file_path(self, version: ArtifactVersion, path: str) -> Path:
        """Where a file of a version lies, its bytes verified just now. Raises ArtifactNotFound or CorruptArtifact."""
        for entry in version.manifest.files:
            if entry.path == path:
                return self._blobs.verified_path(entry)
        known = [entry.path for entry in version.manifest.files]
        raise ArtifactNotFound(f"{version.ref} has no file {path!r}; it has {known}", "path")

    def load_tensors(
        self, version: ArtifactVersion, wanted: Mapping[str, Sequence[int] | None] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of a version by name, as float32 or int64: all, or those `wanted`, of which only the given rows.

        Every file that is read is hashed first. Raises CorruptArtifact.
        """
        tensors: dict[str, Tensor] = {}
        for entry in version.manifest.files:
            if wanted is None:
                tensors |= read_tensors(self._blobs.read(entry))
                continue
            here = {site.tensor for site in version.manifest.sites if site.file == entry.path}
            if chosen := {name: rows for name, rows in wanted.items() if name in here}:
                tensors |= read_tensors(self._blobs.verified_path(entry), chosen)
        return tensors

    def verify(self, ref: str | Reference | None = None) -> list[Problem]:
        """Hash one version, or every one, and say what is damaged; an empty list means nothing is."""
        with connect(self._database) as db:
            rows = [self._row(ref)] if ref else db.execute("SELECT * FROM versions ORDER BY name, version").fetchall()
        return [problem for row in rows for problem in self._problems(row)]

    def _stage(self, files: Mapping[str, Source], cleanup: ExitStack) -> dict[str, StagedFile]:
        staged: dict[str, StagedFile] = {}
        room = self.max_bytes
        for path, source in files.items():
            staged[path] = self._blobs.stage(source, room)
            cleanup.callback(staged[path].path.unlink, missing_ok=True)
            room -= staged[path].size
        return staged

    def _insert(self, name: str, manifest: Manifest) -> Publication:
        text = canonical_json(manifest)
        now = datetime.now(UTC).isoformat()
        row = (name, digest_of(text), manifest.kind, text.decode(), now)
        with connect(self._database) as db, transaction(db):
            found = db.execute("SELECT * FROM versions WHERE name = ? AND digest = ?", row[:2]).fetchone()
            if found is not None:
                return Publication(_version(found), created=False)
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
        return Publication(_version(added), created=True)

    def _row(self, ref: str | Reference) -> sqlite3.Row:
        reference = parse_reference(ref) if isinstance(ref, str) else ref
        query = """
            SELECT * FROM versions WHERE name = ?1 AND (?2 IS NULL OR version = ?2) AND (?3 IS NULL OR digest = ?3)
            ORDER BY version DESC LIMIT 1
        """
        with connect(self._database) as db:
            row = db.execute(query, (check_name(reference.name), reference.version, reference.digest)).fetchone()
        if row is None:
            raise _not_found(reference)
        assert isinstance(row, sqlite3.Row)
        return row

    def _problems(self, row: sqlite3.Row) -> list[Problem]:
        ref = f"{row['name']}@{row['version']}"
        try:
            version = _version(row)
        except CorruptArtifact as exc:
            return [Problem(ref, None, exc.message)]
        problems = []
        for entry in version.manifest.files:
            try:
                self._blobs.verified_path(entry)
            except CorruptArtifact as exc:
                problems.append(Problem(ref, entry.path, exc.message))
        return problems


def _version(row: sqlite3.Row) -> ArtifactVersion:
    text: str = row["manifest"]
    if digest_of(text.encode()) != row["digest"]:
        raise CorruptArtifact(
            f"the manifest of {row['name']}@{row['version']} no longer has its digest; restore the database", "manifest"
        )
    manifest = Manifest.model_validate_json(text)
    return ArtifactVersion(
        row["name"], row["version"], row["digest"], manifest, datetime.fromisoformat(row["created_at"])
    )


def _check_complete(manifest: Manifest, files: Mapping[str, Source]) -> None:
    needed = {site.file for site in manifest.sites}
    if needed - set(files):
        raise InvalidManifest(f"files: {sorted(needed - set(files))} are used by sites and missing; send them", "files")
    if set(files) - needed:
        raise InvalidManifest(f"files: no site uses {sorted(set(files) - needed)}; leave them out", "files")


def _with_files(manifest: Manifest, staged: Mapping[str, StagedFile]) -> Manifest:
    entries = [FileEntry(path=path, size=file.size, sha256=file.sha256) for path, file in sorted(staged.items())]
    declared = sorted(manifest.files, key=lambda entry: entry.path)
    if declared and declared != entries:
        raise InvalidManifest("files: the list differs from the files sent; correct it, or leave it out", "files")
    return manifest.model_copy(update={"files": entries})


def _not_found(reference: Reference) -> ArtifactNotFound:
    return ArtifactNotFound(f"no artifact {str(reference)!r}; list the artifacts to see which there are", "ref")
