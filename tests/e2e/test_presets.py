"""A preset in place of interventions, and the artifacts of running requests held, over HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine


def publish_preset(server: Server, name: str, *items: dict[str, Any]) -> dict[str, Any]:
    manifest = server.manifest(
        kind="preset", sites=[], interventions=list(items), default_strength=1.0, default_layers=None, h_norm={}
    )
    # Multipart also without a file.
    parts = {"manifest": (None, json.dumps(manifest))}
    response = server.client.post(f"/v1/artifacts/{name}/versions", files=parts)
    assert response.status_code in (200, 201), response.text
    version: dict[str, Any] = response.json()
    return version


def test_a_preset_answers_as_its_interventions_do(server: Server) -> None:
    server.publish("preset-a", seed=1)
    server.publish("preset-b", seed=2)
    parts = [{"artifact": "preset-a", "strength": 1.5}, {"artifact": "preset-b", "layers": [12], "op": "ablate"}]
    publish_preset(server, "both", parts[0], {"artifact": "preset-b", "options": {"layers": [12], "op": "ablate"}})
    by_hand, preset = server.complete(*parts), server.complete({"artifact": "both"})
    assert preset["choices"][0]["text"] == by_hand["choices"][0]["text"] != server.text()
    assert preset["steering"]["fingerprint"] == by_hand["steering"]["fingerprint"]
    assert [each["preset"] for each in preset["steering"]["applied"]] == ["both@1", "both@1"]
    server.publish("preset-a", seed=3)
    assert server.complete({"artifact": "both"})["steering"]["fingerprint"] == by_hand["steering"]["fingerprint"]
    assert server.text({"artifact": "both", "strength": 0.0}) == server.text()
    refused = server.client.delete("/v1/artifacts/preset-b/versions/1")
    assert refused.status_code == 409 and "preset both@1" in refused.json()["error"]["message"]


def test_an_artifact_cannot_be_deleted_under_a_running_request(server: Server) -> None:
    server.publish("held", seed=4)
    body = {
        "model": server.model,
        "prompt": "Once upon a time",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "steering": {"interventions": [{"artifact": "held", "strength": 0.5}]},
    }
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()  # which closes the stream when it is dropped
        next(lines)
        refused = server.client.delete("/v1/artifacts/held/versions/1")
        assert refused.status_code == 409 and "requests of process" in refused.json()["error"]["message"]
    server.complete(max_tokens=1)  # what was cancelled is gone by now
    deleted = server.client.delete("/v1/artifacts/held/versions/1")
    assert deleted.status_code == 204, deleted.text
    assert server.ask({"artifact": "held"}).status_code == 404


def test_a_preset_for_any_language_takes_the_requests_own(server: Server) -> None:
    for name, seed in (("de-en", 11), ("fr-en", 12)):
        server.publish(name, seed=seed)
    publish_preset(
        server,
        "any-en",
        {"artifact": "de-en", "source_language": "de", "strength": 0.5},
        {"artifact": "fr-en", "source_language": "fr", "strength": 0.7},
    )
    german = "Wie komme ich von hier zum Bahnhof? Kannst du mir helfen?"
    told = server.complete({"artifact": "any-en"}, prompt=german)["steering"]
    assert (told["source_language"], told["source_language_by"]) == ("de", "identified")
    assert [(each["artifact"], each["strength"]) for each in told["applied"]] == [("de-en", 0.5)]
    chat = {
        "model": server.model,
        "max_tokens": 4,
        "messages": [
            {"role": "system", "content": "Answer in English, please, and be brief."},
            {"role": "user", "content": "Comment aller à la gare depuis ici ? Peux-tu m'aider ?"},
        ],
    }
    steering: dict[str, Any] = {"interventions": [{"artifact": "any-en"}]}
    body = server.client.post("/v1/chat/completions", json=chat | {"steering": steering}).json()
    assert [each["artifact"] for each in body["steering"]["applied"]] == ["fr-en"]
    named = chat | {"steering": steering | {"source_language": "de"}}
    body = server.client.post("/v1/chat/completions", json=named).json()
    assert (body["steering"]["source_language_by"], body["steering"]["applied"][0]["artifact"]) == ("request", "de-en")
    refused = server.ask({"artifact": "any-en"}, prompt="How do I get to the station from here, please?")
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "steering.source_language"
    capture = {"prompts": [german], "sites": ["resid_post.11"], "steering": steering}
    assert server.client.post("/v1/activations", json=capture).status_code == 422
    capture["steering"] = steering | {"source_language": "de"}
    assert server.client.post("/v1/activations", json=capture).status_code == 200
