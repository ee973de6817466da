from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering_store import Store
from steering_store.archive import InvalidArchive, export_archive, import_archive
from steering_store.errors import CorruptArtifact, StoreError, TooLarge
from tests.steering_store.mutations import mutations


@pytest.fixture
def archive(store: Store, manifest: dict[str, Any], vectors: Callable[..., dict[str, bytes]], tmp_path: Path) -> Path:
    export(store, store.publish("mood", manifest, vectors()).version.ref, tmp_path / "mood.tar")
    return tmp_path / "mood.tar"


def export(store: Store, ref: str, path: Path) -> bytes:
    with path.open("wb") as stream:
        export_archive(store, store.resolve(ref), stream)
    return path.read_bytes()


def test_import_and_export_again_is_bit_identical(store: Store, archive: Path, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    imported, created = import_archive(other, "borrowed", archive)
    assert (created, imported.ref, imported.digest) == (True, "borrowed@1", store.resolve("mood").digest)
    assert export(other, "borrowed", tmp_path / "again.tar") == archive.read_bytes()
    assert import_archive(other, "borrowed", archive) == (imported, False)


def test_archive_is_a_tar_with_the_manifest_first(archive: Path, vectors: Callable[..., dict[str, bytes]]) -> None:
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["manifest.json", "vectors.safetensors"]
        content = tar.extractfile("vectors.safetensors")
        assert content is not None and content.read() == vectors()["vectors.safetensors"]
    assert archive.stat().st_size % tarfile.RECORDSIZE == 0


def test_longest_file_name_goes_there_and_back(
    store: Store, manifest: dict[str, Any], vectors: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    name = "v" * 110 + ".safetensors"
    manifest["sites"][0]["file"] = name
    store.publish("long", manifest, {name: vectors()["vectors.safetensors"]})
    data = export(store, "long", tmp_path / "long.tar")
    assert (
        import_archive(Store(tmp_path / "other"), "long", tmp_path / "long.tar").version.manifest.files[0].path == name
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["manifest.json", name]


def test_a_changed_byte_anywhere_is_refused_or_makes_another_digest(
    store: Store, archive: Path, tmp_path: Path
) -> None:
    """Of an archive's bytes only the texts and numbers of the manifest are free, and they are the identity."""
    whole = archive.read_bytes()
    original = store.resolve("mood")
    other = Store(tmp_path / "other")
    accepted = 0
    for position in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        archive.write_bytes(damaged)
        try:
            imported = import_archive(other, "mood", archive).version
        except StoreError:
            continue
        accepted += 1
        assert imported.digest != original.digest
        assert imported.manifest.files == original.manifest.files
    assert accepted < len(whole) // 17 // 4


def test_changed_bytes_give_clear_errors_only(archive: Path, tmp_path: Path) -> None:
    whole, other = archive.read_bytes(), Store(tmp_path / "other")
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes=st.lists(mutations(), min_size=1, max_size=3))
    def fuzz(changes: list[Callable[[bytes], bytes]]) -> None:
        raw = whole
        for change in changes:
            raw = change(raw)
        archive.write_bytes(raw)
        try:
            import_archive(other, "mood", archive)
            outcomes["read"] += 1
        except StoreError as exc:
            assert len(exc.message) < 1000
            outcomes["refused"] += 1

    fuzz()
    assert outcomes["refused"] > 100, outcomes
    assert other.verify() == []


def test_every_truncation_and_any_tail_is_refused(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    other = Store(tmp_path / "other")
    for content in [whole[:length] for length in range(0, len(whole), 509)] + [whole + b"\0", whole + whole]:
        archive.write_bytes(content)
        with pytest.raises(StoreError):
            import_archive(other, "mood", archive)
    assert other.list_artifacts().items == []


@pytest.mark.parametrize("kind", ["traversal", "absolute", "symlink", "hardlink", "device", "extra"])
def test_what_another_tar_would_extract_elsewhere_is_refused(archive: Path, tmp_path: Path, kind: str) -> None:
    member = tarfile.TarInfo("vectors.safetensors")
    match kind:
        case "traversal":
            member.name = "../../escape.safetensors"
        case "absolute":
            member.name = str(tmp_path / "escape.safetensors")
        case "symlink" | "hardlink":
            member.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
            member.linkname = "/etc/passwd"
        case "device":
            member.type = tarfile.CHRTYPE
        case "extra":
            member.name = "extra.safetensors"
    with tarfile.open(archive) as tar:
        manifest = tar.extractfile("manifest.json")
        assert manifest is not None
        text = manifest.read()
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        first = tarfile.TarInfo("manifest.json")
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        tar.addfile(member)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InvalidArchive, match="vectors.safetensors"):
        import_archive(Store(tmp_path / "other"), "mood", archive)
    assert not [path for path in set(tmp_path.rglob("*")) - before if "escape" in path.name or "extra" in path.name]


def test_declared_sizes_are_limits(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        import_archive(Store(tmp_path / "small", max_bytes=50), "mood", archive)
    with pytest.raises(TooLarge):
        import_archive(Store(tmp_path / "few", max_files=0), "mood", archive)
    huge = tarfile.TarInfo("manifest.json")
    huge.size = 1 << 40
    archive.write_bytes(huge.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(TooLarge):
        import_archive(Store(tmp_path / "other"), "mood", archive)


def test_damaged_file_is_not_exported(store: Store, archive: Path, tmp_path: Path) -> None:
    version = store.resolve("mood")
    store.file_path(version, "vectors.safetensors").write_bytes(b"x" * version.manifest.files[0].size)
    with pytest.raises(CorruptArtifact, match="vectors.safetensors"):
        export(store, "mood", tmp_path / "again.tar")
