"""What the artifact routes answer with, and the store that they read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from server.tenants import TenantStore
from steering_store import Alias, ArtifactVersion, AuditEntry, Manifest, Problem
from steering_store.manifest import Kind

Words = Annotated[str, Field(max_length=1000)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Artifact(BaseModel):
    """An artifact by its name, as of its highest version that isn't yanked."""

    id: str
    object: Literal["artifact"] = "artifact"
    kind: Kind
    description: str
    latest_version: int | None
    digest: str
    created_at: datetime

    @classmethod
    def of(cls, version: ArtifactVersion) -> Artifact:
        return cls(
            id=version.name,
            kind=version.manifest.kind,
            description=version.manifest.description,
            latest_version=None if version.yanked else version.version,
            digest=version.digest,
            created_at=version.created_at,
        )


class Damaged(BaseModel):
    """A version that can't be read, and so isn't served: `name@version`, and what to do."""

    id: str
    message: str

    @classmethod
    def of(cls, problem: Problem) -> Damaged:
        return cls(id=problem.ref, message=problem.message)


class ArtifactList(BaseModel):
    """A page of artifacts; pass `last_id` as `after` for the next. A damaged one is only named."""

    object: Literal["list"] = "list"
    data: list[Artifact]
    damaged: list[Damaged]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Version(BaseModel):
    """One version of an artifact. `digest` is the SHA-256 of the manifest in canonical form."""

    id: str
    object: Literal["artifact.version"] = "artifact.version"
    name: str
    version: int
    digest: str
    created_at: datetime
    yanked: bool
    yank_reason: str | None = None
    manifest: Manifest

    @classmethod
    def of(cls, version: ArtifactVersion) -> Version:
        return cls(
            id=version.ref,
            name=version.name,
            version=version.version,
            digest=version.digest,
            created_at=version.created_at,
            yanked=version.yanked,
            yank_reason=version.yank_reason,
            manifest=version.manifest,
        )


class VersionAlias(BaseModel):
    """A movable name of a version; `etag` is what `If-Match` of a move is compared with. `by` and `note` are the
    history's."""

    id: str
    object: Literal["artifact.alias"] = "artifact.alias"
    name: str
    alias: str
    version: int
    etag: str
    moved_at: datetime
    by: str | None = None
    note: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, alias: Alias) -> VersionAlias:
        return cls(id=f"{alias.name}@{alias.alias}", **vars(alias))


class AliasList(BaseModel):
    """Aliases of an artifact by name; pass `last_id` as `after` for the next."""

    object: Literal["list"] = "list"
    data: list[VersionAlias]
    last_id: str | None
    has_more: bool


class ArtifactVersions(Artifact):
    """An artifact with a page of its versions, oldest first, and the first of its aliases. Yanked versions are in it,
    and say so; where all are, there is no `latest_version`. Pass `last_version` as `after` for the next.
    """

    versions: list[Version]
    damaged: list[Damaged]
    last_version: int | None
    has_more: bool
    aliases: list[VersionAlias]
    more_aliases: bool


class HistoryEntry(BaseModel):
    """Who did what, when and why. `action` is publish, set_alias, delete_alias, yank, unyank or delete.

    Where there are keys, `by` is the caller's key, and `note` what the caller said of itself.
    """

    object: Literal["artifact.event"] = "artifact.event"
    id: int
    action: str
    alias: str | None = None
    from_version: int | None = None
    to_version: int | None = None
    at: datetime
    by: str | None = None
    note: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, entry: AuditEntry) -> HistoryEntry:
        return cls.model_validate({field: getattr(entry, field) for field in cls.model_fields if field != "object"})


class History(BaseModel):
    """A page of the audit trail of an artifact, oldest first; pass `last_id` as `after` for the next."""

    object: Literal["list"] = "list"
    data: list[HistoryEntry]
    last_id: int | None
    has_more: bool


class Change(BaseModel):
    """Who changes something, and why, as the caller says; both go into the history."""

    model_config = ConfigDict(extra="forbid")

    by: Words | None = None
    reason: Words | None = None


class AliasTarget(Change):
    """Where an alias shall point."""

    version: int = Field(ge=1)


async def get_store(request: Request) -> TenantStore:
    """The store of the running server, as the caller may use it."""
    return TenantStore(request.app.state.polyhelm.store)


StoreDep = Annotated[TenantStore, Depends(get_store)]
