from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from methods.shared_neurons import CATEGORIES
from server.fit_methods.base import Activations, Capture, Context, FitError, Fitted, ModelShape
from server.fit_methods.registry import parse_spec, untagged
from server.fits import run_fit
from steering_store import Store
from tests.server.engine.hooks import activations as of_transformers
from tests.server.test_fit_jobs import FakeEngine, identity
from tests.server.test_model_weights import POINTS, saved

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
    return {"method": "shared_neurons", "name": "x", "inputs": inputs, "options": {"active": "written"} | options}


def fit(**options: Any) -> Fitted:
    spec = parse_spec(body(**options))
    # A job is read from disk before it runs.
    assert (again := parse_spec(spec.model_dump(mode="json"))) == spec and again.data_digest() == spec.data_digest()
    spec = again
    assert [each.field for each in spec.texts()[:2]] == ["inputs.0.texts.de", "inputs.0.texts.en"]
    return fitted(spec, {"mlp_act": activations()}, "nowhere to be found")


def fitted(spec: Any, pooled: dict[Any, np.ndarray], model_path: str) -> Fitted:
    context: Any = Context(MODEL, lambda done, total: None, *[None] * 4, None, model_path)  # type: ignore[arg-type]
    steps = spec.steps(context)
    wanted = next(steps)
    assert isinstance(wanted, Capture) and set(wanted.wanted.points) == pooled.keys()
    with pytest.raises(StopIteration) as end:
        steps.send(Activations(pooled, {}, {}))
    found: Fitted = end.value.value
    return found


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


TEXTS = 2 * len(LANGUAGES)


def of_a_model(family: str, folder: Path) -> tuple[dict[Any, np.ndarray], np.ndarray, np.ndarray]:
    """The last tokens' activations of made-up texts in a real model, by point, its gates [texts, layers, neurons], and
    the length of what each neuron adds to the stream [layers, neurons].
    """
    model, gates = saved(family, folder), []
    layers = model.model.layers
    for layer in layers:
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, output: gates.append(output[0, -1].detach().numpy())
        )
    seen = [of_transformers(model, POINTS, [1 + index, 7, 3 * index + 2]) for index in range(TEXTS)]
    pooled = {
        point: np.stack(
            [[each[point, n][-1].numpy() for n in range(1 if point == "resid_pre" else len(layers))] for each in seen]
        )
        for point in POINTS
    }
    writes = np.empty((len(layers), pooled["mlp_act"].shape[2]))
    for number, layer in enumerate(layers):
        columns = layer.mlp.down_proj.weight.detach().numpy().astype(float)
        if family == "gemma3":
            columns = (1 + layer.post_feedforward_layernorm.weight.detach().numpy())[:, None] * columns
        writes[number] = np.sqrt((columns**2).sum(0))
    return pooled, np.array(gates).reshape(TEXTS, len(layers), -1), writes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gates_decide_and_what_is_written_contributes(family: str, tmp_path: Path) -> None:
    pooled, gates, writes = of_a_model(family, tmp_path)
    count = len(LANGUAGES)
    spec = parse_spec(body(active="gate", category="all_shared", share=0.5) | {"inputs": body()["inputs"][:2]})
    found = fitted(spec, pooled, str(tmp_path))
    active = (gates > 0).reshape(2, count, *gates.shape[1:]).sum(1)  # [inputs, layers, neurons]
    kinds = np.select([active == count, active > 1, active == 1], [0, 1, 2], 3)
    size = np.abs(pooled["mlp_act"]).reshape(2, count, *gates.shape[1:]) * writes
    for layer in range(gates.shape[1]):
        expected = np.flatnonzero((kinds[:, layer] == 0).mean(0) >= 0.5)
        assert found.tensors[layer, None].tolist() == expected.tolist()
        for index, category in enumerate(CATEGORIES):
            shares = [
                size[i, p, layer][kinds[i, layer] == index].sum() / size[i, p, layer].sum()
                for i in range(2)
                for p in range(count)
            ]
            assert found.metrics[f"contribution.{category}.{layer}"] == pytest.approx(np.mean(shares), abs=1e-5)
            assert found.metrics[f"share.{category}.{layer}"] == pytest.approx((kinds[:, layer] == index).mean())
    assert found.metrics["gates_error"] < 1e-3 and found.config["gated"]
    by_what_is_written = fitted(
        parse_spec(body(share=0.5) | {"inputs": body()["inputs"][:2]}), {"mlp_act": pooled["mlp_act"]}, str(tmp_path)
    )
    assert by_what_is_written.tensors[0, None].tolist() != found.tensors[0, None].tolist()


def test_gates_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    pooled, _, _ = of_a_model("llama", tmp_path)
    spec = parse_spec(body(active="gate") | {"inputs": body()["inputs"][:2]})
    with pytest.raises(FitError, match="layer 1 is built otherwise") as refused:
        fitted(spec, pooled | {"attn_out": pooled["attn_out"] * np.float32([[[1], [3], [1]]])}, str(tmp_path))
    assert refused.value.field == "options.active"
    with pytest.raises(FitError, match="on this machine; use written"):
        fitted(spec, pooled, "nowhere to be found")


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
        (body(active="up"), "options.active"),
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
