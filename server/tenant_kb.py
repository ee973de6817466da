"""The knowledge base as the tenant of the current request may use it: by the same names as artifacts."""

from __future__ import annotations

from typing import Any

from kb.backends.base import CollectionInfo
from kb.collection import Collection
from kb.errors import CollectionNotFound
from kb.knowledge_base import KnowledgeBase
from server.request_context import current
from server.tenants import check_owned, visible


class TenantKb:
    """What isn't here, no route may do."""

    def __init__(self, kb: KnowledgeBase) -> None:
        self._kb = kb

    @property
    def backend(self) -> str:
        return self._kb.backend

    def collections(self) -> list[CollectionInfo]:
        return [info for info in self._kb.collections() if visible(info.name, current().key.tenant)]

    def create(self, name: str, *settings: Any) -> tuple[Collection, bool]:
        self._check_own(name)
        return self._kb.create(name, *settings)

    def collection(self, name: str) -> Collection:
        """To read. Raises CollectionNotFound."""
        if not visible(name, current().key.tenant):
            # As where there is none of that name.
            raise CollectionNotFound(f"no collection {name!r}; create it, or list those that there are", "collection")
        return self._kb.collection(name)

    def changing(self, name: str) -> Collection:
        """To write. Raises CollectionNotFound, or ApiError 403 for one that is everybody's."""
        found = self.collection(name)
        self._check_own(name)
        return found

    def drop(self, name: str) -> None:
        self.changing(name)
        self._kb.drop(name)

    def _check_own(self, name: str) -> None:
        check_owned(name, "collection")
