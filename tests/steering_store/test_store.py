from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from steering_store import Reference, Store
from steering_store.blobs import Blobs
from steering_store.db import MIGRATIONS
from steering_store.errors import (
    ArtifactNotFound,
    CorruptArtifact,
    InvalidManifest,
    InvalidName,
    InvalidTensor,
    StoreError,
    TooLarge,
    UnsupportedFile,
)
from steering_store.manifest import FileEntry

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]
FILE = "vectors.safetensors"


def files_under(root: Path, folder: str) -> list[Path]:
    return [path for path in (root / folder).rglob("*") if path.is_file()]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_published_vector_is_read_back(store: Store, manifest: Content, vectors: Vectors) -> None:
    version, created = store.publish("mood", manifest, vectors(3.0))
    assert created
    assert (version.ref, version.digest[:7], version.created_at.tzinfo is not None) == ("mood@1", "sha256:", True)
    tensors = store.load_tensors(store.resolve("mood@1"))
    assert tensors.keys() == {"layer.2"}
    np.testing.assert_array_equal(tensors["layer.2"], np.full(8, 3.0, np.float32))


@pytest.mark.parametrize("as_source", [bytes, BytesIO, "path"])
def test_file_may_be_bytes_a_stream_or_a_path(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path, as_source: Any
) -> None:
    content = vectors()[FILE]
    path = tmp_path / "any-name"
    path.write_bytes(content)
    version, _ = store.publish("mood", manifest, {FILE: path if as_source == "path" else as_source(content)})
    assert store.file_path(version, FILE).read_bytes() == content


def test_several_files_and_dtypes_make_one_artifact(store: Store, manifest: Content) -> None:
    site = manifest["sites"][0]
    manifest["sites"].append(site | {"layer": 3, "file": "more.safetensors", "tensor": "layer.3", "dtype": "F16"})
    files = {
        "more.safetensors": save({"layer.3": np.ones(8, np.float16)}),
        FILE: save({"layer.2": np.full(8, 2, np.float32)}),
    }
    version = store.publish("mood", manifest, files).version
    assert [entry.path for entry in version.manifest.files] == ["more.safetensors", FILE]
    assert {name: float(value.sum()) for name, value in store.load_tensors(version).items()} == {
        "layer.2": 16.0,
        "layer.3": 8.0,
    }


def test_identical_republish_is_the_same_version(store: Store, manifest: Content, vectors: Vectors) -> None:
    first = store.publish("mood", manifest, vectors())
    again = store.publish("mood", dict(reversed(manifest.items())), vectors())
    completed = store.publish("mood", first.version.manifest, vectors())
    assert (again.created, completed.created) == (False, False)
    assert again.version == completed.version == first.version
    assert len(store.versions("mood")) == 1


def test_other_bytes_or_another_manifest_are_the_next_version(
    store: Store, manifest: Content, vectors: Vectors
) -> None:
    store.publish("mood", manifest, vectors(1.0))
    store.publish("mood", manifest, vectors(2.0))
    store.publish("mood", manifest | {"default_strength": 5.0}, vectors(2.0))
    store.publish("other", manifest, vectors(1.0))
    assert [version.version for version in store.versions("mood")] == [1, 2, 3]
    assert store.resolve("other").digest == store.resolve("mood@1").digest


def test_reference_finds_its_version(store: Store, manifest: Content, vectors: Vectors) -> None:
    first = store.publish("mood", manifest, vectors(1.0)).version
    second = store.publish("mood", manifest, vectors(2.0)).version
    assert store.resolve("mood") == store.resolve("mood@2") == store.resolve(Reference("mood", 2)) == second
    assert store.resolve("mood@1") == store.resolve(f"mood@{first.digest}") == first
    for missing in ("mood@3", "mood@sha256:" + "0" * 64, "moo"):
        with pytest.raises(ArtifactNotFound, match=missing):
            store.resolve(missing)
    with pytest.raises(ArtifactNotFound):
        store.versions("moo")
    with pytest.raises(InvalidName):
        store.resolve(Reference("../mood"))


def test_list_is_paged_by_name_with_the_highest_version(store: Store, manifest: Content, vectors: Vectors) -> None:
    for name in ("b", "a", "c"):
        store.publish(name, manifest, vectors(1.0))
    store.publish("a", manifest, vectors(2.0))
    first = store.list_artifacts(limit=2)
    rest = store.list_artifacts(after=first.items[-1].name, limit=2)
    assert ([item.ref for item in first.items], first.has_more) == (["a@2", "b@1"], True)
    assert ([item.ref for item in rest.items], rest.has_more) == (["c@1"], False)
    assert len(store.list_artifacts(kind="steering_vector").items) == 3
    assert store.list_artifacts(kind="other").items == []


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", "", "A", "a\0b"])
def test_name_that_could_leave_the_store_is_refused(
    store: Store, manifest: Content, vectors: Vectors, name: str
) -> None:
    with pytest.raises(InvalidName):
        store.publish(name, manifest, vectors())


