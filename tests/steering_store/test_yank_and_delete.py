from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering_store import Store
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InUse

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]


@pytest.fixture
def mood(store: Store, manifest: Content, vectors: Vectors) -> Store:
    """A store with mood@1 and mood@2."""
    for fill in (1.0, 2.0):
        store.publish("mood", manifest, vectors(fill))
    return store


def test_yanked_version_is_hidden_and_still_answers_to_its_number_digest_and_aliases(mood: Store) -> None:
    mood.set_alias("mood", "production", 2)
    yanked = mood.yank("mood", 2, by="ana", reason="wrong sign")
    assert (yanked.yanked, yanked.yank_reason) == (True, "wrong sign")
    assert mood.resolve("mood").version == 1
    assert [version.version for version in mood.versions("mood")] == [1]
    assert [item.ref for item in mood.list_artifacts().items] == ["mood@1"]
    for ref in ("mood@2", f"mood@{yanked.digest}", "mood@production"):
        assert mood.resolve(ref) == yanked
    assert [version.yanked for version in mood.versions("mood", include_yanked=True)] == [False, True]
    assert mood.load_tensors(yanked)
    shown = mood.unyank("mood", 2)
    assert (shown.yanked, shown.yank_reason) == (False, None)
    assert mood.resolve("mood") == shown


def test_artifact_whose_versions_are_all_yanked_is_in_no_list(mood: Store) -> None:
    for version in (1, 2):
        mood.yank("mood", version)
    assert mood.list_artifacts().items == []
    for find in (mood.resolve, mood.versions):
        with pytest.raises(ArtifactNotFound):
            find("mood")
    assert mood.resolve("mood@1").yanked


def test_yanking_twice_is_recorded_once(mood: Store) -> None:
    mood.yank("mood", 1, by="ana", reason="first")
    assert mood.yank("mood", 1, by="ben", reason="second").yank_reason == "first"
    mood.unyank("mood", 1)
    mood.unyank("mood", 1)
    told = [(e.action, e.from_version, e.by) for e in mood.history("mood") if e.action != "publish"]
    assert told == [("yank", 1, "ana"), ("unyank", 1, None)]
    with pytest.raises(ArtifactNotFound):
        mood.yank("mood", 3)


def test_publishing_the_bytes_of_a_yanked_version_does_not_bring_it_back(
    mood: Store, manifest: Content, vectors: Vectors
) -> None:
    mood.yank("mood", 2)
    version, created = mood.publish("mood", manifest, vectors(2.0))
    assert (version.version, version.yanked, created) == (2, True, False)


def test_deleted_version_is_gone_and_its_number_is_never_given_again(
    mood: Store, manifest: Content, vectors: Vectors
) -> None:
    digest = mood.resolve("mood@2").digest
    mood.delete_version("mood", 2, by="ana", reason="private data")
    for ref in ("mood@2", f"mood@{digest}"):
        with pytest.raises(ArtifactNotFound):
            mood.resolve(ref)
    assert mood.resolve("mood").version == 1
    assert mood.publish("mood", manifest, vectors(2.0)).version.version == 3
    entry = mood.history("mood")[-2]
    assert (entry.action, entry.from_version, entry.by, entry.reason) == ("delete", 2, "ana", "private data")
    with pytest.raises(ArtifactNotFound):
        mood.delete_version("mood", 2)


def test_last_version_may_go_and_the_numbers_go_on(mood: Store, manifest: Content, vectors: Vectors) -> None:
    for version in (1, 2):
        mood.delete_version("mood", version)
    with pytest.raises(ArtifactNotFound):
        mood.versions("mood")
    assert [entry.action for entry in mood.history("mood")] == ["publish"] * 2 + ["delete"] * 2
    assert mood.publish("mood", manifest, vectors(1.0)).version.version == 3


def test_whatever_holds_a_version_is_named_and_keeps_it(mood: Store, manifest: Content) -> None:
    version = mood.resolve("mood@1")
    condition = {"artifact": "mood@1", "threshold": 0.1}
    common = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    preset = common | {"kind": "preset", "interventions": [{"artifact": "mood@1"}]}
    gated = common | {
        "kind": "preset",
        "interventions": [{"artifact": "mood@2", "options": {"condition": condition}}],
    }
    mood.set_alias("mood", "production", 1)
    mood.publish("calm", preset, {})
    mood.publish("gated", gated, {})
    mood.lease(version.digest, "server 7", 60)

    def held() -> list[str]:
        with pytest.raises(InUse) as caught:
            mood.delete_version("mood", 1)
        assert caught.value.param == "version"
        assert all(holder in caught.value.message for holder in caught.value.holders)
        return caught.value.holders

    assert held() == ["alias production", "preset calm@1", "preset gated@1", "lease of server 7"]
    mood.delete_alias("mood", "production")
    mood.release("server 7")
    mood.yank("gated", 1)
    assert held() == ["preset calm@1", "preset gated@1"]
    mood.delete_version("calm", 1)
    mood.delete_version("gated", 1)
    mood.delete_version("mood", 1)


def test_preset_holds_only_the_artifact_that_it_names(mood: Store, manifest: Content, vectors: Vectors) -> None:
    """The same bytes under another name, and a description that mentions them, hold nothing."""
    other = mood.publish("other", manifest, vectors(1.0)).version
    common = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    preset = common | {"kind": "preset", "interventions": [{"artifact": "mood@1"}]}
    mood.publish("calm", preset | {"description": f"other@{other.digest}"}, {})
    mood.delete_version("other", 1)
    with pytest.raises(InUse):
        mood.delete_version("mood", 1)


def test_version_with_a_damaged_row_can_be_deleted(mood: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "artifacts" / "store.sqlite") as db:
        db.execute("UPDATE versions SET manifest = replace(manifest, '4.0', '9.0') WHERE version = 1")
    db.close()
    with pytest.raises(CorruptArtifact):
        mood.collect_garbage()
    mood.delete_version("mood", 1)
    assert mood.verify() == []
    assert mood.collect_garbage(grace_seconds=0).blobs


def test_deletion_while_a_version_is_read_is_not_reported_as_damage(mood: Store) -> None:
    version = mood.resolve("mood@1")
    mood.delete_version("mood", 1)
    assert mood.load_tensors(version)
    mood.collect_garbage(grace_seconds=0, dry_run=False)
    for read in (mood.load_tensors, lambda version: mood.file_path(version, "vectors.safetensors")):
        with pytest.raises(ArtifactNotFound):
            read(version)
