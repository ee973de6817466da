"""Tenants: who owns which artifacts, and what a request's tenant sees of the store.

A tenant owns the names that begin with its own and two hyphens, such as `acme--mood`. All other names belong to nobody:
every tenant reads them, and only keys without a tenant change them. Of other tenants' names a tenant learns nothing.
The name alone says it, so that replicas with a shared store agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from server.api.errors import ApiError
from server.request_context import ANYBODY, current
from steering_store import Alias, ArtifactVersion, AuditEntry, Page, Problem, Publication, Reference, Store, presets
from steering_store.audit import Stated
from steering_store.errors import ArtifactNotFound
from steering_store.labels import FeaturePage
from steering_store.manifest import parse_manifest
from steering_store.reference import check_name, parse_reference

SEPARATOR = "--"


def owner(name: str) -> str | None:
    """The tenant that a name belongs to."""
    tenant, separator, _ = name.partition(SEPARATOR)
    return tenant if separator else None


def visible(name: str, tenant: str | None) -> bool:
    """Whether a tenant may know of a name. Without a tenant one knows of all."""
    return tenant is None or owner(name) in (None, tenant)


def check_visible(name: str, param: str | None = None) -> None:
    """Raise ArtifactNotFound where the name isn't for the request's tenant."""
    if not visible(name, current().key.tenant):
        # As where there is none of that name: who may not see it doesn't learn that it is there.
        raise ArtifactNotFound(f"no artifact {name!r}; list the artifacts to see which there are", param)


def check_owned(name: str, param: str | None = "name") -> None:
    """Raise ApiError 403 where the name isn't one of the request's tenant."""
    tenant = current().key.tenant
    if tenant is not None and owner(name) != tenant:
        raise ApiError(
            403, f"{name!r} isn't yours: this key may change names that begin with {tenant + SEPARATOR!r}", param
        )


def known(stated: Stated) -> Stated:
    """What goes into the history: by whom is what the server knows, once there are keys, and what callers say of
    themselves is a note."""
    key = current().key
    if key is ANYBODY:
        return stated
    return {"by": f"key {key.id} ({key.name})", "note": stated.get("by"), "reason": stated.get("reason")}


def name_of(row: ArtifactVersion | Problem) -> str:
    """The artifact of an entry of a list."""
    return row.ref.partition("@")[0]


class TenantStore:
    """The store as the tenant of the current request may use it. What isn't here, no route may do."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.max_files, self.max_bytes = store.max_files, store.max_bytes
        self.incoming = store.incoming

    def publish(
        self,
        name: str,
        manifest: str | bytes | Mapping[str, object],
        files: Mapping[str, Any],
        **stated: Unpack[Stated],
    ) -> Publication:
        check_owned(check_name(name))
        return self._store.publish(name, presets.pinned(parse_manifest(manifest), self.resolve), files, **known(stated))

    def resolve(self, ref: str | Reference) -> ArtifactVersion:
        check_visible((parse_reference(ref) if isinstance(ref, str) else ref).name)
        return self._store.resolve(ref)

    def list_artifacts(
        self, *, kind: str | None = None, model: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page:
        tenant, found = current().key.tenant, list[ArtifactVersion | Problem]()
        while True:
            page = self._store.list_artifacts(kind=kind, model=model, after=after, limit=limit + 1)
            found += [row for row in page.rows if visible(name_of(row), tenant)]
            if len(found) > limit or not page.has_more:
                return Page(found[:limit], has_more=len(found) > limit)
            after = name_of(page.rows[-1])

    def version_page(self, name: str, *, after: int, limit: int) -> Page:
        check_visible(name)
        return self._store.version_page(name, include_yanked=True, after=after, limit=limit)

    def head(self, name: str) -> ArtifactVersion:
        check_visible(name)
        return self._store.head(name)

    def find_features(self, version: ArtifactVersion, query: str = "", **page: Any) -> FeaturePage:
        check_visible(version.name)
        return self._store.find_features(version, query, **page)

    def file_path(self, version: ArtifactVersion, path: str) -> Path:
        check_visible(version.name)
        return self._store.file_path(version, path)

    def aliases(self, name: str, *, after: str = "", limit: int) -> list[Alias]:
        check_visible(name)
        return self._store.aliases(name, after=after, limit=limit)

    def alias(self, name: str, alias: str) -> Alias | None:
        check_visible(name)
        return self._store.alias(name, alias)

    def history(self, name: str, alias: str | None = None, *, after: int, limit: int) -> list[AuditEntry]:
        check_visible(name)
        return self._store.history(name, alias, after=after, limit=limit)

    def set_alias(
        self, name: str, alias: str, version: int, *, expected: str | None, **stated: Unpack[Stated]
    ) -> Alias:
        check_visible(name)
        check_owned(name)
        return self._store.set_alias(name, alias, version, expected=expected, **known(stated))

    def delete_alias(self, name: str, alias: str, *, expected: str | None, **stated: Unpack[Stated]) -> None:
        check_visible(name)
        check_owned(name)
        self._store.delete_alias(name, alias, expected=expected, **known(stated))

    def yank(self, name: str, version: int, **stated: Unpack[Stated]) -> ArtifactVersion:
        check_visible(name)
        check_owned(name)
        return self._store.yank(name, version, **known(stated))

    def unyank(self, name: str, version: int, **stated: Unpack[Stated]) -> ArtifactVersion:
        check_visible(name)
        check_owned(name)
        return self._store.unyank(name, version, **known(stated))

    def delete_version(self, name: str, version: int, **stated: Unpack[Stated]) -> None:
        check_visible(name)
        check_owned(name)
        self._store.delete_version(name, version, **known(stated))


def cache_salt(salt: str | None) -> str | None:
    """The salt of a request's prefix-cache blocks: its tenant's, with the user's own behind it. None for neither.

    A user's salt never makes that of another tenant.
    """
    tenant = current().key.tenant
    return None if tenant is None and salt is None else f"{tenant or ''}\0{salt or ''}"