@pytest.mark.parametrize(
    ("path", "error"),
    [("../v.safetensors", InvalidName), ("/tmp/v.safetensors", InvalidName), ("v.pt", UnsupportedFile)],
)
def test_file_with_a_bad_path_is_refused(
    store: Store, manifest: Content, vectors: Vectors, path: str, error: type[StoreError]
) -> None:
    with pytest.raises(error):
        store.publish("mood", manifest, {path: vectors()[FILE]})


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, InvalidManifest),
        ({FILE: b"x" * 100}, InvalidTensor),
        ({FILE: save({"layer.2": np.full(8, np.nan, np.float32)})}, InvalidTensor),
        ({FILE: save({"layer.2": np.ones(9, np.float32)})}, InvalidTensor),
        ({FILE: save({"layer.2": np.ones(8, np.float32)}), "extra.safetensors": save({})}, InvalidManifest),
    ],
)
def test_refused_publication_leaves_nothing(
    store: Store, manifest: Content, tmp_path: Path, files: dict[str, bytes], error: type[StoreError]
) -> None:
    with pytest.raises(error):
        store.publish("mood", manifest, files)
    root = tmp_path / "artifacts"
    assert files_under(root, "tmp") == files_under(root, "blobs") == store.list_artifacts().items == []


def test_declared_files_must_match(store: Store, manifest: Content, vectors: Vectors) -> None:
    declared = store.publish("mood", manifest, vectors()).version.manifest.model_dump(mode="json")["files"]
    for change in ({"sha256": "0" * 64}, {"size": 1}, {"path": "other.safetensors"}):
        with pytest.raises(InvalidManifest) as caught:
            store.publish("mood", manifest | {"files": [declared[0] | change]}, vectors())
        assert caught.value.param == "files"


def test_limits_hold_for_all_files_together(tmp_path: Path, manifest: Content, vectors: Vectors) -> None:
    size = len(vectors()[FILE])
    site = manifest["sites"][0] | {"layer": 3, "file": "b.safetensors", "tensor": "b"}
    two = manifest | {"sites": [*manifest["sites"], site]}
    files = vectors() | {"b.safetensors": save({"b": np.ones(8, np.float32)})}
    total = sum(map(len, files.values()))
    assert total > size
    with pytest.raises(TooLarge):
        Store(tmp_path / "a", max_bytes=total - 1).publish("mood", two, files)
    with pytest.raises(TooLarge):
        Store(tmp_path / "a", max_files=1).publish("mood", two, files)
    assert files_under(tmp_path / "a", "tmp") == []
    assert Store(tmp_path / "a", max_bytes=total, max_files=2).publish("mood", two, files).created


def test_corrupt_file_is_never_served(store: Store, manifest: Content, vectors: Vectors) -> None:
    version = store.publish("mood", manifest, vectors()).version
    whole = store.publish("whole", manifest, vectors(2.0)).version
    damage(store.file_path(version, FILE))
    for read in (store.load_tensors, lambda version: store.file_path(version, FILE)):
        with pytest.raises(CorruptArtifact, match=FILE) as caught:
            read(version)
        assert caught.value.param == FILE
    assert [(problem.ref, problem.file) for problem in store.verify()] == [("mood@1", FILE)]
    assert len(store.verify("mood")) == 1
    assert store.verify("whole") == []
    assert store.load_tensors(whole)


@pytest.mark.parametrize("wanted", [None, {"layer.2": None}, {"layer.2": [0]}])
@pytest.mark.parametrize("how", ["header", "values", "truncated", "longer", "empty", "another file"])
def test_no_way_of_reading_serves_a_damaged_file_even_one_that_was_read_before(
    store: Store, manifest: Content, vectors: Vectors, how: str, wanted: Any
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    assert store.load_tensors(store.resolve("mood"), wanted)
    path = store.file_path(version, FILE)
    whole = path.read_bytes()
    damaged = {
        "header": whole[:12] + b"x" + whole[13:],
        "values": whole[:-1] + b"x",
        "truncated": whole[:-1],
        "longer": whole + b"x",
        "empty": b"",
        "another file": vectors(2.0)[FILE],
    }[how]
    path.write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match=FILE) as caught:
        store.load_tensors(store.resolve("mood"), wanted)
    assert version.manifest.files[0].sha256 in caught.value.message
    assert not store.publish("mood", manifest, vectors()).created
    assert store.load_tensors(store.resolve("mood"), wanted), "publishing the same bytes again mends it"


