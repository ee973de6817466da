"""All collections at one place: a folder, a Qdrant server, or a PostgreSQL database."""

from __future__ import annotations

import re
import threading
from os import PathLike, fspath
from pathlib import Path

from kb.backends.base import Catalog, CollectionInfo, Conflicts
from kb.collection import Collection
from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionNotFound, InvalidCollection
from kb.index import IndexOptions

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
MAX_DIMENSION = 16_384


class KnowledgeBase:
    """The collections of a catalog. One per process is enough, for any number of threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._opened: dict[str, Collection] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, place: str | PathLike[str], options: IndexOptions | None = None) -> KnowledgeBase:
        """Open a folder, or a URL: `postgresql://…`, `qdrant+http://…`, `qdrant+https://…`, `qdrant+file:FOLDER`.

        `options` are for the index of a folder. Raises InvalidCollection for another URL, KbUnavailable, KbError.
        """
        return cls(_catalog(fspath(place), options or IndexOptions()))

    @property
    def backend(self) -> str:
        """`sqlite`, `qdrant` or `postgres`."""
        return self._catalog.kind

    def collections(self) -> list[CollectionInfo]:
        """All collections, by name."""
        return sorted(self._catalog.collections(), key=lambda info: info.name)

    def create(
        self, name: str, encoder: EncoderIdentity, conflicts: Conflicts = "supersede"
    ) -> tuple[Collection, bool]:
        """The collection of that name, and whether it was made now.

        `conflicts` says what happens when a fact has subject, relation and language of another one that holds at the
        same time: the newer takes its place, is refused, or both are kept. Raises InvalidCollection, and, where there
        is one of that name with other settings, EncoderMismatch or CollectionDiffers.
        """
        if not _NAME.fullmatch(name):
            raise InvalidCollection(
                f"collection name {name!r}: use 1 to 64 of a-z, 0-9 and . _ -, with a letter or digit at both ends",
                "name",
            )
        if not 1 <= encoder.dimension <= MAX_DIMENSION:
            raise InvalidCollection(f"an encoder's dimension can be 1 to {MAX_DIMENSION}", "encoder.dimension")
        info, created = self._catalog.create(name, encoder, conflicts)
        return self._open(info), created

    def collection(self, name: str) -> Collection:
        """Raises CollectionNotFound."""
        return self._open(self._find(name))

    def drop(self, name: str) -> None:
        """Delete a collection with all its facts and their history. Raises CollectionNotFound."""
        info = self._find(name)
        self._catalog.drop(info)
        with self._lock:
            self._opened.pop(info.uid, None)

    def close(self) -> None:
        self._catalog.close()

    def _find(self, name: str) -> CollectionInfo:
        infos = {info.uid: info for info in self._catalog.collections()}
        with self._lock:
            # What another process has deleted takes no more memory here.
            self._opened = {uid: opened for uid, opened in self._opened.items() if uid in infos}
        found = next((info for info in infos.values() if info.name == name), None)
        if found is None:
            raise CollectionNotFound(f"no collection {name!r}; create it, or list those that there are", "collection")
        return found

    def _open(self, info: CollectionInfo) -> Collection:
        with self._lock:
            if info.uid not in self._opened:
                self._opened[info.uid] = Collection(self._catalog.open(info))
            return self._opened[info.uid]


def _catalog(place: str, options: IndexOptions) -> Catalog:
    scheme, found, rest = place.partition(":")
    if found and scheme in ("postgresql", "postgres"):
        # Imported only here: the clients are extras.
        from kb.backends.postgres import PostgresCatalog

        return PostgresCatalog(place)
    if found and scheme.startswith("qdrant+"):
        from kb.backends.qdrant import QdrantCatalog

        return QdrantCatalog(place.removeprefix("qdrant+"))
    if found and rest.startswith("//"):
        raise InvalidCollection(
            f"no knowledge base at {scheme}://: name a folder, postgresql://, qdrant+http:// or qdrant+https://", "url"
        )
    from kb.backends.sqlite import SqliteCatalog

    return SqliteCatalog(Path(place), options)
