"""From the steering field to a program: artifacts, points, conditions and refusals."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest

from server.api.errors import ApiError
from server.api.steering import Steerer
from server.api.steering_schema import LAST_PROMPT_TOKEN, Apply, parse
from server.engine.edits import Condition, Edit, Program
from server.engine.spans import Span
from steering_store import Store
from steering_store.errors import ArtifactNotFound, InvalidName
from tests.server.api.published import (
    FIRST,
    HIDDEN,
    LAYERS,
    NEURONS,
    OTHERS,
    SITES,
    prepare,
    publish,
    refusal,
    refused,
    vectors,
)


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


def test_what_is_not_known_here_is_looked_for_elsewhere_while_other_requests_go_on(
    store: Store, steerer: Steerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on, looks = Event(), []

    def learn() -> None:
        assert going_on.wait(60), "the event loop waits for another machine"
        looks.append("mood")
        publish(store)

    monkeypatch.setattr(store, "learn", learn)
    raw = {"interventions": [{"artifact": "mood"}]}

    async def ask() -> None:
        looking = asyncio.create_task(steerer.look_up_and_prepare(raw))
        await asyncio.sleep(0)
        going_on.set()
        assert (await looking).program.edits == prepare(steerer).program.edits
        await steerer.look_up_and_prepare(raw)
        with pytest.raises(InvalidName):
            await steerer.look_up_and_prepare({"interventions": [{"artifact": "a b"}]})

    asyncio.run(ask())
    assert looks == ["mood"], "what is known, or can't be, isn't looked for"


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
