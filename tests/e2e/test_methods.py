"""Directions, shared neurons and LF-Steering on a real server in float32: what is captured with their artifacts at work
is what their formulas say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy

from methods import lf_steering
from methods.lf_steering import Features
from methods.sae import Array, Sae
from tests.e2e.test_opcodes import publish

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

LAYER = 11
PROMPT = "I watched the film last night and it was"
INPUTS = [
    {"texts": {"en": "The weather is nice", "de": "Das Wetter ist schön", "fr": "Il fait beau"}},
    {"texts": {"en": "Where is the station", "de": "Wo ist der Bahnhof", "fr": "Où est la gare"}},
    {"texts": {"en": "I have no time", "de": "Ich habe keine Zeit", "fr": "Je n'ai pas le temps"}},
]


@pytest.fixture(scope="module")
def exact(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("methods") / "data", "--dtype", "float32") as server:
        yield server


def captured(server: Server, site: str, *interventions: Mapping[str, Any]) -> Array:
    """[tokens, width] of the prompt but its first token, an attention sink."""
    body: dict[str, Any] = {"prompts": [PROMPT], "sites": [site], "positions": "all"}
    if interventions:
        body["steering"] = {"interventions": interventions}
    answer = server.client.post("/v1/activations", json=body)
    assert answer.status_code == 200, answer.text
    rows: Array = safetensors.numpy.load(answer.content)[f"0.{site}"][1:]
    return rows


def fit(server: Server, method: str, **fields: Any) -> dict[str, Any]:
    """The manifest of what was fitted, under the method's name."""
    name = method.replace("_", "-")
    response = server.client.post("/v1/fits", json={"method": method, "name": name} | fields)
    assert response.status_code == 202, response.text
    job = server.wait_for_fit(response.json()["id"], "succeeded", "failed")
    assert job["status"] == "succeeded", job["error"]
    manifest: dict[str, Any] = server.client.get(f"/v1/artifacts/{name}/versions/latest").json()["manifest"]
    return manifest


def test_a_direction_fitted_by_rfm_is_ablated_at_every_layer(exact: Server, pairs: list[dict[str, str]]) -> None:
    manifest = fit(exact, "direction", pairs=pairs, options={"extractor": "rfm", "everywhere": LAYER})
    assert manifest["default_layers"] == list(range(manifest["model"]["num_layers"]))
    assert manifest["metrics"]["condition_f1"] > 0.5
    content = exact.client.get("/v1/artifacts/direction/versions/latest/files/vectors.safetensors").content
    vectors = safetensors.numpy.load(content)
    unit = vectors["resid_post.5"] / np.linalg.norm(vectors["resid_post.5"])
    for layer in (5, LAYER):
        site = f"resid_post.{layer}"
        clean, ablated = captured(exact, site), captured(exact, site, {"artifact": "direction", "op": "ablate"})
        assert np.abs(clean @ unit).max() > 0.1
        np.testing.assert_allclose(ablated @ unit, 0, atol=1e-3)


def test_incline_of_the_embeddings_maps_what_the_first_layer_receives(exact: Server) -> None:
    pairs = [{"source": each["texts"]["de"], "target": each["texts"]["en"]} for each in INPUTS]
    options = {"source_language": "de", "component": "embedding", "pooling": "mean", "prior": "mean"}
    manifest = fit(exact, "incline", pairs=pairs, options=options)
    sites = {site["role"]: site for site in manifest["sites"]}
    assert {(site["point"], site["layer"]) for site in sites.values()} == {("resid_pre", 0)}
    assert manifest["default_layers"] == [0]
    file = exact.client.get(f"/v1/artifacts/incline/versions/latest/files/{sites['left']['file']}").content
    left, right, bias = (safetensors.numpy.load(file)[sites[role]["tensor"]] for role in ("left", "right", "bias"))
    clean = captured(exact, "resid_pre.0")
    steered = captured(exact, "resid_pre.0", {"artifact": "incline", "strength": 0.5})
    expected = clean + 0.5 * (clean @ (left @ right).T + bias)
    assert np.abs(expected - clean).max() > 1e-2
    np.testing.assert_allclose(steered, expected, atol=1e-5)


def test_shared_neurons_are_silent_when_their_category_is_deactivated(exact: Server) -> None:
    manifest = fit(exact, "shared_neurons", inputs=INPUTS, options={"share": 1.0})
    assert manifest["default_strength"] == -1 and manifest["languages"] == ["en", "de", "fr"]
    content = exact.client.get("/v1/artifacts/shared-neurons/versions/latest/files/neurons.safetensors").content
    neurons = safetensors.numpy.load(content)[f"mlp_act.{LAYER}"]
    width = manifest["model"]["widths"]["mlp_act"]
    assert 0 < len(neurons) < width / 2
    site = f"mlp_act.{LAYER}"
    silent = captured(exact, site, {"artifact": "shared-neurons", "layers": [LAYER]})
    expected = captured(exact, site)
    assert np.abs(expected[:, neurons]).max() > 0.01
    expected[:, neurons] = 0
    np.testing.assert_allclose(silent, expected, atol=1e-4)


@pytest.fixture(scope="module")
def sae(exact: Server) -> Sae:
    """Of random unit features, each of which fires on about half of the prompt's tokens."""
    x = captured(exact, f"resid_post.{LAYER}")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, x.shape[1])).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bias = rng.standard_normal(64).astype(np.float32)
    threshold = np.median(x @ rows.T + bias, axis=0).astype(np.float32) + np.float32(1e-2)
    return Sae("jumprelu", rows, bias, rows, x.mean(0), threshold=threshold)


def test_lf_steering_served_as_an_artifact_is_its_delta_form(exact: Server, sae: Sae) -> None:
    features = Features(np.array([3, 20, 41]), np.array([0.5, 1.0, 2.0], np.float32))
    site = f"resid_post.{LAYER}"
    x, rows = captured(exact, site), lf_steering.delta_rows(sae, features)
    expected = lf_steering.delta(sae, x, features, 4.0)
    tensors = {(LAYER, role): getattr(rows, role) for role in ("encoder", "encoder_bias", "threshold", "decoder")}
    publish(exact, "lf", "sae", "resid_post", tensors, activation="jumprelu")
    every = [{"index": index, "op": "scale", "value": 1.0} for index in range(len(rows.encoder))]
    steered = captured(exact, site, {"artifact": "lf", "strength": 4.0, "features": every})
    fired = sae.encode(x)[:, features.indices] != 0
    assert 0 < fired.sum() < fired.size
    np.testing.assert_allclose(steered, expected, atol=2e-3, rtol=1e-4)
