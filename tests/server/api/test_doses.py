"""Relative doses and their limits, and the receipt."""

from __future__ import annotations

import asyncio
from typing import Any

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
    publish_map,
    publish_neurons,
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
    assert receipt(steerer, prepare(steerer, {"op": "set"})).applied[0].relative_dose is None
    # What follows from the activation alone needs no norm.
    assert receipt(steerer, prepare(steerer, {"op": "ablate"})).applied[0].relative_dose == 0
    assert receipt(steerer, prepare(steerer, {"op": "add_norm", "strength": 0.3})).applied[0].relative_dose == 0.3


def test_dose_of_added_features_is_that_of_their_vector(store: Store, steerer: Steerer) -> None:
    version = publish_sae(store)
    decoder = store.load_tensors(version)["3.decoder"]
    features = [{"index": 1, "op": "add", "value": 2.0}, {"index": 5, "op": "add", "value": -1.0}]
    said = receipt(steerer, prepare(steerer, {"artifact": "sae", "features": features, "strength": 0.5}))
    dose = 0.5 * np.linalg.norm(2 * decoder[1] - decoder[5]) / 10
    assert said.applied[0].relative_dose == pytest.approx(dose, rel=1e-5)


@pytest.mark.parametrize(
    ("intervention", "dose"),
    [
        # v is 5 in each of the HIDDEN numbers at the last layer, and h is 10.
        ({"op": "set"}, 5 * HIDDEN**0.5 / 10),
        ({"op": "ablate"}, 0),
        ({"op": "ablate", "strength": 2}, 0),
        ({"op": "ablate", "strength": 4}, 2),  # x . v becomes -3 of what it was
        ({"op": "ablate", "strength": -1.5}, 1.5),
        ({"op": "clamp", "value": -30, "strength": 1}, 3),
        ({"op": "clamp", "value": 30, "strength": 0.5}, 1.5),
        ({"op": "clamp", "min": 20, "strength": 1}, 2),
        ({"op": "clamp", "max": -20, "strength": 1}, 2),
        ({"op": "clamp", "min": -500, "max": 500, "strength": 1}, 0),  # it only ever shortens
        ({"op": "clamp", "value": 0, "strength": -2}, 2),
        ({"artifact": "neurons", "strength": -1}, 0),
        ({"artifact": "neurons", "strength": -4}, 2),
        ({"artifact": "neurons", "strength": 1.5}, 1.5),
        ({"artifact": "map"}, None),
    ],
    ids=str,
)
def test_dose_is_how_much_an_edit_can_add(
    store: Store, steerer: Steerer, intervention: dict[str, Any], dose: float | None
) -> None:
    publish(store)
    publish_neurons(store, 1, 5)
    publish_map(store)
    found = receipt(steerer, prepare(steerer, intervention)).applied[0].relative_dose
    assert found == (dose if dose is None else pytest.approx(dose, abs=1e-5))


def test_dose_of_features_is_the_sum_of_what_each_can_add(store: Store, steerer: Steerer) -> None:
    tensors = store.load_tensors(publish_sae(store))
    encoder, decoder = (
        np.linalg.norm(tensors[f"3.{role}"].astype(np.float64), axis=1) for role in ("encoder", "decoder")
    )
    features = [
        {"index": 1, "op": "clamp", "value": 8.0},
        {"index": 2, "op": "ablate"},
        {"index": 5, "op": "scale", "value": 0.5},
        {"index": 7, "op": "clamp", "max": 4.0},
        {"index": 8, "op": "scale", "value": 0.0},
    ]
    said = receipt(steerer, prepare(steerer, {"artifact": "sae", "features": features})).applied[0]
    expected = 8 * decoder[1] / 10 + 0.5 * encoder[5] * decoder[5]
    assert said.relative_dose == pytest.approx(expected, rel=1e-5)


