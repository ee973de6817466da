"""Presets in a request: one word in place of several interventions."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.steering import Steerer
from steering_store import ArtifactVersion, Store
from tests.server.api.published import (
    FIRST,
    HIDDEN,
    LAYERS,
    prepare,
    publish,
    publish_neurons,
    receipt,
    refused,
    vectors,
)

ITEMS: tuple[dict[str, Any], ...] = (
    {"artifact": "mood", "strength": 2.0, "options": {"layers": [3], "op": "add_norm"}},
    {
        "artifact": "neurons",
        "options": {"condition": {"artifact": "mood", "threshold": 0.5, "layer": 3, "scope": "sequence"}},
    },
)


def publish_preset(
    store: Store, *items: dict[str, Any], strength: float = 1.0, name: str = "polite"
) -> ArtifactVersion:
    manifest = {
        "schema_version": 1,
        "kind": "preset",
        "model": {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS},
        "interventions": list(items or ITEMS),
        "default_strength": strength,
        "provenance": {"method": "by hand"},
    }
    return store.publish(name, manifest, {}).version


@pytest.fixture(autouse=True)
def artifacts(store: Store) -> None:
    publish(store)
    publish_neurons(store, 1, 5)


def test_a_preset_is_its_interventions(steerer: Steerer, store: Store) -> None:
    publish_preset(store)
    by_hand = prepare(
        steerer, {"strength": 2.0, "layers": [3], "op": "add_norm"}, ITEMS[1]["options"] | {"artifact": "neurons"}
    )
    assert prepare(steerer, {"artifact": "polite"}).program.fingerprint == by_hand.program.fingerprint


@pytest.mark.parametrize(
    ("default", "asked", "scale"), [(1.0, None, 1.0), (0.5, None, 0.5), (0.5, -2.0, -2.0), (1.0, 0.0, 0.0)]
)
def test_its_strengths_are_multiplied(
    steerer: Steerer, store: Store, default: float, asked: float | None, scale: float
) -> None:
    publish_preset(store, strength=default)
    edits = prepare(steerer, {"artifact": "polite"} | ({} if asked is None else {"strength": asked})).program.edits
    assert [edit.strength for edit in edits if edit.opcode != "gate"] == [2.0 * scale, 4.0 * scale]


def test_a_preset_holds_what_it_was_published_with(steerer: Steerer, store: Store) -> None:
    publish_preset(store)
    before = prepare(steerer, {"artifact": "polite"})
    publish(store, tensors=vectors(9.0))
    assert prepare(steerer, {"artifact": "polite"}).program.fingerprint == before.program.fingerprint


def test_the_receipt_names_the_preset_and_its_artifacts(steerer: Steerer, store: Store) -> None:
    preset = publish_preset(store)
    prepared = prepare(steerer, {}, {"artifact": "polite"})
    assert [(each.preset, each.artifact) for each in receipt(steerer, prepared).applied] == [
        (None, "mood"),
        ("polite@1", "mood"),
        ("polite@1", "neurons"),
    ]
    assert prepared.numbers == (0, 1, 1)
    assert prepared.digests == {preset.digest, *(version.digest for version in prepared.versions)}


def test_errors_name_the_intervention_that_named_the_preset(steerer: Steerer, store: Store) -> None:
    publish_preset(store, {"artifact": "mood", "options": {"layers": [1]}})
    refused(steerer, 422, "steering.interventions.1.layers", "has nothing for layers [1]", {}, {"artifact": "polite"})
    publish_preset(store)
    refused(steerer, 422, f"{FIRST}.strength", "at most", {"artifact": "polite", "strength": 1e6})
    refused(steerer, 422, f"{FIRST}.layers", "is a preset, which brings its own", {"artifact": "polite", "layers": [3]})
    assert prepare(steerer, {}, {"artifact": "polite"}).field(2) == "steering.interventions.1"


def test_a_preset_with_an_option_that_nobody_knows_is_refused(steerer: Steerer, store: Store) -> None:
    publish_preset(store, {"artifact": "mood", "options": {"loudness": 3}})
    refused(steerer, 422, f"{FIRST}.artifact", "polite@1: interventions.0.loudness", {"artifact": "polite"})


def test_what_is_set_can_not_be_made_stronger(steerer: Steerer, store: Store) -> None:
    publish_preset(store, {"artifact": "mood", "options": {"op": "set"}})
    assert prepare(steerer, {"artifact": "polite"}).program.edits[0].opcode == "set"
    refused(steerer, 422, f"{FIRST}.strength", "has no strength", {"artifact": "polite", "strength": 2})
