"""Relative doses and their limits, and the receipt."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.api.doses import Doses
from server.api.errors import ApiError
from server.api.prepared import Prepared
from server.api.steering import Steerer
from steering_store import Store
from steering_store.errors import CorruptArtifact
from tests.server.api.published import (
    FILE,
    FIRST,
    HIDDEN,
    load,
    prepare,
    publish,
    publish_sae,
    receipt,
    refused,
)


def test_damaged_vectors_are_refused(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    prepared = prepare(steerer)
    store.file_path(version, FILE).write_bytes(b"x" * 200)
    with pytest.raises(CorruptArtifact):
        load(prepared, version.digest)


def test_receipt_holds_the_counts_and_the_largest_dose(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, {"strength": -2, "layers": [2, 3]}, {"strength": 0.5, "op": "add_norm"})
    asyncio.run(steerer.check(prepared))
    said = steerer.receipt(prepared, [[7, 6], [4, 4, 5]], [3, 0])
    assert said.fingerprint == prepared.program.fingerprint
    first, second = said.applied
    assert (first.tokens_touched, first.tokens_from_cache) == (6, 3)
    assert first.relative_dose == pytest.approx(2 * 3 * np.sqrt(HIDDEN) / 10, rel=1e-5)
    assert (second.tokens_touched, second.tokens_from_cache, second.relative_dose) == (4, 0, 0.5)
    assert (first.edits[0].opcode, first.edits[0].sites) == ("add", ["resid_post.2", "resid_post.3"])


def test_receipt_of_an_intervention_leaves_its_gate_and_renorm_out_of_the_sum(store: Store, steerer: Steerer) -> None:
    publish(store)
    gated = {"condition": {"artifact": "mood", "threshold": 0.5}, "renorm": True, "layers": [2]}
    prepared = prepare(steerer, gated)
    (applied,) = steerer.receipt(prepared, [[9], [5], [0]], [0, 0, 0]).applied
    assert applied.tokens_touched == 5
    assert [(edit.opcode, edit.tokens_touched) for edit in applied.edits] == [("gate", 9), ("add", 5), ("renorm", 0)]


def test_dose_is_null_unless_every_layer_has_a_norm(store: Store, steerer: Steerer) -> None:
    publish(store, h_norm={"2": 10.0})
    assert receipt(steerer, prepare(steerer)).applied[0].relative_dose is None
    assert receipt(steerer, prepare(steerer, {"layers": [2]})).applied[0].relative_dose is not None
    assert receipt(steerer, prepare(steerer, {"layers": [2], "op": "ablate"})).applied[0].relative_dose is None


def test_dose_of_added_features_is_that_of_their_vector(store: Store, steerer: Steerer) -> None:
    version = publish_sae(store)
    decoder = store.load_tensors(version)["3.decoder"]
    features = [{"index": 1, "op": "add", "value": 2.0}, {"index": 5, "op": "add", "value": -1.0}]
    said = receipt(steerer, prepare(steerer, {"artifact": "sae", "features": features, "strength": 0.5}))
    dose = 0.5 * np.linalg.norm(2 * decoder[1] - decoder[5]) / 10
    assert said.applied[0].relative_dose == pytest.approx(dose, rel=1e-5)


def dose_refused(steerer: Steerer, prepared: Prepared, param: str, word: str) -> None:
    with pytest.raises(ApiError) as error:
        asyncio.run(steerer.check(prepared))
    assert (error.value.status, error.value.param) == (400, param)
    assert word in error.value.message


def test_dose_above_the_limit_is_refused_with_the_dose_and_the_layer(store: Store, steerer: Steerer) -> None:
    publish(store)
    dose = 5 * np.sqrt(HIDDEN) / 10
    asyncio.run(steerer.check(prepare(steerer, {"strength": 1.0}, max_relative_dose=float(dose) + 1e-3)))
    over = prepare(steerer, {"strength": 0.0}, {"strength": -1.0}, max_relative_dose=1.0)
    dose_refused(steerer, over, "steering.interventions.1.strength", f"{dose:.4g} at resid_post.5 is above")
    over = prepare(steerer, {"op": "add_norm", "strength": 1.5}, max_relative_dose=1.0)
    dose_refused(steerer, over, f"{FIRST}.strength", "1.5 at")


def test_unknown_dose_is_refused_where_there_is_a_limit(store: Store, steerer: Steerer) -> None:
    publish(store, h_norm={"2": 10.0})
    unknown = prepare(steerer, {"strength": 0.01}, max_relative_dose=1.0)
    dose_refused(steerer, unknown, f"{FIRST}.artifact", "layers [3, 5] is unknown")
    asyncio.run(steerer.check(prepare(steerer, {"op": "ablate"}, max_relative_dose=1.0)))


def test_request_may_lower_the_limit_and_not_raise_it(store: Store, steerer: Steerer) -> None:
    publish(store)
    steerer.doses = Doses(1.0)
    dose_refused(steerer, prepare(steerer, {"strength": 1.0}), f"{FIRST}.strength", "max_relative_dose, 1")
    lower = prepare(steerer, {"op": "add_norm", "strength": 0.5}, max_relative_dose=0.4)
    dose_refused(steerer, lower, f"{FIRST}.strength", "max_relative_dose, 0.4")
    refused(steerer, 422, "steering.max_relative_dose", "only lower", {}, max_relative_dose=1.1)
