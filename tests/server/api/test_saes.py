from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.numpy import save

from server.api import errors, saes
from server.api.steering import Steerer
from steering_store import Store
from steering_store.labels import Example, Label, write_features
from tests.server.api.artifact_app import assert_refused
from tests.server.api.published import HIDDEN, LAYERS, prepare, publish, refused

LABELS = [
    Label(index=index, label=f"about {word}", examples=[Example(text=f"a {word} b", token=word, activation=2.5)])
    for index, word in ((1, "rain"), (4, "snow and rain"), (7, "wind"))
]


def publish_labelled(store: Store, **changes: Any) -> None:
    shapes = {"encoder": (8, HIDDEN), "decoder": (8, HIDDEN), "encoder_bias": (8,)}
    tensors = {role: np.ones(shape, np.float32) for role, shape in shapes.items()}
    site = {"point": "resid_post", "layer": 3, "file": "s.safetensors", "dtype": "F32"}
    manifest = {
        "schema_version": 1,
        "kind": "sae",
        "activation": "relu",
        "labels": "labels.jsonl",
        "model": {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS},
        "sites": [site | {"role": role, "tensor": role, "shape": list(shape)} for role, shape in shapes.items()],
        "default_strength": 1.0,
        "provenance": {"method": "import"},
    }
    store.publish(
        "weather", manifest | changes, {"s.safetensors": save(tensors), "labels.jsonl": write_features(LABELS)}
    )


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.polyhelm = type("Polyhelm", (), {"store": store})()
    app.include_router(saes.router)
    errors.install(app)
    with TestClient(app) as client:
        yield client


def test_features_are_found_by_label_with_their_examples(client: TestClient, store: Store) -> None:
    publish_labelled(store)
    body = client.get("/v1/saes/weather/features", params={"q": "RAIN about"}).json()
    assert [each["index"] for each in body["data"]] == [1, 4]
    assert body["data"][0] == {
        "object": "sae.feature",
        "index": 1,
        "label": "about rain",
        "examples": [{"text": "a rain b", "token": "rain", "activation": 2.5}],
    }
    assert (body["object"], body["artifact"], body["has_more"]) == ("list", "weather@1", False)


def test_pages_follow_one_another(client: TestClient, store: Store) -> None:
    publish_labelled(store)
    seen, after, more = [], None, True
    while more:
        params = {"limit": 1} | ({} if after is None else {"after": after})
        body = client.get("/v1/saes/weather@1/features", params=params).json()
        seen += [each["index"] for each in body["data"]]
        after, more = body["last_id"], body["has_more"]
    assert seen == [1, 4, 7]
    empty = client.get("/v1/saes/weather/features", params={"after": 7}).json()
    assert (empty["data"], empty["first_id"], empty["has_more"]) == ([], None, False)


def test_what_has_no_features_is_refused(client: TestClient, store: Store) -> None:
    publish(store, "mood")
    assert_refused(client.get("/v1/saes/mood/features"), 400, "BadRequestError", "ref", "only a sae")
    answer = client.get("/v1/saes/none/features")
    assert answer.status_code == 404
    assert client.get("/v1/saes/mood@x@y/features").status_code in (400, 422)
    assert client.get("/v1/saes/mood/features", params={"limit": 0}).status_code == 422
    assert client.get("/v1/saes/mood/features", params={"after": -1}).status_code == 422


def test_a_request_without_features_takes_the_artifacts_own(steerer: Steerer, store: Store) -> None:
    features = [{"index": 2, "op": "scale", "value": 1.0}, {"index": 5, "op": "ablate"}]
    publish_labelled(store, default_features=features)
    listed = prepare(steerer, {"artifact": "weather", "features": features, "strength": 2.0})
    assert prepare(steerer, {"artifact": "weather", "strength": 2.0}).program.fingerprint == listed.program.fingerprint
    other = prepare(steerer, {"artifact": "weather", "features": features[:1], "strength": 2.0})
    assert other.program.fingerprint != listed.program.fingerprint
    publish_labelled(store)
    refused(steerer, 422, "steering.interventions.0.features", "needs", {"artifact": "weather"})
