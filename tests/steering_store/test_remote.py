from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from steering_store.errors import ArtifactNotFound, CorruptArtifact, RemoteUnavailable, StoreError, TooLarge
from steering_store.manifest import FileEntry, canonical_json, digest_of, parse_manifest
from steering_store.reference import Reference, parse_reference
from steering_store.remote import RemoteStore, new_event
from steering_store.remote_objects import Objects, _beside


def texts(manifest: dict[str, Any], count: int) -> list[bytes]:
    return [canonical_json(parse_manifest(manifest | {"description": f"number {i}"})) for i in range(count)]


def write(url: str, path: str, data: bytes) -> None:
    with fsspec.open(f"{url}/{path}", "wb", use_listings_cache=False) as stream:
        stream.write(data)


def test_object_is_created_once(url: str) -> None:
    objects = Objects(url)
    assert objects.create("a/b.json", b"1")
    assert not objects.create("a/b.json", b"2")
    assert objects.read("a/b.json", 10) == b"1"
    assert objects.list("a") == ["a/b.json"]
    assert objects.list("nothing") == []


def test_object_that_is_missing_or_too_large_is_refused(url: str) -> None:
    objects = Objects(url)
    objects.create("a", b"123")
    with pytest.raises(FileNotFoundError):
        objects.read("b", 10)
    with pytest.raises(TooLarge):
        objects.read("a", 2)


def test_files_of_dead_writers_are_swept_and_those_of_live_ones_left(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path}/remote")
    objects.create("events/1.json", b"1")
    folder = tmp_path / "remote" / "events"
    dead, young, other = folder / f".{'a' * 32}", folder / f".{'b' * 32}", folder / ".nfs01"
    for path in (dead, young, other):
        path.write_bytes(b"123")
    os.utime(dead, (1, 1))
    os.utime(other, (1, 1))
    assert objects.sweep(1000, dry_run=True) == [(f"events/{dead.name}", 3)]
    with _beside(folder / "2.json") as stream:
        os.utime(stream.name, (1, 1))
        assert objects.sweep(1000, dry_run=False) == [(f"events/{dead.name}", 3)]
        assert Path(stream.name).exists()
    assert sorted(folder.iterdir()) == sorted([folder / "1.json", young, other])


