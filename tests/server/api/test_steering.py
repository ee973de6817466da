from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from server.api.errors import ApiError
from server.api.steering import Apply, Prepared, Steerer, parse
from server.engine.edits import Edit, Program, Span
from server.models import ModelIdentity
from steering_store import ArtifactVersion, Store
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidName

HIDDEN, LAYERS, SITES = 8, 6, (2, 3, 5)
OURS, OTHERS = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FILE = "vectors.safetensors"
NOWHERE = Span(prompt=False, generation=False)


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
    return Steerer(store, identity, LAYERS, HIDDEN, max_interventions=3, max_strength=100.0, model_match="weights")


def vectors(fill: float = 1.0) -> dict[str, np.ndarray]:
    return {f"v{layer}": np.full(HIDDEN, fill * layer, np.float32) for layer in SITES}


def publish(store: Store, name: str = "mood", fill: float = 1.0, **changes: Any) -> ArtifactVersion:
    place = {"point": "resid_post", "file": FILE, "shape": [HIDDEN], "dtype": "F32"}
    model = {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS}
    manifest = {
        "schema_version": 1,
        "kind": "steering_vector",
        "model": model | {"weights_digest": OURS} | changes.pop("model", {}),
        # Out of order, as a client may write them.
        "sites": [place | {"layer": layer, "tensor": f"v{layer}"} for layer in reversed(SITES)],
        "default_strength": 4.0,
        "h_norm": {str(layer): 10.0 for layer in SITES},
        "provenance": {"method": "caa"},
    }
    return store.publish(name, manifest | changes, {FILE: save(vectors(fill))}).version


def prepare(steerer: Steerer, *interventions: dict[str, Any]) -> Prepared:
    return steerer.prepare({"interventions": [{"artifact": "mood"} | each for each in interventions or ({},)]})


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
    assert prepared.artifacts == {version.digest: version}
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
    assert list(prepared.artifacts) == [version.digest]


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
    assert len(prepare(steerer, {}, {}, {}).program.edits) == 3
    with pytest.raises(ApiError, match="at most 3") as error:
        prepare(steerer, {}, {}, {}, {})
    assert error.value.param == "steering.interventions"


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
    steerer.model_match = "shape"
    publish(store, model={"weights_digest": OTHERS})
    assert prepare(steerer).applied[0].version == 1
    publish(store, model={"weights_digest": OTHERS, "architecture": "Gemma3ForCausalLM"})
    with pytest.raises(ApiError, match="architecture"):
        prepare(steerer)


def test_vectors_come_in_the_order_of_their_layers(store: Store, steerer: Steerer) -> None:
    layers, data = asyncio.run(steerer.vectors(publish(store)))
    assert layers == list(SITES)
    np.testing.assert_array_equal(data, np.stack([np.full(HIDDEN, layer, np.float32) for layer in SITES]))


def test_damaged_vectors_are_refused(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    store.file_path(version, FILE).write_bytes(save(vectors(fill=9.0)))
    with pytest.raises(CorruptArtifact):
        asyncio.run(steerer.vectors(version))


def test_receipt_holds_the_counts_and_the_largest_dose(store: Store, steerer: Steerer) -> None:
    version = publish(store)
    prepared = prepare(steerer, {"strength": -2, "layers": [2, 3]}, {"strength": 0.5, "op": "add_norm"})
    asyncio.run(steerer.vectors(version))
    touched = [[0, 0, 7, 7, 0, 0], [0, 0, 4, 4, 0, 4]]
    receipt = steerer.receipt(prepared, touched, [3, 0])
    assert receipt.fingerprint == prepared.program.fingerprint
    first, second = receipt.applied
    assert (first.tokens_touched, first.tokens_from_cache) == (7, 3)
    assert first.relative_dose == pytest.approx(2 * 3 * np.sqrt(HIDDEN) / 10, rel=1e-5)
    assert (second.tokens_touched, second.tokens_from_cache, second.relative_dose) == (4, 0, 0.5)


def test_receipt_counts_the_site_that_was_touched_least(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, {"layers": [2, 3]})
    assert steerer.receipt(prepared, [[9, 9, 5, 4, 9, 9]], [0]).applied[0].tokens_touched == 4


def test_dose_is_null_unless_every_layer_has_a_norm(store: Store, steerer: Steerer) -> None:
    version = publish(store, h_norm={"2": 10.0})
    asyncio.run(steerer.vectors(version))
    assert steerer.receipt(prepare(steerer), [[1] * LAYERS], [0]).applied[0].relative_dose is None
    assert steerer.receipt(prepare(steerer, {"layers": [2]}), [[1] * LAYERS], [0]).applied[0].relative_dose is not None
