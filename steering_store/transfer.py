"""Copies versions between two stores, one at a URL. A version keeps its digest and gets the target's next number.

What is there already is left alone, so that repeating a transfer, or finishing one that broke off, is safe.
"""

from __future__ import annotations

import contextlib
from typing import BinaryIO, NamedTuple

from steering_store.manifest import read_manifest
from steering_store.presets import references
from steering_store.records import Publication
from steering_store.reference import Reference, parse_reference
from steering_store.remote import RemoteStore
from steering_store.store import Store


class Pushed(NamedTuple):
    """Where a version lies in the remote store; `created` is False where it was there already."""

    name: str
    version: int
    digest: str
    created: bool

    @property
    def ref(self) -> str:
        """`name@version`, in the remote store."""
        return f"{self.name}@{self.version}"


def push(store: Store, ref: str | Reference, remote: RemoteStore, *, by: str | None = None) -> Pushed:
    """Copy a version to a remote store, after those that a preset names.

    Every file is hashed here before it leaves, and there after it arrived. Raises ArtifactNotFound, CorruptArtifact or
    RemoteUnavailable.
    """
    version = store.resolve(ref)
    for needed in references(version.manifest):
        push(store, needed, remote, by=by)
    for entry in version.manifest.files:
        remote.put_file(entry, store.file_path(version, entry.path))
    published, created = remote.publish(version.name, version.text, by)
    return Pushed(version.name, published.version, published.digest, created)


def pull(remote: RemoteStore, ref: str | Reference, store: Store, *, by: str | None = None) -> Publication:
    """Copy a version from a remote store, after those that a preset names.

    What arrives is hashed and checked like any upload. Raises ArtifactNotFound, CorruptArtifact, RemoteUnavailable, and
    what Store.publish raises.
    """
    reference = parse_reference(ref) if isinstance(ref, str) else ref
    text = remote.manifest(remote.resolve(reference).digest)
    manifest = read_manifest(text)
    for needed in references(manifest):
        pull(remote, needed, store, by=by)
    with contextlib.ExitStack() as opened:
        files: dict[str, BinaryIO] = {
            entry.path: opened.enter_context(remote.open_file(entry)) for entry in manifest.files
        }
        return store.publish_copy(reference.name, text, files, by=by)
