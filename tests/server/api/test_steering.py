from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from server.api.doses import Doses
from server.api.errors import ApiError
from server.api.prepared import Prepared
from server.api.served import ServedModel
from server.api.steering import Steerer
from server.api.steering_schema import LAST_PROMPT_TOKEN, Apply, parse
from server.engine.edits import OPCODES, Condition, Edit, Function, Program
from server.engine.operands import Operand
from server.engine.spans import Span
from server.models import ModelIdentity
from steering_store import ArtifactVersion, Store
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidName

HIDDEN, NEURONS, LAYERS, SITES = 8, 12, 6, (2, 3, 5)
OURS, OTHERS = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FILE = "vectors.safetensors"
FIRST = "steering.interventions.0"
DTYPES = {"float32": "F32", "int64": "I64"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def steerer(store: Store) -> Steerer:
    identity = ModelIdentity(
        architecture="LlamaForCausalLM",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        vocab_size=16,
        tokenizer_digest=None,
        weights_digest=OURS,
    )
    points = {
        "resid_post": {"width": HIDDEN, "opcodes": OPCODES, "shards": 1, "reason": None},
        "mlp_out": {"width": HIDDEN, "opcodes": OPCODES, "shards": 1, "reason": None},
        "attn_out": {
            "width": 0,
            "opcodes": (),
            "shards": 1,
            "reason": "it isn't installed: name it in POLYHELM_POINTS",
        },
        "mlp_act": {"width": NEURONS, "opcodes": ("add", "scale", "set"), "shards": 2, "reason": "it is split"},
    }
    model = ServedModel(identity, LAYERS, HIDDEN, points, "weights")
    return Steerer(store, model, max_edits=6, max_strength=100.0, doses=Doses())


def vectors(fill: float = 1.0) -> dict[tuple[int, str | None], np.ndarray]:
    # Out of order, as a client may write them.
    return {(layer, None): np.full(HIDDEN, fill * layer, np.float32) for layer in reversed(SITES)}


def publish(
    store: Store,
    name: str = "mood",
    tensors: dict[tuple[int, str | None], np.ndarray] | None = None,
    point: str = "resid_post",
    **changes: Any,
) -> ArtifactVersion:
    """Publish tensors, by layer and role; a steering_vector unless told otherwise."""
    tensors = tensors or vectors()
    names = {key: f"{key[0]}.{key[1]}" for key in tensors}
    sites = [
        {
            "point": point,
            "layer": layer,
            "role": role,
            "file": FILE,
            "tensor": names[layer, role],
            "shape": list(tensor.shape),
            "dtype": DTYPES[tensor.dtype.name],
        }
        for (layer, role), tensor in tensors.items()
    ]
    model = {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS}
    manifest = {
        "schema_version": 1,
        "kind": "steering_vector",
        "model": model | {"weights_digest": OURS, "widths": {"mlp_act": NEURONS}} | changes.pop("model", {}),
        "sites": sites,
        "default_strength": 4.0,
        "h_norm": {str(layer): 10.0 for layer in SITES},
        "provenance": {"method": "caa"},
    }
    file = save({names[key]: tensor for key, tensor in tensors.items()})
    return store.publish(name, manifest | changes, {FILE: file}).version


def publish_sae(store: Store, layers: tuple[int, ...] = (3,), **changes: Any) -> ArtifactVersion:
    rng = np.random.default_rng(0)
    tensors: dict[tuple[int, str | None], np.ndarray] = {}
    for layer in layers:
        for role in ("encoder", "decoder"):
            tensors[layer, role] = rng.standard_normal((20, HIDDEN)).astype(np.float32)
        tensors[layer, "encoder_bias"] = np.zeros(20, np.float32)
    return publish(store, "sae", tensors, **({"kind": "sae", "activation": "relu", "default_strength": 1.0} | changes))


def publish_neurons(store: Store, *indices: int, name: str = "neurons", point: str = "mlp_act") -> ArtifactVersion:
    return publish(store, name, {(2, None): np.array(indices, np.int64)}, point, kind="neuron_set")


def publish_map(store: Store) -> ArtifactVersion:
    maps = {(layer, "matrix"): np.full((HIDDEN, HIDDEN), float(layer), np.float32) for layer in SITES}
    return publish(store, "map", maps, kind="linear_map")  # type: ignore[arg-type]


def prepare(steerer: Steerer, *interventions: dict[str, Any], **fields: Any) -> Prepared:
    return steerer.prepare({"interventions": [{"artifact": "mood"} | each for each in interventions or ({},)]} | fields)


def refused(
    steerer: Steerer, status: int, param: str, word: str, *interventions: dict[str, Any], **fields: Any
) -> None:
    with pytest.raises(ApiError) as error:
        prepare(steerer, *interventions, **fields)
    assert (error.value.status, error.value.param) == (status, param), error.value.message
    assert word in error.value.message


def load(prepared: Prepared, key: str | None) -> Operand:
    assert key is not None
    return asyncio.run(prepared.operands[key]())  # type: ignore[arg-type]


def tensor(operand: Operand, layer: int, role: str) -> np.ndarray:
    (piece,) = (piece for piece in operand.pieces if (piece.layer, piece.role) == (layer, role))
    return operand.data[piece.start : piece.start + int(np.prod(piece.shape))].reshape(piece.shape)


def receipt(steerer: Steerer, prepared: Prepared, touched: int = 1) -> Any:
    asyncio.run(steerer.check(prepared))
    counts = [[touched] * len(edit.layers) for edit in prepared.program.edits]
    return steerer.receipt(prepared, counts, [0] * len(counts))


def refusal(raw: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(raw)
    assert error.value.status == 422
    return error.value


@pytest.mark.parametrize(
    ("fields", "span"),
    [
        ({}, Span()),
        ({"prompt": None}, Span()),
        ({"prompt": "all"}, Span(generation=False)),
        ({"generation": "all"}, Span(prompt=False)),
        ({"prompt": "all", "generation": "all"}, Span()),
        ({"prompt_positions": [-1, 0, -1]}, Span(False, False, prompt_positions=(-1, 0))),
        ({"prompt_window": [1, None]}, Span(False, False, prompt_window=(1, None))),
        ({"prompt_window": [-4, -1]}, Span(False, False, prompt_window=(-4, -1))),
        ({"prompt_window": [0, -1]}, Span(False, False, prompt_window=(0, -1))),
        ({"generation_window": [2, 5]}, Span(False, False, generation_window=(2, 5))),
        ({"prompt": "all", "generation_window": [2, 5]}, Span(True, False, generation_window=(2, 5))),
        ({"exclude_prompt_positions": [0]}, Span(exclude_prompt_positions=(0,))),
        ({"exclude_prompt_window": [0, 4]}, Span(exclude_prompt_window=(0, 4))),
        ({"exclude_generation_window": [0, None]}, Span(exclude_generation_window=(0, None))),
        (
            {"generation": "all", "exclude_generation_window": [0, 2]},
            Span(prompt=False, exclude_generation_window=(0, 2)),
        ),
    ],
)
def test_apply_says_which_tokens(fields: dict[str, Any], span: Span) -> None:
    read = parse({"interventions": [{"artifact": "mood", "apply": json.loads(json.dumps(fields))}]})
    assert read.interventions[0].apply.span() == span


def test_excludes_alone_leave_everything_else_in(steerer: Steerer) -> None:
    assert Apply(exclude_prompt_positions=[0]).span().intervals(3)[0] == (1, Span().intervals(3)[0][1])


@pytest.mark.parametrize(
    ("apply", "param"),
    [
        ({"prompt_window": [5, 5]}, "apply"),
        ({"prompt_window": [-1, -3]}, "apply"),
        ({"exclude_generation_window": [7, 3]}, "apply"),
        ({"prompt_window": [7]}, "apply.prompt_window.1"),
        ({"prompt_window": [1, 2, 3]}, "apply.prompt_window"),
        ({"prompt_window": {"start": 1}}, "apply.prompt_window"),
        ({"generation_window": [-1, 4]}, "apply.generation_window.0"),
        ({"prompt_positions": [1 << 40]}, "apply.prompt_positions.0"),
        ({"prompt_positions": [True]}, "apply.prompt_positions.0"),
        ({"prompt": "some"}, "apply.prompt"),
        ({"promt": "all"}, "apply.promt"),
        (None, "apply"),
    ],
)
def test_bad_span_names_its_field(apply: Any, param: str) -> None:
    error = refusal({"interventions": [{"artifact": "mood"}, {"artifact": "mood", "apply": apply}]})
    assert error.param == f"steering.interventions.1.{param}"
    assert error.message.startswith(error.param)


@pytest.mark.parametrize("raw", ["on", [], 1, True, {}, {"interventions": []}, {"interventions": {}}])
def test_what_is_not_a_list_of_interventions_is_refused(raw: Any) -> None:
    assert str(refusal(raw).param).startswith("steering")


def test_artifact_strength_and_layers_become_an_edit(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    span = Span(generation=False)
    prepared = prepare(steerer, {"strength": -2, "layers": [5, 2, 5], "op": "add_norm", "apply": {"prompt": "all"}})
    assert prepared.program == Program((Edit("add_norm", version.digest, (2, 5), -2.0, span),))
    assert list(prepared.operands) == [version.digest]
    assert prepared.owners == (0,)
    (applied,) = prepared.applied
    assert (applied.artifact, applied.version, applied.digest) == ("mood", 1, version.digest)
    assert (applied.sites, applied.strength, applied.op) == (["resid_post.2", "resid_post.5"], -2.0, "add_norm")


def test_defaults_are_the_artifacts(store: Store, steerer: Steerer) -> None:
    publish(store)
    (edit,) = prepare(steerer).program.edits
    assert (edit.layers, edit.strength, edit.opcode, edit.span) == (SITES, 4.0, "add", Span())
    publish(store, default_layers=[3], default_strength=1.5)
    (edit,) = prepare(steerer).program.edits
    assert (edit.layers, edit.strength) == ((3,), 1.5)


def test_strength_zero_is_not_the_default(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert prepare(steerer, {"strength": 0}).program.edits[0].strength == 0.0


def test_equal_requests_have_one_fingerprint_and_receipts_of_their_own(store: Store, steerer: Steerer) -> None:
    publish(store)
    first, second = prepare(steerer, {"strength": 2}), prepare(steerer, {"artifact": "mood@1", "strength": 2.0})
    assert first.program.fingerprint == second.program.fingerprint
    assert first.receipt != second.receipt
    assert prepare(steerer, {"strength": 2.5}).program.fingerprint != first.program.fingerprint


def test_one_artifact_twice_is_two_edits_of_one_operand(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    prepared = prepare(steerer, {"strength": 1}, {"strength": 2})
    assert [edit.strength for edit in prepared.program.edits] == [1.0, 2.0]
    assert list(prepared.operands) == [version.digest]
    assert prepared.owners == (0, 1)


@pytest.mark.parametrize(
    ("field", "value", "param", "word"),
    [
        ("strength", float("nan"), "strength", "finite"),
        ("strength", float("-inf"), "strength", "finite"),
        ("strength", 100.5, "strength", "at most 100"),
        ("strength", -100.5, "strength", "at most 100"),
        ("layers", [2, 4], "layers", "[4]"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    store: Store, steerer: Steerer, field: str, value: Any, param: str, word: str
) -> None:
    publish(store)
    with pytest.raises(ApiError, match=r".") as error:
        prepare(steerer, {}, {field: value})
    assert (error.value.status, error.value.param) == (422, f"steering.interventions.1.{param}")
    assert word in error.value.message


def test_too_many_interventions_are_refused(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert len(prepare(steerer, *[{}] * 6).program.edits) == 6
    refused(steerer, 422, "steering.interventions", "7 interventions: a request takes at most 6", *[{}] * 7)


@pytest.mark.parametrize(("reference", "error"), [("nobody", ArtifactNotFound), ("../mood", InvalidName)])
def test_artifact_that_is_not_there_names_its_intervention(
    store: Store, steerer: Steerer, reference: str, error: type[Exception]
) -> None:
    publish(store)
    with pytest.raises(error) as raised:
        prepare(steerer, {}, {"artifact": reference})
    assert raised.value.param == "steering.interventions.1.artifact"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ({"architecture": "Gemma3ForCausalLM"}, "architecture"),
        ({"num_layers": LAYERS + 1}, "number of layers"),
        ({"weights_digest": OTHERS}, "weights"),
    ],
)
def test_artifact_of_another_model_is_409(store: Store, steerer: Steerer, model: dict[str, Any], word: str) -> None:
    publish(store, model=model)
    with pytest.raises(ApiError, match=word) as error:
        prepare(steerer)
    assert (error.value.status, error.value.param) == (409, "steering.interventions.0.artifact")


def test_matching_by_shape_takes_other_weights_but_no_other_architecture(store: Store, steerer: Steerer) -> None:
    steerer.model = replace(steerer.model, model_match="shape")
    publish(store, model={"weights_digest": OTHERS})
    assert prepare(steerer).applied[0].version == 1
    publish(store, model={"weights_digest": OTHERS, "architecture": "Gemma3ForCausalLM"})
    with pytest.raises(ApiError, match="architecture"):
        prepare(steerer)


# ---- the kinds, and what their options become


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


FEATURE = {"index": 1, "op": "ablate"}


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


# ---- points


def test_point_that_is_not_installed_is_400_and_names_the_setting(store: Store, steerer: Steerer) -> None:
    publish(store, point="attn_out")
    refused(steerer, 400, f"{FIRST}.artifact", "POLYHELM_POINTS")
    publish(store, model={"widths": {"head_out": HIDDEN}}, point="head_out")
    refused(steerer, 400, f"{FIRST}.artifact", "POLYHELM_POINTS")


def test_opcode_that_a_point_lacks_is_400_with_the_reason(store: Store, steerer: Steerer) -> None:
    tensors: Any = {(2, None): np.ones(NEURONS, np.float32)}
    publish(store, tensors=tensors, point="mlp_act")
    assert prepare(steerer).program.edits[0].point == "mlp_act"
    refused(steerer, 400, f"{FIRST}.artifact", "can't do rank: it is split", {"op": "ablate"})
    refused(steerer, 400, f"{FIRST}.artifact", "can't do renorm", {"renorm": True})
    refused(steerer, 400, f"{FIRST}.condition.artifact", "gate", {"condition": {"artifact": "mood", "threshold": 0.5}})


def test_artifact_of_another_width_is_409(store: Store, steerer: Steerer) -> None:
    tensors: Any = {(2, None): np.ones(9, np.float32)}
    publish(store, tensors=tensors, point="mlp_act", model={"widths": {"mlp_act": 9}})
    refused(steerer, 409, f"{FIRST}.artifact", "9 wide there, and 12 here")


# ---- conditions and renorm


def test_condition_for_tokens_is_a_gate_where_the_intervention_acts(store: Store, steerer: Steerer) -> None:
    version, when = publish(store), publish(store, "when", vectors(2.0))
    condition = {"artifact": "when", "threshold": 0.25, "readout": "dot", "above": False}
    prepared = prepare(
        steerer, {}, {"layers": [2, 3], "condition": condition, "renorm": True, "apply": {"prompt": "all"}}
    )
    span = Span(generation=False)
    assert prepared.program.edits[1:] == (
        Edit("gate", when.digest, (2, 3), span=span, condition=Condition("dot", 0.25, above=False)),
        Edit("add", version.digest, (2, 3), 4.0, span, gate=1),
        Edit("renorm", None, (2, 3), span=span, gate=1),
    )
    assert prepared.owners == (0, 1, 1, 1)
    assert prepared.applied[1].condition == f"when@{when.digest}"
    assert set(prepared.operands) == {version.digest, when.digest}


@pytest.mark.parametrize("place", [{"layer": 2}, {"site": "resid_post.2"}, {"site": "blocks.2.hook_resid_post"}])
def test_condition_for_the_sequence_is_read_at_one_layer(store: Store, steerer: Steerer, place: dict[str, Any]) -> None:
    version = publish(store)
    condition = {"artifact": "mood", "threshold": 0.5, "scope": "sequence"} | place
    gate, add = prepare(steerer, {"layers": [3, 5], "condition": condition}).program.edits
    assert gate == Edit(
        "gate", version.digest, (2,), span=LAST_PROMPT_TOKEN, condition=Condition("cosine", 0.5, True, "sequence")
    )
    assert (add.gate, add.layers) == (0, (3, 5))


def test_condition_for_the_sequence_may_be_read_at_another_point(store: Store, steerer: Steerer) -> None:
    publish(store)
    publish(store, "elsewhere", point="mlp_out")
    condition = {"artifact": "elsewhere", "threshold": 0.5, "scope": "sequence", "layer": 2}
    gate, _ = prepare(steerer, {"condition": condition}).program.edits
    assert (gate.point, gate.layers) == ("mlp_out", (2,))


def test_edits_that_an_intervention_brings_along_count(store: Store, steerer: Steerer) -> None:
    publish(store)
    gated = {"condition": {"artifact": "mood", "threshold": 0.5}, "renorm": True}
    assert len(prepare(steerer, gated, gated).program.edits) == 6
    refused(steerer, 422, "steering.interventions", "3 interventions make 7 edits", gated, gated, {})


# ---- frozen mode


def test_frozen_mode_puts_back_clean_activations_at_every_layer_first(store: Store, steerer: Steerer) -> None:
    publish(store)
    publish(store, "elsewhere", point="mlp_out")
    gated = {"artifact": "elsewhere", "layers": [3], "condition": {"artifact": "elsewhere", "threshold": 0.5}}
    prepared = prepare(steerer, {"layers": [2]}, gated, mode="frozen")
    assert prepared.frozen_sites == tuple((point, layer) for point in ("resid_post", "mlp_out") for layer in range(6))
    assert all(edit.span == LAST_PROMPT_TOKEN for edit in prepared.program.edits)
    clean = {site: np.full(HIDDEN, number, np.float32) for number, site in enumerate(prepared.frozen_sites)}
    final = prepared.with_clean(clean)
    first, second, *rest = final.program.edits
    assert (first.opcode, first.point, first.layers) == ("set", "resid_post", tuple(range(LAYERS)))
    assert (second.opcode, second.point, second.span) == ("set", "mlp_out", LAST_PROMPT_TOKEN)
    assert [edit.gate for edit in rest] == [None, None, 3]
    final.program.check()
    assert final.owners == (None, None, 0, 1, 1)
    for site, row in clean.items():
        edit = first if site[0] == "resid_post" else second
        np.testing.assert_array_equal(tensor(load(final, edit.operand), site[1], "vector"), row)
    counts = [[number] * len(edit.layers) for number, edit in enumerate(final.program.edits)]
    asyncio.run(steerer.check(prepared))
    said = steerer.receipt(prepared.with_clean(clean), counts, [0] * 5)
    assert said.mode == "frozen"
    assert [(edit.opcode, edit.tokens_touched) for edit in said.frozen] == [("set", 0), ("set", 1)]
    assert [[edit.tokens_touched for edit in each.edits] for each in said.applied] == [[2], [3, 4]]
    assert said.applied[0].relative_dose is not None


def test_clean_activations_share_a_key_exactly_when_they_are_equal(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, mode="frozen")

    def key(change: float, layer: int) -> str | None:
        rows = {site: np.ones(HIDDEN, np.float32) for site in prepared.frozen_sites}
        rows["resid_post", layer][0] += change
        return prepared.with_clean(rows).program.edits[0].operand

    assert key(0, 0) == key(0, 1)
    assert len({key(0, 0), key(1, 0), key(1, 1)}) == 3
    publish(store, "elsewhere", point="mlp_out")
    both = prepare(steerer, {}, {"artifact": "elsewhere"}, mode="frozen")
    first, second, *_ = both.with_clean({site: np.ones(HIDDEN, np.float32) for site in both.frozen_sites}).program.edits
    assert first.operand == key(0, 0) != second.operand


def test_loader_of_clean_activations_does_not_keep_them_alive(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, mode="frozen")
    final = prepared.with_clean({site: np.ones(HIDDEN, np.float32) for site in prepared.frozen_sites})
    loader = final.operands[final.program.edits[0].operand or ""]
    del final
    with pytest.raises(RuntimeError, match="has ended"):
        asyncio.run(loader())  # type: ignore[arg-type]


def test_frozen_mode_edits_the_last_prompt_token_only(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert prepare(steerer, {"apply": {"prompt_positions": [-1]}}, mode="frozen").frozen_sites
    for apply in ({}, {"prompt": "all"}, {"prompt_positions": [-1], "generation": "all"}):
        refused(steerer, 422, f"{FIRST}.apply", "last prompt token only", {"apply": apply}, mode="frozen")


def test_frozen_modes_own_edits_count(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert prepare(steerer, *[{}] * 5, mode="frozen").frozen_sites
    refused(steerer, 422, "steering.interventions", "6 interventions make 7 edits", *[{}] * 6, mode="frozen")


# ---- doses, conflicts, receipts


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


def conflict(steerer: Steerer, *interventions: dict[str, Any], lengths: tuple[int, ...] = (4,)) -> str | None:
    prepared = prepare(steerer, *interventions, conflict="error")
    try:
        asyncio.run(steerer.refuse_conflicts(prepared, lengths))
    except ApiError as error:
        assert (error.status, error.param) == (400, "steering.conflict")
        return error.message
    return None


def test_two_interventions_on_one_direction_of_a_site_are_a_conflict(store: Store, steerer: Steerer) -> None:
    publish(store)
    publish(store, "opposite", {(3, None): np.full(HIDDEN, -0.1, np.float32)})
    message = conflict(steerer, {}, {"artifact": "opposite"})
    assert message is not None and "interventions 0 and 1" in message and "resid_post.3" in message
    assert conflict(steerer, {"layers": [2]}, {"artifact": "opposite"}) is None
    assert conflict(steerer, {"op": "ablate"}, {"artifact": "opposite", "op": "add_norm"}) is not None


def test_different_directions_are_no_conflict_but_what_writes_everything_always_is(
    store: Store, steerer: Steerer
) -> None:
    publish(store)
    publish(store, "aside", {(3, None): np.array([1.0] * 7 + [1.01], np.float32)})
    publish_map(store)
    aside = {"artifact": "aside"}
    assert conflict(steerer, {}, aside) is None
    assert conflict(steerer, {"artifact": "map"}, aside) is not None
    assert conflict(steerer, {"op": "set"}, aside) is not None
    assert conflict(steerer, {"renorm": True}, aside) is not None
    assert conflict(steerer, {"renorm": True, "layers": [2]}, aside) is None
    assert conflict(steerer, {"artifact": "map", "strength": 0}, aside) is None


def test_tokens_that_only_one_of_them_touches_are_no_conflict(store: Store, steerer: Steerer) -> None:
    publish(store)
    prompt, answer = {"apply": {"prompt": "all"}}, {"apply": {"generation": "all"}}
    assert conflict(steerer, prompt, answer) is None
    first, last = {"apply": {"prompt_positions": [0]}}, {"apply": {"prompt_positions": [-1]}}
    assert conflict(steerer, first, last) is None
    assert conflict(steerer, first, last, lengths=(4, 1)) is not None


def test_neurons_and_axes_conflict_where_they_meet(store: Store, steerer: Steerer) -> None:
    publish_neurons(store, 0, 7, name="some")
    publish_neurons(store, 7, 9, name="others")
    publish_neurons(store, 8, name="apart")
    axis = np.zeros(NEURONS, np.float32)
    axis[7] = 3
    publish(store, "axis", {(2, None): axis}, "mlp_act")
    some = {"artifact": "some"}
    assert conflict(steerer, some, {"artifact": "others"}) is not None
    assert conflict(steerer, some, {"artifact": "apart"}) is None
    assert conflict(steerer, some, {"artifact": "axis"}) is not None
    assert conflict(steerer, {"artifact": "axis"}, {"artifact": "apart"}) is None


def test_features_of_two_interventions_conflict_and_of_one_do_not(store: Store, steerer: Steerer) -> None:
    publish_sae(store)

    def features(*indices: int) -> dict[str, Any]:
        return {"artifact": "sae", "features": [{"index": index, "op": "add", "value": 1.0} for index in indices]}

    assert conflict(steerer, features(1), {"artifact": "sae", "features": [FEATURE]}) is not None
    assert conflict(steerer, features(2), {"artifact": "sae", "features": [FEATURE]}) is None
    both = {"artifact": "sae", "features": [FEATURE, {"index": 2, "op": "add", "value": 1.0}]}
    assert conflict(steerer, both) is None


def test_field_at_fault_is_the_interventions_and_not_the_edits(store: Store, steerer: Steerer) -> None:
    publish(store)
    gated = {"condition": {"artifact": "mood", "threshold": 0.5}}
    prepared = prepare(steerer, gated, {})
    assert prepared.field_at_fault("steering.interventions.2.apply") == "steering.interventions.1.apply"
    assert prepared.field_at_fault("max_tokens") == "max_tokens"
    assert prepared.field_at_fault(None) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "cold"}, "steering.mode"),
        ({"conflict": "merge"}, "steering.conflict"),
        ({"max_relative_dose": -1.0}, "steering.max_relative_dose"),
        ({"max_relative_dose": float("inf")}, "steering.max_relative_dose"),
        ({"max_dose": 1.0}, "steering.max_dose"),
    ],
)
def test_bad_fields_of_steering_itself_are_named(fields: dict[str, Any], param: str) -> None:
    assert refusal({"interventions": [{"artifact": "mood"}]} | fields).param == param