def test_of_many_creators_one_wins(tmp_path: Path, s3: str) -> None:
    """Not in memory, which looks and then writes."""
    for url in (f"file://{tmp_path}/remote", s3):
        objects = Objects(url)
        barrier = threading.Barrier(8)

        def create(i: int, objects: Objects = objects, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return objects.create("events/1.json", b"%d" % i)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert objects.read("events/1.json", 10) == b"%d" % won.index(True)


def test_versions_are_dense_and_found_by_every_reference(url: str, manifest: dict[str, Any]) -> None:
    store = RemoteStore(url)
    first, second = texts(manifest, 2)
    assert store.publish("mood", first).version.version == 1
    assert store.publish("mood", second) == (store.resolve(Reference("mood")), True)
    assert store.publish("mood", first) == (store.resolve(Reference("mood", 1)), False)
    store.change(lambda state: new_event("set_alias", "mood", alias="production", version=1))
    store.change(lambda state: new_event("yank", "mood", version=2))
    again = RemoteStore(url)
    for ref, version in (("mood", 1), ("mood@2", 2), ("mood@production", 1), (f"mood@{digest_of(second)}", 2)):
        assert again.resolve(parse_reference(ref)).version == version
    for ref in ("mood@3", "mood@staging", "other"):
        with pytest.raises(ArtifactNotFound, match=ref):
            again.resolve(parse_reference(ref))


def test_number_of_a_deleted_version_is_never_given_again(url: str, manifest: dict[str, Any]) -> None:
    store = RemoteStore(url)
    first, second = texts(manifest, 2)
    store.publish("mood", first)
    store.change(lambda state: new_event("delete", "mood", version=1))
    assert RemoteStore(url).publish("mood", second).version.version == 2


def test_concurrent_publishers_get_each_number_once(tmp_path: Path, s3: str, manifest: dict[str, Any]) -> None:
    for url in (f"file://{tmp_path}/remote", s3):

        def publish(text: bytes, url: str = url) -> int:
            return RemoteStore(url).publish("mood", text).version.version

        everything = texts(manifest, 12)
        with ThreadPoolExecutor(6) as pool:
            numbers = list(pool.map(publish, everything + everything))
        assert sorted(numbers[:12]) == list(range(1, 13))
        assert numbers[12:] == numbers[:12]


def test_event_whose_answer_was_lost_is_recognised_as_ours(url: str) -> None:
    store = RemoteStore(url)
    event = new_event("publish", "mood", version=1, digest="sha256:" + "0" * 64)
    assert store.append(1, event)
    assert store.append(1, event)
    assert not store.append(1, new_event("publish", "mood", version=1, digest="sha256:" + "1" * 64))


def test_damaged_manifest_event_or_history_is_named(url: str, manifest: dict[str, Any]) -> None:
    (text,) = texts(manifest, 1)
    store = RemoteStore(url)
    digest = store.publish("mood", text).version.digest
    write(url, f"manifests/sha256/{digest[7:9]}/{digest[7:]}.json", text.replace(b"happy", b"sad") + b" ")
    with pytest.raises(CorruptArtifact, match="digest"):
        store.manifest(digest)
    for number, content, word in ((2, b"{", "000000002"), (2, b'{"action": "burn"}', "000000002")):
        write(url, f"events/{number:09}.json", content)
        with pytest.raises(CorruptArtifact, match=word):
            RemoteStore(url).resolve(Reference("mood"))
    impossible = new_event("delete", "mood", version=7)
    write(url, "events/000000002.json", impossible.model_dump_json().encode())
    with pytest.raises(CorruptArtifact, match="event 2, delete mood"):
        RemoteStore(url).resolve(Reference("mood"))
    write(url, "events/000000002.json", new_event("yank", "mood", version=1).model_dump_json().encode())
    write(url, "events/000000004.json", impossible.model_dump_json().encode())
    with pytest.raises(CorruptArtifact, match="event 3 is missing"):
        RemoteStore(url).resolve(Reference("mood"))


def test_damaged_file_is_never_read_to_its_end(url: str, tmp_path: Path) -> None:
    store = RemoteStore(url)
    data = b"some weights"
    entry = FileEntry(path="v.safetensors", size=len(data), sha256=digest_of(data)[7:])
    (tmp_path / "v").write_bytes(data)
    store.put_file(entry, tmp_path / "v")
    blob = f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    for damaged in (b"some wEights", b"some", b""):
        write(url, blob, damaged)
        with pytest.raises(CorruptArtifact, match="v.safetensors"), store.open_file(entry) as stream:
            while stream.read(4):
                pass
    store.put_file(entry, tmp_path / "v")
    with store.open_file(entry) as stream:
        assert stream.read(100) == data


def test_newer_layout_is_refused(url: str, manifest: dict[str, Any]) -> None:
    Objects(url).create("polyhelm-store.json", b'{"layout": 2}')
    with pytest.raises(StoreError, match="upgrade"):
        RemoteStore(url)


@pytest.mark.parametrize("url", ["folder", "/tmp/x", "nothing://x", "simplecache::file:///x"])
def test_what_is_no_url_of_a_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match=url.replace("/", ".")):
        RemoteStore(url)


def test_place_that_cannot_be_reached_is_an_error_of_its_own(s3: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="no-such-bucket"):
        RemoteStore("s3://no-such-bucket/x").publish("mood", b"{}")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RemoteUnavailable, match="file"):
        RemoteStore(f"file://{tmp_path}/file/store").publish("mood", b"{}")
