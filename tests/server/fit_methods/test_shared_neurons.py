from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from server.fit_methods.base import Activations, FitError, Fitted, ModelShape
from server.fit_methods.registry import parse_spec, untagged
from server.fits import run_fit
from steering_store import Store
from tests.server.test_fit_jobs import FakeEngine, identity

LANGUAGES, INPUTS, LAYERS, NEURONS = ("de", "en", "sw"), 4, 3, 20
MODEL = ModelShape(LAYERS, 2, {"mlp_act": NEURONS})


def activations() -> np.ndarray:
    """[texts, layers, neurons]: 6 neurons shared by all, 5 by two, 4 German, 5 never active."""
    sign = -np.ones((len(LANGUAGES), NEURONS), np.float32)
    sign[:, :6], sign[1:, 6:11], sign[0, 11:15] = 1, 1, 1
    size = np.random.default_rng(0).uniform(0.1, 1, (INPUTS, len(LANGUAGES), LAYERS, NEURONS)).astype(np.float32)
    return (size * sign[:, None]).reshape(-1, LAYERS, NEURONS)


def body(**options: Any) -> dict[str, Any]:
    inputs = [{"texts": {language: f"{language} {i}" for language in LANGUAGES}} for i in range(INPUTS)]
    return {"method": "shared_neurons", "name": "x", "inputs": inputs, "options": options}


def fit(**options: Any) -> Fitted:
    spec = parse_spec(body(**options))
    # A job is read from disk before it runs.
    assert (again := parse_spec(spec.model_dump(mode="json"))) == spec and again.data_digest() == spec.data_digest()
    spec = again
    assert [each.field for each in spec.texts()[:2]] == ["inputs.0.texts.de", "inputs.0.texts.en"]
    return spec.fit(Activations({"mlp_act": activations()}, {}, {}), MODEL, lambda done, total: None)


@pytest.mark.parametrize(
    ("category", "neurons"),
    [("all_shared", range(6)), ("partial_shared", range(6, 11)), ("specific", range(11, 15))],
)
def test_a_category_becomes_a_neuron_set_that_deactivates_it(category: str, neurons: range) -> None:
    fitted = fit(category=category)
    assert (fitted.kind, fitted.point, fitted.default_strength) == ("neuron_set", "mlp_act", -1.0)
    assert [fitted.tensors[layer, None].tolist() for layer in range(LAYERS)] == [list(neurons)] * LAYERS
    assert fitted.metrics[category] == pytest.approx(len(neurons) / NEURONS)
    by_layer = [fitted.metrics[f"share.{category}.{layer}"] for layer in range(LAYERS)]
    assert by_layer == pytest.approx([len(neurons) / NEURONS] * LAYERS)
    assert fitted.metrics["neurons"] == LAYERS * len(neurons) and list(fitted.languages) == list(LANGUAGES)


def test_its_control_is_as_large_and_says_its_seed() -> None:
    own, control = fit(), fit(control=7)
    assert [each.size for each in own.tensors.values()] == [each.size for each in control.tensors.values()]
    assert control.seed == 7 and any((own.tensors[key] != control.tensors[key]).any() for key in own.tensors)


def test_clas_scales_partial_up_and_specific_down() -> None:
    fitted = fit(form="clas", beta=0.5, gamma=0.25)
    assert fitted.default_strength == 1.0
    assert fitted.tensors[1, None].tolist() == list(range(6, 15))
    assert fitted.tensors[1, "weights"].tolist() == [0.5] * 5 + [-0.25] * 4


def test_a_strength_of_ones_own_is_kept() -> None:
    assert fit(default_strength=1.0).default_strength == 1.0
    assert fit(form="clas", default_strength=0.5).default_strength == 0.5


def test_a_set_without_neurons_is_refused() -> None:
    with pytest.raises(FitError, match="no neuron") as refused:
        fit(category="specific", threshold=5.0)
    assert refused.value.field == "options.share"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (body(form="clas", category="specific"), "options"),
        (body(beta=0.3), "options"),
        (body(share=0.0), "options.share"),
        (body() | {"inputs": [{"texts": {"en": "one"}}]}, "inputs.0.texts"),
        (body() | {"inputs": [{"texts": {"en": "a", "de": "b"}}, {"texts": {"en": "a", "fr": "b"}}]}, ""),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_field(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_spec(wrong)
    assert ".".join(map(str, untagged(refused.value.errors()[0])["loc"])) == field


@pytest.mark.parametrize(("options", "tensors"), [({"share": 0.1}, 1), ({"form": "clas", "share": 0.4}, 2)])
def test_it_is_published_as_a_neuron_set_of_its_languages(
    tmp_path: Path, options: dict[str, Any], tensors: int
) -> None:
    inputs = [{"texts": {"de": f"eins {i}", "en": f"one {i}"}} for i in range(6)]
    spec = parse_spec(body(**options) | {"inputs": inputs})
    engine: Any = FakeEngine()
    made = run_fit(spec, engine, Store(tmp_path), identity(), datetime.now(UTC), lambda done, total: None)
    manifest = asyncio.run(made).version.manifest
    assert manifest.kind == "neuron_set" and manifest.point == "mlp_act"
    assert len(manifest.sites) == tensors * len(manifest.layers)
    assert manifest.languages == ["de", "en"] and manifest.default_layers == manifest.layers
