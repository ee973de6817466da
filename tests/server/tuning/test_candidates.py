from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.tuning.candidates import Candidate
from steering_store import Store
from steering_store.errors import ArtifactNotFound
from tests.server.api.published import HIDDEN, publish_sae


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def candidate(store: Store, name: str = "new") -> tuple[Candidate, dict[str, np.ndarray]]:
    published = publish_sae(store)
    fields = published.manifest.model_dump(mode="json", exclude={"files"}, exclude_none=True)
    fields["provenance"]["created_at"] = "2026-01-02T00:00:00Z"
    tensors = store.load_tensors(published)
    return Candidate(name, fields, tensors, store), tensors


def test_it_is_found_by_its_name_and_answers_as_the_store_would(store: Store) -> None:
    made, tensors = candidate(store)
    version = made.known("new")
    assert made.load_tensors(version).keys() == tensors.keys()
    wanted = {"3.encoder": [7, 2], "3.encoder_bias": None}
    found = made.load_tensors(version, wanted)
    assert found.keys() == wanted.keys()
    expected = store.load_tensors(store.resolve("sae"), wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], expected[name])


def test_everything_else_comes_from_the_store(store: Store) -> None:
    made, tensors = candidate(store)
    other = made.known("sae@1")
    assert other == store.resolve("sae@1")
    assert made.load_tensors(other, {"3.decoder": [1]})["3.decoder"].shape == (1, HIDDEN)
    with pytest.raises(ArtifactNotFound):
        made.known("nothing")


def test_other_numbers_have_another_digest(store: Store) -> None:
    made, tensors = candidate(store)
    fields = made.known("new").manifest.model_dump(mode="json", exclude_none=True)
    changed = Candidate("new", fields, {**tensors, "3.encoder": tensors["3.encoder"] + 1}, store)
    assert changed.known("new").digest != made.known("new").digest
