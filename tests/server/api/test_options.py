"""What the options of each kind of artifact become, and which are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.api.steering import Steerer
from server.engine.edits import Edit, Function
from steering_store import Store
from steering_store.errors import ArtifactNotFound
from tests.server.api.published import (
    FEATURE,
    FIRST,
    HIDDEN,
    SITES,
    load,
    prepare,
    publish,
    publish_map,
    publish_neurons,
    publish_sae,
    refused,
    tensor,
)


def test_ops_of_a_vector_are_edits(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    (ablate,) = prepare(steerer, {"op": "ablate"}).program.edits
    assert (ablate.opcode, ablate.strength, ablate.function) == ("rank", -1.0, Function())
    (clamp,) = prepare(steerer, {"op": "clamp", "min": -1.0, "max": 2.0}).program.edits
    assert (clamp.strength, clamp.function) == (1.0, Function("identity", (-1.0,), (2.0,)))
    (pinned,) = prepare(steerer, {"op": "clamp", "value": 3, "strength": 0.5}).program.edits
    assert (pinned.strength, pinned.function) == (0.5, Function("identity", (3.0,), (3.0,)))
    assert ablate.operand == clamp.operand == pinned.operand != version.digest
    (written,) = prepare(steerer, {"op": "set"}).program.edits
    assert (written.opcode, written.operand) == ("set", version.digest)


def test_operand_of_a_vector_holds_all_its_layers_and_that_of_an_ablation_unit_vectors(
    store: Store, steerer: Steerer
) -> None:
    publish(store)
    prepared = prepare(steerer, {"layers": [3]}, {"op": "ablate", "layers": [3]})
    added, ablated = (load(prepared, edit.operand) for edit in prepared.program.edits)
    for layer in SITES:
        np.testing.assert_array_equal(tensor(added, layer, "vector"), np.full(HIDDEN, layer, np.float32))
        for role in ("encoder", "decoder"):
            np.testing.assert_allclose(tensor(ablated, layer, role), np.full((1, HIDDEN), HIDDEN**-0.5), rtol=1e-6)


def test_neurons_become_a_mask(store: Store, steerer: Steerer) -> None:
    version = publish_neurons(store, 0, 7, 11)
    prepared = prepare(steerer, {"artifact": "neurons", "strength": -1})
    assert prepared.program.edits == (Edit("scale", version.digest, (2,), -1.0, point="mlp_act"),)
    assert np.flatnonzero(tensor(load(prepared, version.digest), 2, "mask")).tolist() == [0, 7, 11]
    assert prepared.applied[0].sites == ["mlp_act.2"]


def test_only_the_chosen_layers_of_a_map_are_loaded(store: Store, steerer: Steerer) -> None:
    publish_map(store)
    prepared = prepare(steerer, {"artifact": "map", "layers": [5, 3]})
    (edit,) = prepared.program.edits
    operand = load(prepared, edit.operand)
    assert (edit.opcode, edit.layers, {piece.layer for piece in operand.pieces}) == ("map", (3, 5), {3, 5})
    assert (tensor(operand, 5, "matrix") == 5).all()
    (other,) = prepare(steerer, {"artifact": "map"}).program.edits
    assert other.operand != edit.operand


def test_the_bias_of_a_map_is_added_behind_it_with_the_same_strength_and_span(store: Store, steerer: Steerer) -> None:
    publish_map(store, biased=(3, 5))
    apply = {"prompt_positions": [-1]}
    prepared = prepare(steerer, {"artifact": "map", "layers": [3, 5], "strength": 0.25, "apply": apply})
    mapped, added = prepared.program.edits
    assert (mapped.opcode, added.opcode, prepared.owners) == ("map", "add", (0, 0))
    assert (mapped.strength, mapped.span, mapped.layers) == (added.strength, added.span, added.layers)
    assert (tensor(load(prepared, added.operand), 5, "vector") == -5).all()
    assert {piece.role for piece in load(prepared, mapped.operand).pieces} == {"matrix"}
    others = [layer for layer in SITES if layer not in (3, 5)]
    (edit,) = prepare(steerer, {"artifact": "map", "layers": others}).program.edits
    assert edit.opcode == "map"
    refused(
        steerer, 422, "steering.interventions.0.layers", "bias at layers", {"artifact": "map", "layers": [3, *others]}
    )


def test_features_become_one_rank_edit_and_one_add(store: Store, steerer: Steerer) -> None:
    version = publish_sae(store)
    features = [
        {"index": 4, "op": "clamp", "value": 8.0},
        {"index": 9, "op": "add", "value": 2.0},
        {"index": 17, "op": "scale", "value": 0.5},
        {"index": 0, "op": "ablate"},
    ]
    prepared = prepare(steerer, {"artifact": "sae", "features": features})
    rank, add = prepared.program.edits
    assert (rank.opcode, add.opcode, prepared.owners) == ("rank", "add", (0, 0))
    assert rank.function == Function("relu", (8.0, 0.0, 0.0), (8.0, 0.0, 0.0))
    whole = store.load_tensors(version)
    operand = load(prepared, rank.operand)
    np.testing.assert_array_equal(tensor(operand, 3, "encoder"), whole["3.encoder"][[4, 17, 0]])
    gains = np.array([[1.0], [-0.5], [1.0]], np.float32)
    np.testing.assert_array_equal(tensor(operand, 3, "decoder"), gains * whole["3.decoder"][[4, 17, 0]])
    np.testing.assert_array_equal(tensor(load(prepared, add.operand), 3, "vector"), whole["3.decoder"][9])
    assert (rank.strength, add.strength) == (1.0, 2.0)
    assert prepared.applied[0].op == "features"


def test_all_features_of_an_sae_are_one_edit_however_many(store: Store, steerer: Steerer) -> None:
    version = publish_sae(store, default_features="all")
    prepared = prepare(steerer, {"artifact": "sae", "strength": 2.0})
    (edit,) = prepared.program.edits
    assert (edit.opcode, edit.strength, edit.function) == ("rank", 2.0, Function("relu"))
    whole, operand = store.load_tensors(version), load(prepared, edit.operand)
    for role in ("encoder", "decoder"):
        np.testing.assert_array_equal(tensor(operand, 3, role), whole[f"3.{role}"])
    (one,) = prepare(steerer, {"artifact": "sae", "features": [FEATURE]}).program.edits
    assert one.operand != edit.operand


@pytest.mark.parametrize(
    ("intervention", "param", "word"),
    [
        ({"op": "scale"}, "op", "'add' or 'add_norm'"),
        ({"artifact": "neurons", "op": "add"}, "op", "'scale'"),
        ({"artifact": "map", "op": "add"}, "op", "'map'"),
        ({"artifact": "sae", "op": "add", "features": [FEATURE]}, "op", "each of its features"),
        ({"artifact": "sae"}, "features", "list those to change"),
        ({"features": [FEATURE]}, "features", "leave it out"),
        ({"artifact": "sae", "features": []}, "features", "at least 1"),
        ({"artifact": "sae", "features": [{"index": 20, "op": "ablate"}]}, "features.0.index", "20 features"),
        ({"artifact": "sae", "features": [FEATURE, FEATURE]}, "features.1.index", "twice"),
        ({"artifact": "sae", "features": [FEATURE | {"value": 1.0}]}, "features.0.value", "leave it out"),
        ({"artifact": "sae", "features": [{"index": 1, "op": "add"}]}, "features.0.value", "needs one"),
        ({"artifact": "sae", "features": [{"index": 1, "op": "add", "min": 1.0}]}, "features.0.min", "leave it out"),
        ({"artifact": "sae", "features": [{"index": 1, "op": "clamp"}]}, "features.0.value", "min, max or both"),
        ({"artifact": "sae", "features": [{"index": 1, "op": "add", "value": 1e9}]}, "features.0.value", "at most"),
        ({"artifact": "sae", "features": [{"index": 1, "op": "topk"}]}, "features.0.op", "'ablate'"),
        ({"artifact": "sae", "features": [FEATURE | {"strength": 1}]}, "features.0.strength", "remove it"),
        ({"op": "clamp"}, "value", "min, max or both"),
        ({"op": "clamp", "value": 1.0, "min": 0.0}, "value", "leave these out"),
        ({"op": "clamp", "min": 2.0, "max": 1.0}, "min", "above max"),
        ({"op": "clamp", "max": float("nan")}, "max", "finite"),
        ({"value": 1.0}, "value", "clamp only"),
        ({"op": "set", "strength": 1.0}, "strength", "leave it out"),
        ({"renorm": 1}, "renorm", "boolean"),
        ({"condition": {"threshold": 0.5}}, "condition.artifact", "required"),
        ({"condition": {"artifact": "mood", "threshold": "x"}}, "condition.threshold", "number"),
        ({"condition": {"artifact": "mood", "threshold": 0.5, "when": 1}}, "condition.when", "remove it"),
        ({"condition": {"artifact": "neurons", "threshold": 0.5}}, "condition.artifact", "is a neuron_set"),
        ({"condition": {"artifact": "elsewhere", "threshold": 0.5}}, "condition.artifact", "mlp_out"),
        ({"condition": {"artifact": "mood", "threshold": 0.5, "layer": 3}}, "condition.layer", "scope sequence"),
        ({"condition": {"artifact": "narrow", "threshold": 0.5}}, "condition.artifact", "layers [3, 5]"),
        (
            {"condition": {"artifact": "mood", "threshold": 0.5, "scope": "sequence"}},
            "condition.layer",
            "read at one layer",
        ),
        ({"condition": {"artifact": "mood", "threshold": 0.5, "site": "layer 3"}}, "condition.site", "resid_post.14"),
        (
            {"condition": {"artifact": "mood", "threshold": 0.5, "site": "mlp_out.3", "scope": "sequence"}},
            "condition.site",
            "not for mlp_out",
        ),
        (
            {"condition": {"artifact": "mood", "threshold": 0.5, "site": "resid_post.3", "layer": 3}},
            "condition.site",
            "leave one",
        ),
    ],
)
def test_options_that_do_not_fit_name_their_field(
    store: Store, steerer: Steerer, intervention: dict[str, Any], param: str, word: str
) -> None:
    publish(store)
    publish(store, "narrow", {(2, None): np.ones(HIDDEN, np.float32)})
    publish(store, "elsewhere", point="mlp_out")
    publish_neurons(store, 1)
    publish_map(store)
    publish_sae(store)
    refused(steerer, 422, f"steering.interventions.1.{param}", word, {}, intervention)


def test_features_of_a_sae_with_several_layers_belong_to_one(store: Store, steerer: Steerer) -> None:
    publish_sae(store, (2, 3))
    features = {"artifact": "sae", "features": [FEATURE]}
    refused(steerer, 422, f"{FIRST}.layers", "choose one", features)
    assert prepare(steerer, features | {"layers": [3]}).program.edits[0].layers == (3,)


def test_unknown_artifact_of_a_condition_names_it(store: Store, steerer: Steerer) -> None:
    publish(store)
    with pytest.raises(ArtifactNotFound) as error:
        prepare(steerer, {"condition": {"artifact": "nobody", "threshold": 0.5}})
    assert error.value.param == f"{FIRST}.condition.artifact"
