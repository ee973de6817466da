from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from steering_store import ArtifactVersion, Reference, Store
from steering_store.archive import export_archive, import_archive
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidManifest, InvalidTensor
from steering_store.manifest import FileEntry, canonical_json, digest_of, parse_manifest
from steering_store.manifest_migrations import MIGRATIONS
from steering_store.remote import RemoteStore
from steering_store.remote_replica import RemoteBackedStore
from steering_store.transfer import pull, push

FILE = "vectors.safetensors"
Vectors = Callable[..., dict[str, bytes]]


def blob_of(url: str, store: Store, ref: str) -> str:
    sha256 = store.resolve(ref).manifest.files[0].sha256
    return f"{url}/blobs/sha256/{sha256[:2]}/{sha256}"


def test_version_goes_there_and_back_with_its_digest(
    url: str, store: Store, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    for fill in (1.0, 2.0):
        store.publish("mood", manifest, vectors(fill))
    pushed = push(store, "mood@2", RemoteStore(url))
    assert (pushed.ref, pushed.created, pushed.digest) == ("mood@1", True, store.resolve("mood@2").digest)
    assert not push(store, "mood@2", RemoteStore(url)).created
    other = Store(tmp_path / "other")
    version, created = pull(RemoteStore(url), "mood", other)
    assert (version.ref, version.digest, created) == ("mood@1", pushed.digest, True)
    assert other.file_path(version, FILE).read_bytes() == vectors(2.0)[FILE]
    assert pull(RemoteStore(url), "mood@1", other) == (version, False)
    assert other.verify() == []


def test_preset_takes_with_it_what_it_needs(
    url: str, store: Store, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    for name in ("mood", "gate"):
        store.publish(name, manifest, vectors(len(name)))
    preset = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    condition = {"condition": {"artifact": "gate", "threshold": 0.0}}
    store.publish(
        "cheer", preset | {"kind": "preset", "interventions": [{"artifact": "mood", "options": condition}]}, {}
    )
    push(store, "cheer", RemoteStore(url))
    other = Store(tmp_path / "other")
    assert pull(RemoteStore(url), "cheer", other).version.digest == store.resolve("cheer").digest
    assert [each.name for each in other.list_artifacts().items] == ["cheer", "gate", "mood"]


@pytest.fixture
def old(store: Store, manifest: dict[str, Any], vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> ArtifactVersion:
    """A version that an earlier release published, whose schema 0 called the default strength `strength`."""

    def m000_strength(content: dict[str, Any]) -> dict[str, Any]:
        return {"default_strength": content.pop("strength"), **content}

    monkeypatch.setitem(MIGRATIONS, 0, m000_strength)  # type: ignore[arg-type]
    content = json.loads(store.publish("new", manifest, vectors()).version.text)
    content |= {"schema_version": 0, "strength": content.pop("default_strength")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return store.publish_copy("old", text, vectors()).version


def test_version_of_an_earlier_release_keeps_its_text_and_digest_wherever_it_goes(
    url: str, store: Store, old: ArtifactVersion, vectors: Vectors, tmp_path: Path
) -> None:
    assert (old.digest, old.manifest.default_strength) == (digest_of(old.text), 4.0)
    assert b'"strength":4.0' in old.text and b"default_strength" not in old.text
    pushed = push(store, "old", RemoteStore(url))
    pulled = pull(RemoteStore(url), "old", Store(tmp_path / "pulled")).version
    replica = RemoteBackedStore(tmp_path / "replica", RemoteStore(url))
    followed = replica.resolve("old")
    with (tmp_path / "old.tar").open("xb") as stream:
        export_archive(store, old, stream)
    imported = import_archive(Store(tmp_path / "imported"), "old", tmp_path / "old.tar").version
    copied = push(replica, "old", RemoteStore(f"file://{tmp_path}/elsewhere"))
    assert pushed.digest == copied.digest == old.digest
    for version in (pulled, followed, imported):
        assert (version.text, version.digest, version.manifest) == (old.text, old.digest, old.manifest)
    assert replica.load_tensors(followed)["layer.2"].tolist() == [1.0] * 8
    # It is the same artifact everywhere, and another than that of today's schema.
    assert not store.publish_copy("old", old.text, vectors()).created
    assert store.resolve("new").digest != old.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"strength":4.0', b'"strength": 4.0'),
        lambda text: text.replace(b'"strength":4.0', b'"strength":"4"'),
        lambda text: text.replace(b'"strength":4.0', b'"strengths":4.0'),
        lambda text: text.replace(b'"schema_version":0', b'"schema_version":1'),
        lambda text: text.replace(b'"schema_version":0', b'"schema_version":-1'),
        lambda text: text[:-1],
        lambda text: b"[]",
    ],
)
def test_copy_of_what_no_store_wrote_is_refused(
    store: Store, old: ArtifactVersion, vectors: Vectors, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(InvalidManifest):
        store.publish_copy("old", change(old.text), vectors())
    with pytest.raises(InvalidManifest, match="differs from the files sent"):
        store.publish_copy("old", old.text, vectors(2.0))


def test_copy_of_a_preset_must_be_pinned(store: Store, manifest: dict[str, Any], vectors: Vectors) -> None:
    store.publish("mood", manifest, vectors())
    preset = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    loose = parse_manifest(preset | {"kind": "preset", "interventions": [{"artifact": "mood"}]})
    with pytest.raises(InvalidManifest, match="pinned"):
        store.publish_copy("cheer", canonical_json(loose), {})
    published = store.publish("cheer", loose, {}).version
    assert not store.publish_copy("cheer", published.text, {}).created


def test_push_mends_a_damaged_file_and_pull_refuses_it(
    url: str, store: Store, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    store.publish("mood", manifest, vectors())
    push(store, "mood", RemoteStore(url))
    with fsspec.open(blob_of(url, store, "mood"), "wb") as stream:
        stream.write(vectors()[FILE][:-1] + b"x")
    other = Store(tmp_path / "other")
    with pytest.raises(CorruptArtifact, match=FILE):
        pull(RemoteStore(url), "mood", other)
    assert other.list_artifacts().items == []
    push(store, "mood", RemoteStore(url))
    assert pull(RemoteStore(url), "mood", other).created


def test_damaged_file_does_not_leave_this_machine(
    url: str, store: Store, manifest: dict[str, Any], vectors: Vectors
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    store.file_path(version, FILE).write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=FILE):
        push(store, "mood", RemoteStore(url))
    with pytest.raises(ArtifactNotFound):
        RemoteStore(url).resolve(Reference("mood"))


def test_what_somebody_else_pushed_is_checked_like_an_upload(
    url: str, manifest: dict[str, Any], vectors: Vectors, tmp_path: Path
) -> None:
    """The digests agree, but the file isn't what the manifest says: only a store that checks nothing sends that."""
    data = vectors(float("nan"))[FILE]
    entry = FileEntry(path=FILE, size=len(data), sha256=digest_of(data)[7:])
    (tmp_path / "v").write_bytes(data)
    remote = RemoteStore(url)
    remote.put_file(entry, tmp_path / "v")
    remote.publish("mood", canonical_json(parse_manifest(manifest).model_copy(update={"files": [entry]})))
    with pytest.raises(InvalidTensor, match="NaN"):
        pull(remote, "mood", Store(tmp_path / "other"))