def test_missing_file_is_corrupt_and_publishing_again_mends_it(
    store: Store, manifest: Content, vectors: Vectors
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    store.file_path(version, FILE).unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        store.load_tensors(version)
    assert "is missing" in store.verify()[0].message
    assert not store.publish("mood", manifest, vectors()).created
    assert store.verify() == []


def test_changed_manifest_row_is_corrupt(store: Store, manifest: Content, vectors: Vectors, tmp_path: Path) -> None:
    store.publish("mood", manifest, vectors())
    with sqlite3.connect(tmp_path / "artifacts" / "store.sqlite") as db:
        db.execute("UPDATE versions SET manifest = replace(manifest, '4.0', '9.0')")
    db.close()
    with pytest.raises(CorruptArtifact, match="mood@1"):
        store.resolve("mood")
    assert [problem.file for problem in store.verify()] == [None]


def test_unknown_file_of_a_version_is_not_found(store: Store, manifest: Content, vectors: Vectors) -> None:
    version = store.publish("mood", manifest, vectors()).version
    for path in ("other.safetensors", "../store.sqlite", ""):
        with pytest.raises(ArtifactNotFound):
            store.file_path(version, path)


def test_versions_survive_reopening_and_a_newer_schema_is_refused(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    assert Store(tmp_path / "artifacts").resolve("mood") == version
    with sqlite3.connect(tmp_path / "artifacts" / "store.sqlite") as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(StoreError, match="newer polyhelm"):
        Store(tmp_path / "artifacts")


def test_only_stale_leftovers_are_swept_at_open(store: Store, tmp_path: Path) -> None:
    old, fresh = (tmp_path / "artifacts" / "tmp" / name for name in ("old", "fresh"))
    for path in (old, fresh):
        path.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    Store(tmp_path / "artifacts")
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_version_published_by_another_process_is_resolved_at_once(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    """What is remembered of earlier lookups must not outlive a commit of anybody."""
    store.publish("mood", manifest, vectors(1.0))
    assert store.resolve("mood").version == 1
    assert store.resolve("mood") is store.resolve("mood"), "nothing is remembered: this proves nothing"
    code = (
        "import json, sys; from pathlib import Path; from steering_store import Store; "
        "Store(Path(sys.argv[1])).publish('mood', json.loads(sys.argv[2]), {sys.argv[3]: sys.stdin.buffer.read()})"
    )
    (content,) = vectors(2.0).values()
    arguments = [sys.executable, "-c", code, str(tmp_path / "artifacts"), json.dumps(manifest), FILE]
    subprocess.run(arguments, input=content, check=True)
    assert store.resolve("mood").version == 2
    assert store.resolve("mood@1").version == 1


def test_ranges_of_a_file_do_not_each_hash_it(
    store: Store, manifest: dict[str, Any], vectors: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.publish("mood", manifest, vectors()).version
    hashed: list[str] = []
    open_verified = Blobs.open_verified

    def counted(blobs: Blobs, entry: FileEntry) -> Any:
        hashed.append(entry.path)
        return open_verified(blobs, entry)

    monkeypatch.setattr(Blobs, "open_verified", counted)
    path = store.file_path(version, FILE)
    assert [store.file_path(version, FILE) for _ in range(5)] == [path] * 5
    assert len(hashed) == 1
    # A check is one, whatever is remembered; and so is what comes long after.
    assert store.verify() == []
    assert len(hashed) == 2
    with monkeypatch.context() as later:
        later.setattr("steering_store.blobs.REMEMBERED_SECONDS", 0.0)
        store.file_path(version, FILE)
    assert len(hashed) == 3
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CorruptArtifact):
        store.file_path(version, FILE)
    path.unlink()
    with pytest.raises(CorruptArtifact):
        store.file_path(version, FILE)
    path.write_bytes(content)
    assert store.file_path(version, FILE) == path


def test_folders_are_made_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("steering_store.blobs.fsync", synced.append)
    Store(tmp_path / "a" / "b")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "blobs"} <= set(synced)
    synced.clear()
    Store(tmp_path / "a" / "b")
    assert synced == []


def test_a_version_is_found_by_an_annotation_beside_a_manifest_that_cannot_be_read(
    store: Store, manifest: Content, vectors: Vectors, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        store.publish("mood", manifest | {"annotations": {"fit": f"fit-{number}", "n": "x"}}, vectors(float(number)))
    with sqlite3.connect(tmp_path / "artifacts" / "store.sqlite") as db:
        db.execute("UPDATE versions SET manifest = 'no JSON' WHERE version = 1")
    found = store.annotated("mood", "fit", "fit-2")
    assert found is not None and found.ref == "mood@2"
    assert store.annotated("mood", "n", "fit-2") is None
    assert store.annotated("mood", "fit", "fit-1") is None
    assert store.annotated("other", "fit", "fit-2") is None
