"""What the server refuses: with which status, naming which field and saying what to do, and that it goes on serving."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import save

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

FILE = "vectors.safetensors"
FIRST = "steering.interventions.0"
ONE = {"artifact": "one"}
PAIRS = [{"positive": "a good day", "negative": "a bad day"}] * 3
FIT = {"method": "caa", "name": "refused", "pairs": PAIRS}
JSON = {"content-type": "application/json"}
TYPES = {
    400: {"BadRequestError", "Bad Request"},
    404: {"NotFoundError"},
    409: {"ConflictError"},
    413: {"RequestTooLarge"},
    415: {"UnsupportedMediaType"},
    422: {"UnprocessableEntityError"},
}
MiB = 1 << 20


@pytest.fixture(autouse=True)
def still_steers(server: Server) -> Iterator[None]:
    """After every refusal the server must answer a steered request, and steer it."""
    yield
    (applied,) = server.complete(ONE, max_tokens=2)["steering"]["applied"]
    assert applied["tokens_touched"] + applied["tokens_from_cache"] == 5


def assert_refused(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)
    assert error["type"] in TYPES[status]
    for word in words:
        assert word in error["message"]


def post(server: Server, path: str, body: Any) -> httpx.Response:
    """POST as JSON as Python writes it, which has NaN and Infinity."""
    return server.client.post(path, content=json.dumps(body), headers=JSON)


def completion(steering: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": "The weather today is", "max_tokens": 4, "steering": steering} | fields


def chat(steering: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How are you?"}]
    return {"model": "smollm2", "messages": messages, "max_tokens": 4, "steering": steering} | fields


def steering(**fields: Any) -> dict[str, Any]:
    return {"interventions": [ONE | fields]}


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        pytest.param("stronger", "steering", ["dictionary"], id="string"),
        pytest.param([ONE], "steering", ["dictionary"], id="list"),
        pytest.param(3, "steering", ["dictionary"], id="number"),
        pytest.param({}, "steering.interventions", ["required"], id="empty object"),
        pytest.param({"interventions": [ONE], "modes": "live"}, "steering.modes", ["remove it"], id="unknown key"),
        pytest.param(steering(layer=[10]), f"{FIRST}.layer", ["remove it"], id="unknown key in an intervention"),
        pytest.param(
            steering(apply={"promt": "all"}), f"{FIRST}.apply.promt", ["remove it"], id="unknown key in apply"
        ),
        pytest.param({"interventions": None}, "steering.interventions", ["list"], id="null interventions"),
        pytest.param({"interventions": []}, "steering.interventions", ["at least 1"], id="no interventions"),
        pytest.param({"interventions": [ONE] * 17}, "steering.interventions", ["17", "at most 16"], id="17"),
        pytest.param({"interventions": ["one"]}, FIRST, ["dictionary"], id="intervention is a string"),
        pytest.param(steering(strength="4"), f"{FIRST}.strength", ["number"], id="strength string"),
        pytest.param(steering(strength=True), f"{FIRST}.strength", ["number"], id="strength bool"),
        pytest.param(steering(strength=float("nan")), f"{FIRST}.strength", ["nan", "finite"], id="strength NaN"),
        pytest.param(steering(strength=float("inf")), f"{FIRST}.strength", ["inf", "finite"], id="strength infinite"),
        pytest.param(steering(strength=1e30), f"{FIRST}.strength", ["at most 10000"], id="strength 1e30"),
        pytest.param(steering(strength=10**400), f"{FIRST}.strength", ["number"], id="strength beyond float64"),
        pytest.param(steering(layers=[-1]), f"{FIRST}.layers.0", ["greater than or equal to 0"], id="layer negative"),
        pytest.param(steering(layers=[10, 99]), f"{FIRST}.layers", ["[99]", "10 to 12"], id="layer out of range"),
        pytest.param(steering(layers=[9]), f"{FIRST}.layers", ["[9]", "10 to 12"], id="layer not in the artifact"),
        pytest.param(steering(layers=[]), f"{FIRST}.layers", ["at least 1"], id="layers empty"),
        pytest.param(steering(layers=[10, 11.0]), f"{FIRST}.layers.1", ["integer"], id="layer float"),
        pytest.param(steering(layers=10), f"{FIRST}.layers", ["list"], id="layers not a list"),
        pytest.param(steering(op="scale"), f"{FIRST}.op", ["'add' or 'add_norm'"], id="unknown op"),
        pytest.param(steering(apply="all"), f"{FIRST}.apply", ["dictionary"], id="apply string"),
        pytest.param(
            steering(apply={"prompt_window": [5, 5]}), f"{FIRST}.apply", ["prompt_window [5, 5]"], id="window [5,5]"
        ),
        pytest.param(
            steering(apply={"generation_window": [7, 3]}), f"{FIRST}.apply", ["generation_window [7, 3]"], id="[7,3]"
        ),
        pytest.param(
            steering(apply={"prompt_window": [7]}), f"{FIRST}.apply.prompt_window.1", ["required"], id="window [7]"
        ),
        pytest.param(
            steering(apply={"prompt_window": [1, 2, 3]}),
            f"{FIRST}.apply.prompt_window",
            ["at most 2"],
            id="triple",
        ),
        pytest.param(
            steering(apply={"generation_window": [-1, 3]}),
            f"{FIRST}.apply.generation_window.0",
            ["greater than or equal to 0"],
            id="generation window negative",
        ),
        pytest.param(
            steering(apply={"prompt_positions": []}),
            f"{FIRST}.apply.prompt_positions",
            ["at least 1"],
            id="no positions",
        ),
        pytest.param(
            steering(apply={"prompt_positions": [0.5]}),
            f"{FIRST}.apply.prompt_positions.0",
            ["integer"],
            id="position float",
        ),
        pytest.param(
            {"interventions": [ONE, {"artifact": "two", "strength": "x"}]},
            "steering.interventions.1.strength",
            ["number"],
            id="second intervention",
        ),
    ],
)
def test_steering_that_cannot_be_read_is_422(server: Server, value: Any, param: str, words: list[str]) -> None:
    assert_refused(post(server, "/v1/completions", completion(value)), 422, param, *words)
    assert_refused(post(server, "/v1/chat/completions", chat(value, stream=True)), 422, param, *words)


def test_number_too_large_for_json_readers_is_422(server: Server) -> None:
    body = json.dumps(completion(steering(strength=77))).replace("77", "1e999")
    response = server.client.post("/v1/completions", content=body, headers=JSON)
    assert_refused(response, 422, f"{FIRST}.strength", "inf", "finite")


@pytest.mark.parametrize(
    ("reference", "status", "word"),
    [
        ("nobody", 404, "list the artifacts"),
        ("one@99", 404, "list the artifacts"),
        ("one@sha256:" + "0" * 64, 404, "list the artifacts"),
        ("one@nobodys-alias", 404, "list the artifacts"),
        ("one@0", 422, "as in one@3"),
        ("one@sha256:123", 422, "64 lower-case hex digits"),
        ("", 422, "at least 1"),
        (7, 422, "string"),
        ("One", 422, "not allowed: use"),
        ("../x", 422, "not allowed: use"),
        ("a/../b", 422, "not allowed: use"),
        ("%2e%2e", 422, "not allowed: use"),
        ("one\0", 422, "not allowed: use"),
        ("one\ud800", 422, "string"),
        ("x" * 300, 422, "256"),
    ],
)
def test_bad_reference_names_the_intervention(server: Server, reference: Any, status: int, word: str) -> None:
    value = {"interventions": [ONE, {"artifact": reference}]}
    response = post(server, "/v1/completions", completion(value))
    assert_refused(response, status, "steering.interventions.1.artifact", word)


def test_missing_reference_is_422(server: Server) -> None:
    response = post(server, "/v1/completions", completion({"interventions": [{"strength": 1.0}]}))
    assert_refused(response, 422, f"{FIRST}.artifact", "required")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("apply", "word"),
    [
        ({"prompt_positions": [99]}, "position 99 is outside the prompt"),
        ({"prompt_positions": [-99]}, "position -99 is outside the prompt"),
        ({"exclude_prompt_positions": [99]}, "position 99 is outside the prompt"),
        ({"prompt_window": [99, None]}, "the span is empty"),
        ({"generation_window": [3, None]}, "max_tokens=4"),
        ({"prompt": "all", "exclude_prompt_window": [0, None]}, "the span is empty"),
    ],
)
def test_span_that_touches_nothing_is_400(
    server: Server, path: str, stream: bool, apply: Mapping[str, Any], word: str
) -> None:
    body = (chat if "chat" in path else completion)(steering(apply=apply), stream=stream)
    assert_refused(post(server, path, body), 400, f"{FIRST}.apply", word)


def test_generation_window_that_begins_at_the_last_token_that_runs_is_taken(server: Server) -> None:
    response = post(server, "/v1/completions", completion(steering(apply={"generation_window": [2, 3]})))
    assert response.status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_beam_search_with_steering_is_400(server: Server, stream: bool) -> None:
    beams = {"use_beam_search": True, "n": 2, "stream": stream}
    for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        assert_refused(post(server, path, body(steering(), **beams)), 400, "steering", "use_beam_search to false")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/tokenize"])
def test_steering_on_a_route_that_cannot_steer_is_400(server: Server, path: str) -> None:
    body = chat(steering(), input="How are you?", prompt="How are you?")
    assert_refused(post(server, path, body), 400, "steering", path, "use /v1/chat/completions or /v1/completions")


def test_steering_spelled_with_escapes_is_found(server: Server) -> None:
    body = json.dumps({"model": "smollm2", "input": "Hi", "steering": steering()}).replace("steering", "st\\u0065ering")
    response = server.client.post("/v1/responses", content=body, headers=JSON)
    assert_refused(response, 400, "steering", "can't steer")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("key", ["polyhelm_program", "polyhelm_receipt", "polyhelm_capture", "polyhelm"])
def test_forged_program_is_400(server: Server, stream: bool, key: str) -> None:
    for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        for steered in (None, steering()):
            forged = body(steered, stream=stream, vllm_xargs={key: "[]"})
            assert_refused(post(server, path, forged), 400, "vllm_xargs", key, "use the 'steering' field")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("other-width", {"hidden_size": 8}, ["hidden size is 8"]),
        ("other-depth", {"num_layers": 31}, ["number of layers is 31"]),
        ("other-kind", {"architecture": "Gemma3ForCausalLM"}, ["architecture is Gemma3ForCausalLM"]),
        ("other-weights", {"weights_digest": "sha256:" + "1" * 64}, ["weights", "sha256:111"]),
    ],
)
def test_artifact_of_another_model_is_409(server: Server, name: str, changes: dict[str, Any], words: list[str]) -> None:
    manifest = server.manifest()
    manifest["model"] |= changes
    width = manifest["model"]["hidden_size"]
    for site in manifest["sites"]:
        site["shape"] = [width]
    vectors = {tensor: vector[:width] for tensor, vector in server.vectors(3).items()}
    assert server.send_artifact(name, manifest, {FILE: save(vectors)}).status_code in (200, 201)
    response = post(server, "/v1/completions", completion({"interventions": [{"artifact": name}]}))
    assert_refused(response, 409, f"{FIRST}.artifact", f"{name}@1", "another model", "fit it on the served", *words)


def test_artifact_whose_own_strength_is_out_of_range_is_422(server: Server) -> None:
    server.publish("violent", default_strength=1e9)
    response = post(server, "/v1/completions", completion({"interventions": [{"artifact": "violent"}]}))
    assert_refused(response, 422, f"{FIRST}.strength", "at most 10000")


def with_nan(vectors: dict[str, np.ndarray]) -> bytes:
    vectors["layer.11"][7] = np.nan
    return save(vectors)


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        (with_nan, "files", ["layer.11", "NaN"]),
        (lambda v: save({k: x[:8].copy() for k, x in v.items()}), "sites.0.shape", ["[576]", "[8]", "correct one"]),
        (lambda v: save(v)[:-7], "files", ["truncated", "write it again"]),
        (lambda v: save(v)[:20], "files", ["truncated", "write it again"]),
        (lambda v: b"", "files", ["truncated", "write it again"]),
        (lambda v: save({k: v[k] for k in ("layer.10", "layer.11")}), "sites.2.tensor", ["layer.12", "layer.10"]),
        (lambda v: save(v | {"more": v["layer.10"]}), "sites", ["more", "add sites"]),
        (lambda v: save({k: x.astype(np.int8) for k, x in v.items()}), "files", ["I8", "convert it to one of F64"]),
    ],
    ids=["NaN", "hidden size", "truncated", "cut in the header", "empty", "tensor missing", "tensor unused", "int8"],
)
def test_files_that_are_not_the_vectors_are_422(server: Server, content: Any, param: str, words: list[str]) -> None:
    response = server.send_artifact("refused", server.manifest(), {FILE: content(server.vectors(4))})
    assert_refused(response, 422, param, FILE if param == "files" else param, *words)
    assert server.client.get("/v1/artifacts/refused").status_code == 404


@pytest.mark.parametrize(
    ("changes", "param", "word"),
    [
        ({"schema_version": 2}, "schema_version", "reads version 1"),
        ({"default_strength": float("nan")}, "default_strength", "finite"),
        ({"default_strength": "4"}, "default_strength", "number"),
        ({"kind": "lora"}, "kind", "steering_vector"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"default_layers": [29]}, "default_layers", "[10, 11, 12]"),
        ({"sites": []}, "sites", "list at least one"),
    ],
)
def test_manifest_that_cannot_be_read_is_422(server: Server, changes: dict[str, Any], param: str, word: str) -> None:
    files = {FILE: save(server.vectors(4))}
    assert_refused(server.send_artifact("refused", server.manifest(**changes), files), 422, param, param, word)


def test_manifest_that_is_not_json_is_422(server: Server) -> None:
    response = server.send_artifact("refused", "{not json", {FILE: b""})
    assert_refused(response, 422, "manifest", "Invalid JSON", "publish again")


def test_pickle_is_415(server: Server) -> None:
    response = server.send_artifact("refused", server.manifest(), {"vectors.pt": b"\x80\x04."})
    assert_refused(response, 415, "files", "pickle", "polyhelm artifact convert")


@pytest.mark.parametrize("path", ["../../evil.safetensors", "/etc/evil.safetensors", "a/../evil.safetensors"])
def test_file_name_that_leaves_the_artifact_is_422(server: Server, path: str) -> None:
    response = server.send_artifact("refused", server.manifest(), {path: save(server.vectors(4))})
    assert_refused(response, 422, "files", "evil", "without folders")
    assert not list(server.data_dir.rglob("evil*"))


@pytest.mark.parametrize(
    ("name", "status", "param"),
    # A name with a slash is the address of nothing, and so of nothing that takes files.
    [("%2e%2e", 422, "name"), ("a..b", 422, "name"), ("Upper", 422, "name"), ("a%2F..%2Fb", 400, None)],
)
def test_publishing_under_a_bad_name_is_refused(server: Server, name: str, status: int, param: str | None) -> None:
    response = server.send_artifact(name, server.manifest(), {FILE: save(server.vectors(4))})
    assert_refused(response, status, param, "not allowed: use" if param else "takes JSON")


def test_publishing_without_multipart_is_415(server: Server) -> None:
    response = post(server, "/v1/artifacts/refused/versions", server.manifest())
    assert_refused(response, 415, None, "multipart/form-data", "'manifest'")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/fits", "/v1/nowhere"])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_huge_body_is_413_at_once_and_never_held(server: Server, path: str, chunked: bool) -> None:
    pieces = (b" " * MiB for _ in range(200))
    headers = JSON if chunked else JSON | {"content-length": str(200 * MiB)}
    before, started = memory(server), time.monotonic()
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=60) as client:
        response = client.post(path, content=pieces, headers=headers)
    assert_refused(response, 413, None, str(16 * MiB), "send less", "POLYHELM_MAX_BODY_BYTES")
    assert time.monotonic() - started < 20
    assert memory(server) - before < 64 * MiB


def memory(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"pairs": []}, "pairs", ["at least 2"]),
        ({"pairs": PAIRS[:1]}, "pairs", ["at least 2"]),
        ({"pairs": "good, bad"}, "pairs", ["list"]),
        ({"pairs": [*PAIRS, {"positive": "", "negative": "x"}]}, "pairs.3.positive", ["at least 1 character"]),
        ({"pairs": [*PAIRS, {"positive": "x"}]}, "pairs.3.negative", ["required"]),
        ({"pairs": [*PAIRS, {"positive": "x", "negative": "a b " * 3000}]}, "pairs.3.negative", ["1 to 2047"]),
        ({"pairs": [*PAIRS, {"positive": "x", "negative": "\ud800"}]}, "pairs.3.negative", ["unicode"]),
        ({"method": "nonsense"}, "method", ["need one of caa, "]),
        ({"options": {"poling": "last"}}, "options.poling", ["remove it"]),
        ({"options": {"pooling": "first"}}, "options.pooling", ["'last' or 'mean'"]),
        ({"options": {"default_strength": float("nan")}}, "options.default_strength", ["finite"]),
        ({"options": {"default_layers": [30]}}, "options.default_layers", ["[30]", "30 layers"]),
        ({"options": {"default_layers": [-1]}}, "options.default_layers.0", ["greater than or equal to 0"]),
        ({"options": {"default_layers": [3, 3]}}, "options.default_layers", ["twice"]),
        ({"languages": ["x!"]}, "languages.0", ["pattern"]),
        ({"name": "../x"}, "name", ["not allowed: use"]),
        ({"name": "Upper"}, "name", ["not allowed: use"]),
        ({"name": "x" * 65}, "name", ["at most 64"]),
        ({"priority": 1}, "priority", ["remove it"]),
    ],
)
def test_fit_that_cannot_run_is_422_at_once(
    server: Server, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    before = server.client.get("/v1/fits").json()
    response = post(server, "/v1/fits", FIT | changes)
    assert_refused(response, 422, param, *words)
    assert server.client.get("/v1/fits").json() == before


def test_fit_of_texts_that_do_not_differ_fails_and_publishes_nothing(server: Server) -> None:
    pairs = [{"positive": "the same text", "negative": "the same text"}] * 3
    accepted = post(server, "/v1/fits", FIT | {"name": "nothing", "pairs": pairs})
    job = server.wait_for_fit(accepted.json()["id"], "succeeded", "failed")
    assert (job["status"], job["artifact"]) == ("failed", None)
    assert "don't differ" in job["error"]
    assert server.client.get("/v1/artifacts/nothing").status_code == 404


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("fit_id", ["fit-unknown", "%2e%2e", "one"])
def test_unknown_fit_is_404(server: Server, method: str, fit_id: str) -> None:
    assert_refused(server.client.request(method, f"/v1/fits/{fit_id}"), 404, "id", "GET /v1/fits lists them")


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/v1/completions", 400, "json_invalid"),
        ("/v1/chat/completions", 400, "json_invalid"),
        ("/v1/fits", 422, "send a JSON object"),
    ],
)
@pytest.mark.parametrize("body", [b'{"steering": ', b"\xff\xfe", b"nonsense"])
def test_malformed_json_is_refused(server: Server, path: str, status: int, word: str, body: bytes) -> None:
    response = server.client.post(path, content=body, headers=JSON)
    if not body.isascii():
        status, word = 400, "JSON in UTF-8"
    assert response.status_code == status, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert word in response.json()["error"]["message"]


def test_unknown_path_is_404_in_the_envelope(server: Server) -> None:
    assert_refused(server.client.get("/v1/nowhere"), 404, None, "Not Found")


def test_client_that_leaves_in_the_middle_of_its_body_does_no_harm(server: Server) -> None:
    def halves() -> Iterator[bytes]:
        yield b'{"model": "smollm2", '
        raise KeyboardInterrupt

    for path in ("/v1/completions", "/v1/fits"):
        with httpx.Client(base_url=server.base_url, trust_env=False) as client, pytest.raises(KeyboardInterrupt):
            client.post(path, content=halves(), headers=JSON)


def test_no_refusal_left_anything_behind(server: Server) -> None:
    assert os.listdir(server.data_dir / "artifacts" / "tmp") == []
    log = server.log.read_text("utf-8", "replace")
    assert not [words for words in ("Exception in ASGI", "never retrieved", "never awaited") if words in log]
