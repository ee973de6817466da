from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from methods import extractors
from server.engine.capture import CaptureSpec
from server.fit_methods.base import Activations, FitError, Fitted, ModelShape
from server.fit_methods.direction import DirectionSpec
from server.fit_methods.registry import parse_spec
from tests.server.test_fit_jobs import FakeEngine, stored
from tests.server.test_fits import fitted

PAIRS, LAYERS, HIDDEN = 30, 4, 8
MODEL = ModelShape(LAYERS, 2, {"resid_post": HIDDEN})


def activations(even: bool = False) -> np.ndarray:
    """[texts, layers, hidden], positive and negative in turn: apart along the last coordinate, or its square."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * PAIRS, LAYERS, HIDDEN)).astype(np.float32)
    if even:
        x[0::2, :, -1] = np.tile([5, -5], PAIRS // 2)[:, None]
    else:
        x[0::2, :, -1] += 4
    return x


def fit(x: np.ndarray, **options: Any) -> Fitted:
    pairs = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(PAIRS)]
    given = parse_spec({"method": "direction", "name": "x", "pairs": pairs, "options": options})
    # A job is read from disk before it runs.
    spec = parse_spec(given.model_dump(mode="json"))
    assert spec == given
    assert isinstance(spec, DirectionSpec) and len(spec.texts()) == len(x)
    return spec.fit(Activations({"resid_post": x}, {}, {}), MODEL, lambda done, total: None)


@pytest.mark.parametrize("extractor", ["mean_difference", "pca", "logistic", "rfm"])
def test_the_artifact_holds_the_extractors_vectors_and_a_condition(extractor: extractors.Extractor) -> None:
    x = activations()
    fitted = fit(x, extractor=extractor)
    expected = extractors.extract(x[0::2], x[1::2], extractors.Config(extractor))
    assert fitted.kind == "steering_vector" and list(fitted.default_layers) == [1]
    for layer in range(LAYERS):
        np.testing.assert_array_equal(fitted.tensors[layer, None], expected.vectors[layer])
    found = extractors.condition(x[0::2], x[1::2], expected.vectors)
    assert fitted.metrics["condition_threshold"] == found.threshold
    assert fitted.metrics["condition_layer"] == found.layer and fitted.metrics["condition_f1"] > 0.8
    assert fitted.metrics["correlation_best"] == pytest.approx(expected.correlations.max())


def test_a_vector_everywhere_is_one_layers_at_all() -> None:
    fitted = fit(activations(), everywhere=2)
    assert list(fitted.default_layers) == [0, 1, 2, 3]
    assert all((vector == fitted.tensors[2, None]).all() for vector in fitted.tensors.values())
    assert fitted.config["everywhere"] == 2
    with pytest.raises(FitError, match="isn't below") as refused:
        fit(activations(), everywhere=4)
    assert refused.value.field == "options.everywhere"


def test_a_concept_without_a_sign_is_refused() -> None:
    with pytest.raises(FitError, match="no defined sense") as refused:
        fit(activations(even=True), extractor="rfm")
    assert refused.value.field == "pairs"


class Apart(FakeEngine):
    """Good texts lie in another place."""

    async def run_capture(self, ids: list[int], spec: CaptureSpec, *, detokenize: bool) -> SimpleNamespace:
        run = await super().run_capture(ids, spec, detokenize=detokenize)
        for point, layer in spec.sites:
            row = run.tensors[f"{point}.{layer}"].numpy()
            run.tensors[f"{point}.{layer}"] = stored(row + np.float32(3 * (ids[0] == ord("g"))))
        return run


@pytest.mark.parametrize("extractor", ["logistic", "rfm"])
def test_it_is_published_with_what_decided_it(tmp_path: Path, extractor: str) -> None:
    pairs = [{"positive": f"good {i} {'!' * i}", "negative": f"bad {i}"} for i in range(12)]
    options = {"extractor": extractor, "default_layers": [0]}
    manifest = fitted(tmp_path, "direction", pairs, Apart(), options=options).manifest
    assert manifest.kind == "steering_vector" and manifest.default_layers == [0]
    assert manifest.provenance.config["extractor"] == extractor
    assert manifest.provenance.config["rfm"]["bandwidths"] == [0.5, 1.0, 2.0]
    assert 0 < manifest.metrics["condition_f1"] <= 1