def test_no_activation_gets_more_than_its_dose(store: Store, steerer: Steerer) -> None:
    """The definition by brute force: activations of the length h, most of them along the directions that are read."""
    tensors = store.load_tensors(publish_sae(store, h_norm={"3": 10.0}))
    encoder, decoder = tensors["3.encoder"], tensors["3.decoder"]
    features = [{"index": 4, "op": "scale", "value": 2.0}, {"index": 9, "op": "clamp", "min": 3.0}]
    dose = receipt(steerer, prepare(steerer, {"artifact": "sae", "features": features})).applied[0].relative_dose
    most = 0.0
    for direction in (
        encoder[4],
        encoder[4] + encoder[9],
        encoder[4] - encoder[9],
        *np.random.default_rng(0).standard_normal((200, HIDDEN)),
    ):
        x = 10 * direction / np.linalg.norm(direction)
        a = np.maximum(encoder[[4, 9]] @ x, 0)
        change = np.array([2 * a[0], max(a[1], 3.0) - a[1]]) @ decoder[[4, 9]]
        most = max(most, float(np.linalg.norm(change)) / 10)
    assert 0.5 * dose < most <= dose


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


def test_doses_that_meet_at_a_token_of_a_site_are_refused_together(store: Store, steerer: Steerer) -> None:
    publish(store, "other")
    publish(store)
    one = 0.1 * 5 * HIDDEN**0.5 / 10
    half, limit = {"strength": 0.1, "layers": [5]}, {"max_relative_dose": 1.5 * one}
    asyncio.run(steerer.check(prepare(steerer, half, **limit)))
    both = prepare(steerer, half, half | {"artifact": "other"}, **limit)
    dose_refused(steerer, both, "steering.interventions.1.strength", f"{2 * one:.4g} in all at resid_post.5")
    asyncio.run(steerer.check(prepare(steerer, half, half | {"layers": [3]}, **limit)))


@pytest.mark.parametrize(
    ("first", "second", "meets"),
    [
        ({"prompt": "all"}, {"generation": "all"}, False),
        ({"prompt_window": [0, 4]}, {"prompt_window": [4, 8]}, False),
        ({"prompt_window": [0, 4]}, {"prompt_window": [3, 8]}, True),
        ({"prompt_positions": [3]}, {"prompt_positions": [-2]}, True),  # of a prompt of five tokens
        ({"prompt_positions": [-1]}, {"prompt_window": [-4, -1]}, False),
        ({"prompt_window": [2, None]}, {"prompt": "all", "exclude_prompt_window": [2, None]}, False),
        ({"generation_window": [0, 4]}, {"generation_window": [4, None]}, False),
        ({"generation_window": [0, 5]}, {"generation_window": [4, None]}, True),
        ({"prompt_positions": list(range(20))}, {"prompt_positions": list(range(20, 40))}, True),  # too many to tell
    ],
    ids=str,
)
def test_only_spans_that_can_meet_are_added_up(
    store: Store, steerer: Steerer, first: dict[str, Any], second: dict[str, Any], meets: bool
) -> None:
    publish(store)
    half = {"op": "add_norm", "strength": 0.3}
    prepared = prepare(steerer, half | {"apply": first}, half | {"apply": second}, max_relative_dose=0.5)
    if meets:
        dose_refused(steerer, prepared, "steering.interventions.1.strength", "0.6 in all")
    else:
        asyncio.run(steerer.check(prepared))


def test_set_and_clamp_are_guarded(store: Store, steerer: Steerer) -> None:
    publish(store)
    long = prepare(steerer, {"op": "set"}, max_relative_dose=1.0)
    dose_refused(steerer, long, f"{FIRST}.artifact", "what it sets is too long")
    pinned = prepare(steerer, {"op": "clamp", "value": 40, "strength": 1}, max_relative_dose=1.0)
    dose_refused(steerer, pinned, f"{FIRST}.strength", "a relative dose of 4 at")


def test_request_may_lower_the_limit_and_not_raise_it(store: Store, steerer: Steerer) -> None:
    publish(store)
    steerer.doses = Doses(1.0)
    dose_refused(steerer, prepare(steerer, {"strength": 1.0}), f"{FIRST}.strength", "max_relative_dose, 1")
    lower = prepare(steerer, {"op": "add_norm", "strength": 0.5}, max_relative_dose=0.4)
    dose_refused(steerer, lower, f"{FIRST}.strength", "max_relative_dose, 0.4")
    refused(steerer, 422, "steering.max_relative_dose", "only lower", {}, max_relative_dose=1.1)
