"""Neurons are chosen by what opens them, as in the paper; what they write has other differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from server.fit_methods.base import FitError, Fitted
from server.fit_methods.registry import parse_spec
from tests.server.fit_methods.test_shared_neurons import TEXTS, fitted, of_a_model

TOP_K = 9


def body(**options: Any) -> dict[str, Any]:
    pairs = [{"prompt": f"asked {i}", "positive": "yes", "negative": "no"} for i in range(TEXTS // 2)]
    return {"method": "sadi", "name": "x", "pairs": pairs, "options": {"component": "neurons"} | options}


def chosen(found: Fitted) -> set[tuple[int, int]]:
    return {(layer, i) for (layer, _), indices in found.tensors.items() for i in indices.tolist()}


def by_hand(values: np.ndarray) -> set[tuple[int, int]]:
    """The TOP_K largest signed mean differences over all layers, as (layer, neuron)."""
    difference = np.mean([values[i] - values[i + 1] for i in range(0, TEXTS, 2)], axis=0)
    best = np.argsort(difference.flatten())[-TOP_K:]
    return {(int(place) // difference.shape[1], int(place) % difference.shape[1]) for place in best}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_neurons_are_chosen_by_their_gates(family: str, tmp_path: Path) -> None:
    pooled, gates, _ = of_a_model(family, tmp_path)
    found = fitted(parse_spec(body(top_k=TOP_K)), pooled, str(tmp_path))
    assert chosen(found) == by_hand(gates) != by_hand(pooled["mlp_act"])
    assert (found.kind, found.point, found.config["by"]) == ("neuron_set", "mlp_act", "gate")
    assert found.metrics["gates_error"] < 1e-3
    only = {"mlp_act": pooled["mlp_act"]}
    written = fitted(parse_spec(body(top_k=TOP_K, by="written")), only, "nowhere to be found")
    assert chosen(written) == by_hand(pooled["mlp_act"]) and written.config["by"] == "written"


def test_the_fixed_form_is_made_by_what_neurons_write(tmp_path: Path) -> None:
    pooled, _, _ = of_a_model("llama", tmp_path)
    spec = parse_spec(body(top_k=TOP_K, form="fixed"))
    found = fitted(spec, {"mlp_act": pooled["mlp_act"]}, "nowhere to be found")
    assert {(layer, i) for (layer, _), v in found.tensors.items() for i in np.flatnonzero(v).tolist()} == by_hand(
        pooled["mlp_act"]
    )


def test_gates_that_cannot_be_worked_out_are_refused_with_the_remedy(tmp_path: Path) -> None:
    pooled, _, _ = of_a_model("llama", tmp_path)
    with pytest.raises(FitError, match="on this machine; use written") as refused:
        fitted(parse_spec(body()), pooled, "nowhere to be found")
    assert refused.value.field == "options.by"


@pytest.mark.parametrize("options", [{"component": "heads", "by": "gate"}, {"form": "fixed", "by": "gate"}])
def test_what_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="by "):
        parse_spec(body(**options))
