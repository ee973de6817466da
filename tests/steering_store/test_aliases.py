from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from steering_store import ABSENT, Store
from steering_store.errors import ArtifactNotFound, InvalidName, PreconditionFailed, Yanked

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]


@pytest.fixture
def mood(store: Store, manifest: Content, vectors: Vectors) -> Store:
    """A store with mood@1 to mood@3."""
    for fill in (1.0, 2.0, 3.0):
        store.publish("mood", manifest, vectors(fill))
    return store


def test_alias_is_a_reference_that_moves(mood: Store) -> None:
    with pytest.raises(ArtifactNotFound, match="mood@production"):
        mood.resolve("mood@production")
    first = mood.set_alias("mood", "production", 1)
    assert mood.resolve("mood@production").version == 1
    second = mood.set_alias("mood", "production", 2)
    assert mood.resolve("mood@production").version == 2
    assert (first.version, second.version, first.etag != second.etag) == (1, 2, True)
    assert mood.aliases("mood") == [second]
    assert mood.resolve("mood").version == 3


def test_move_needs_the_etag_that_the_mover_has_seen(mood: Store) -> None:
    first = mood.set_alias("mood", "production", 1, expected=ABSENT)
    second = mood.set_alias("mood", "production", 2, expected=first.etag)
    for stale in (first.etag, ABSENT, "nonsense"):
        with pytest.raises(PreconditionFailed, match="points at version 2") as caught:
            mood.set_alias("mood", "production", 3, expected=stale)
        assert (caught.value.current, caught.value.param) == (second.etag, "alias")
    with pytest.raises(PreconditionFailed, match="doesn't exist") as caught:
        mood.set_alias("mood", "canary", 3, expected=second.etag)
    assert caught.value.current is None
    assert mood.aliases("mood") == [second]


def test_etag_never_comes_back(mood: Store) -> None:
    """Moved away and back, or deleted and made again, an alias isn't in the state that somebody saw before."""
    seen = [mood.set_alias("mood", "a", version).etag for version in (1, 2, 1)]
    mood.delete_alias("mood", "a", expected=seen[-1])
    seen.append(mood.set_alias("mood", "a", 1, expected=ABSENT).etag)
    assert len(set(seen)) == 4


def test_moving_to_where_it_points_changes_nothing(mood: Store) -> None:
    first = mood.set_alias("mood", "production", 1, by="ana")
    assert mood.set_alias("mood", "production", 1, expected=first.etag, by="ben") == first
    assert len(mood.history("mood", "production")) == 1
    with pytest.raises(PreconditionFailed):
        mood.set_alias("mood", "production", 1, expected=ABSENT)


def test_history_tells_who_moved_what_when_and_why(mood: Store) -> None:
    before = datetime.now(UTC)
    mood.set_alias("mood", "production", 1, by="ana", reason="first")
    mood.set_alias("mood", "canary", 3)
    mood.set_alias("mood", "production", 2, by="ben", reason="better")
    mood.delete_alias("mood", "production", by="ana", reason="over")
    told = [(e.action, e.alias, e.from_version, e.to_version, e.by, e.reason) for e in mood.history("mood") if e.alias]
    assert told == [
        ("set_alias", "production", None, 1, "ana", "first"),
        ("set_alias", "canary", None, 3, None, None),
        ("set_alias", "production", 1, 2, "ben", "better"),
        ("delete_alias", "production", 2, None, "ana", "over"),
    ]
    times = [entry.at for entry in mood.history("mood", "production")]
    assert len(times) == 3
    assert before <= times[0] <= times[1] <= times[2] <= datetime.now(UTC)


def test_deleted_alias_answers_no_more(mood: Store) -> None:
    alias = mood.set_alias("mood", "production", 1)
    with pytest.raises(PreconditionFailed):
        mood.delete_alias("mood", "production", expected="other")
    mood.delete_alias("mood", "production", expected=alias.etag)
    with pytest.raises(ArtifactNotFound):
        mood.resolve("mood@production")
    with pytest.raises(ArtifactNotFound):
        mood.delete_alias("mood", "production")
    with pytest.raises(PreconditionFailed):
        mood.delete_alias("mood", "production", expected=alias.etag)


def test_alias_cannot_point_at_nothing_or_be_set_to_a_yanked_version(mood: Store) -> None:
    mood.set_alias("mood", "production", 2)
    mood.yank("mood", 1)
    for version, error in ((9, ArtifactNotFound), (1, Yanked)):
        with pytest.raises(error):
            mood.set_alias("mood", "production", version)
    assert mood.resolve("mood@production").version == 2


@pytest.mark.parametrize("alias", ["latest", "3", "Production", "../a"])
def test_alias_with_a_bad_name_is_refused(mood: Store, alias: str) -> None:
    with pytest.raises(InvalidName):
        mood.set_alias("mood", alias, 1)


def test_aliases_of_nothing_are_not_found(mood: Store) -> None:
    for call in (mood.aliases, mood.history):
        with pytest.raises(ArtifactNotFound):
            call("moo")
    with pytest.raises(ArtifactNotFound):
        mood.set_alias("moo", "production", 1)
    with pytest.raises(ArtifactNotFound):
        mood.delete_alias("moo", "production")
