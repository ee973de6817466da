"""What the store answers with, and how it is read from a row of the database."""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from steering_store.blobs import Blobs
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidManifest
from steering_store.manifest import Manifest, digest_of, read_manifest
from steering_store.reference import Reference, check_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArtifactVersion:
    """One published version. `digest` is `sha256:HEX64` of the manifest, `created_at` the time of publication (UTC).

    A `yanked` one is hidden, but still answers to its number, its digest and its aliases. `text` is the manifest as it
    was published, of which the digest was taken; `manifest` is in today's schema.
    """

    name: str
    version: int
    digest: str
    manifest: Manifest
    created_at: datetime
    yanked: bool = False
    yank_reason: str | None = None
    text: bytes = field(default=b"", repr=False, compare=False)

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Publication(NamedTuple):
    """What a publication led to; `created` is False where the same artifact was there already."""

    version: ArtifactVersion
    created: bool


class Problem(NamedTuple):
    """Something that is damaged: the version, the file (None: the manifest), and what to do."""

    ref: str
    file: str | None
    message: str


class Page(NamedTuple):
    """A part of a list, in order, and whether there is more behind it.

    A version that is damaged is in it as a Problem: named, so that one of them hides no other, and never served.
    """

    rows: list[ArtifactVersion | Problem]
    has_more: bool

    @property
    def items(self) -> list[ArtifactVersion]:
        """Those that are whole."""
        return [row for row in self.rows if isinstance(row, ArtifactVersion)]

    @property
    def damaged(self) -> list[Problem]:
        """Those that aren't."""
        return [row for row in self.rows if isinstance(row, Problem)]


@dataclass(frozen=True)
class AuditEntry:
    """Who (`by`) did what, when (UTC) and why. `action` is publish, set_alias, delete_alias, yank, unyank or delete.

    An alias went from `from_version` to `to_version`; None is no alias. A yanked or deleted version is `from_version`,
    and a published one `to_version`. `note` is what the caller said of itself where `by` is what the server knows.
    """

    id: int
    name: str
    action: str
    alias: str | None
    from_version: int | None
    to_version: int | None
    at: datetime
    by: str | None
    note: str | None
    reason: str | None


def find_row(db: sqlite3.Connection, reference: Reference) -> sqlite3.Row:
    """The row of a version. Raises InvalidName or ArtifactNotFound."""
    check_name(reference.name)
    if reference.digest is not None:
        where, value = "digest = ?2", reference.digest
    elif reference.alias is not None:
        where, value = "version = (SELECT version FROM aliases WHERE name = ?1 AND alias = ?2)", reference.alias
    elif reference.version is not None:
        where, value = "version = ?2", str(reference.version)
    else:
        where, value = "yanked_at IS NULL AND ?2 = '' ORDER BY version DESC LIMIT 1", ""
    sql = f"SELECT * FROM versions WHERE name = ?1 AND {where}"  # nosec B608: one of the four above
    row = db.execute(sql, (reference.name, value)).fetchone()
    if row is None:
        raise not_found(reference)
    assert isinstance(row, sqlite3.Row)
    return row


def version_of(row: sqlite3.Row) -> ArtifactVersion:
    """Read a row. Raises CorruptArtifact where the manifest isn't what was published, InvalidManifest where a newer
    release wrote it."""
    text: str = row["manifest"]
    if digest_of(text.encode()) != row["digest"]:
        raise CorruptArtifact(
            f"the manifest of {row['name']}@{row['version']} no longer has its digest; restore the database", "manifest"
        )
    return ArtifactVersion(
        row["name"],
        row["version"],
        row["digest"],
        read_manifest(text),
        datetime.fromisoformat(row["created_at"]),
        row["yanked_at"] is not None,
        row["yank_reason"],
        text.encode(),
    )


def listed(row: sqlite3.Row) -> ArtifactVersion | Problem:
    """A row as it is in a list: one that is damaged hides no other, and is logged."""
    try:
        return version_of(row)
    except (CorruptArtifact, InvalidManifest) as exc:
        problem = Problem(f"{row['name']}@{row['version']}", None, exc.message)
        log.error("damaged artifact: %s", exc.message)
        return problem


def page_of(rows: list[sqlite3.Row], limit: int) -> Page:
    """A page of the rows that a query found which asked for one more than `limit`."""
    return Page([listed(row) for row in rows[:limit]], has_more=len(rows) > limit)


def problems_of(row: sqlite3.Row, blobs: Blobs) -> list[Problem]:
    """Hash all that a version is made of, and say what is damaged."""
    ref = f"{row['name']}@{row['version']}"
    try:
        version = version_of(row)
    except (CorruptArtifact, InvalidManifest) as exc:
        return [Problem(ref, None, exc.message)]
    problems = []
    for entry in version.manifest.files:
        try:
            blobs.verified_path(entry)
        except CorruptArtifact as exc:
            problems.append(Problem(ref, entry.path, exc.message))
    return problems


def not_found(reference: Reference) -> ArtifactNotFound:
    """The refusal of a reference that nothing answers to."""
    return ArtifactNotFound(f"no artifact {str(reference)!r}; list the artifacts to see which there are", "ref")
