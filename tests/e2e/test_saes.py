"""An SAE trained on the running server, its features found and steered with, LF-Steering and ExpertSteer fitted."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy

from tests.e2e.test_fits import polyhelm

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

LAYER = 12
OPTIONS = {"layer": LAYER, "features": 256, "k": 16, "steps": 60, "batch": 256, "examples": 3}


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, str]]:
    """The shortest pairs of the demo data."""
    lines = resources.files("server").joinpath("demo_data", "sentiment.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in sorted(lines, key=len)[:20]]


def fit(server: Server, method: str, name: str, **fields: Any) -> dict[str, Any]:
    response = server.client.post("/v1/fits", json={"method": method, "name": name} | fields)
    assert response.status_code == 202, response.text
    job = server.wait_for_fit(response.json()["id"], "succeeded", "failed", seconds=300)
    assert job["status"] == "succeeded", job["error"]
    manifest: dict[str, Any] = server.client.get(f"/v1/artifacts/{name}/versions/latest").json()["manifest"]
    return manifest


@pytest.fixture(scope="module")
def sae(server: Server, reviews: list[dict[str, str]]) -> dict[str, Any]:
    texts = [{"text": pair[side]} for pair in reviews for side in ("positive", "negative")]
    return fit(server, "sae", "trained", texts=texts, options=OPTIONS)


def test_features_say_where_they_fire_and_are_steered_with(server: Server, sae: dict[str, Any]) -> None:
    assert sae["metrics"]["fvu"] < 0.9 and sae["labels"] == "labels.jsonl"
    page = server.client.get("/v1/saes/trained@1/features", params={"limit": 5}).json()
    assert len(page["data"]) == 5 and page["has_more"]
    feature = max(page["data"], key=lambda each: each["examples"][0]["activation"])
    example = feature["examples"][0]
    assert example["token"].strip() in example["text"] and example["activation"] > 0
    listed = polyhelm("artifact", "features", "trained", "--data-dir", str(server.data_dir), "--json", "--limit", "5")
    assert json.loads(listed.stdout)["features"][0]["index"] == page["data"][0]["index"]
    # What the examples say is what the model and the SAE compute.
    text = example["text"]
    answer = server.client.post(
        "/v1/activations", json={"prompts": [text], "sites": [f"resid_post.{LAYER}"], "positions": "all"}
    )
    rows = safetensors.numpy.load(answer.content)[f"0.resid_post.{LAYER}"][1:]
    weights = safetensors.numpy.load(
        server.client.get("/v1/artifacts/trained/versions/1/files/sae.safetensors").content
    )
    parts = {role: weights[f"resid_post.{LAYER}.{role}"] for role in ("encoder", "encoder_bias")}
    z = rows @ parts["encoder"][feature["index"]] + parts["encoder_bias"][feature["index"]]
    assert z.max() > 0.3 * example["activation"], "the feature fires in its own example, with less before it"
    steer = {"artifact": "trained", "features": [{"index": feature["index"], "op": "add", "value": 50.0}]}
    assert server.text(steer) != server.text()


def test_lf_steering_acts_on_its_features_without_being_told_which(
    server: Server, sae: dict[str, Any], reviews: list[dict[str, str]]
) -> None:
    pairs = [{"right": pair["positive"], "wrong": pair["negative"]} for pair in reviews[:8]]
    manifest = fit(
        server, "lf_steering", "lf-fitted", pairs=pairs, options={"sae": "trained", "threshold": 0.01, "most": 6}
    )
    count = int(manifest["metrics"]["key_features"])
    assert len(manifest["default_features"]) == 2 * count
    every = [{"index": index, "op": "scale", "value": 1.0} for index in range(2 * count)]
    named = server.complete({"artifact": "lf-fitted", "strength": 30.0, "features": every})
    bare = server.complete({"artifact": "lf-fitted", "strength": 30.0})
    assert bare["choices"][0]["text"] == named["choices"][0]["text"]
    assert bare["steering"]["fingerprint"] == named["steering"]["fingerprint"]
    (applied,) = bare["steering"]["applied"]
    assert applied["op"] == "features" and applied["tokens_touched"] + applied["tokens_from_cache"] > 0
    tune = {
        "items": [{"prompt": "The film was", "target": " great", "split": "dev"}],
        "strengths": [1.0, 4.0],
        "fluency_prompts": 1,
        "tokens": 4,
        "max_perplexity_ratio": 1000.0,
    }
    tuned = fit(
        server, "lf_steering", "lf-tuned", pairs=pairs, tune=tune, options={"sae": "trained", "threshold": 0.01}
    )
    assert [each["layers"] for each in tuned["tuning"]["points"]] == [[LAYER]] * 2


def test_expertsteer_loads_a_listed_model_and_no_other(server: Server, reviews: list[dict[str, str]]) -> None:
    # Without the full stop, which would make all first layers' last states the same.
    texts = [
        {"text": pair[side].rstrip(" .!?"), "label": side} for pair in reviews[:12] for side in ("positive", "negative")
    ]
    manifest = fit(server, "expertsteer", "expert", texts=texts, options={"expert": "smollm2", "pairs": 2})
    assert len(manifest["provenance"]["config"]["layer_pairs"]) == 2
    content = server.client.get("/v1/artifacts/expert/versions/latest/files/vectors.safetensors").content
    for vector in safetensors.numpy.load(content).values():
        # Equal widths: nu itself, of length 1, once for every pair that ends at the layer.
        assert 0.1 < np.linalg.norm(vector) <= 2.01
    assert (
        server.complete({"artifact": "expert", "strength": 8.0})["steering"]["applied"][0]["kind"] == "steering_vector"
    )
    other = {"method": "expertsteer", "name": "no", "texts": texts, "options": {"expert": "gemma3-270m"}}
    job = server.wait_for_fit(server.client.post("/v1/fits", json=other).json()["id"], "succeeded", "failed")
    assert job["status"] == "failed" and "POLYHELM_EXPERT_MODELS" in job["error"]
