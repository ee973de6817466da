"""A fit that is tuned on a task, on the real server: the curve is what the published artifact does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.test_fits import polyhelm

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

PROMPTS = ("I saw the film and it was", "The acting in this movie was", "My honest opinion of the story: it is")
ITEMS = [{"prompt": each, "choices": [" great", " awful"], "answer": 0, "split": "validation"} for each in PROMPTS]
TUNE: dict[str, Any] = {
    "items": ITEMS,
    "strengths": [-2.0, 2.0],
    "layers": [[10], [12, 13]],
    "objective": "margin",
    "fluency_prompts": 2,
    "tokens": 8,
    "max_perplexity_ratio": 1000.0,
}


def tuned(server: Server, name: str, pairs: list[dict[str, str]], **tune: Any) -> dict[str, Any]:
    """The manifest of a tuned CAA vector."""
    spec = {"method": "caa", "name": name, "pairs": pairs, "options": {"pooling": "mean"}, "tune": TUNE | tune}
    accepted = server.client.post("/v1/fits", json=spec)
    assert accepted.status_code == 202, accepted.text
    job = server.wait_for_fit(accepted.json()["id"], "succeeded", "failed")
    assert job["status"] == "succeeded", job["error"]
    manifest: dict[str, Any] = server.client.get(f"/v1/artifacts/{name}/versions/latest").json()["manifest"]
    return manifest


def log_prob(server: Server, prompt: str, choice: str, steering: dict[str, Any] | None) -> float:
    """Of a choice of one token, by the very request that a user would send: it is the first generated token's."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    token = server.client.post("/tokenize", json={"model": server.model, "prompt": choice}).json()["tokens"]
    assert len(token) == 1
    body |= {"logprob_token_ids": token}
    answer = server.client.post("/v1/completions", json=body | ({"steering": steering} if steering else {}))
    assert answer.status_code == 200, answer.text
    (top,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
    return float(top[choice])


def margin(server: Server, steering: dict[str, Any] | None, prompts: Sequence[str] = PROMPTS) -> float:
    each = [
        log_prob(server, prompt, " great", steering) - log_prob(server, prompt, " awful", steering)
        for prompt in prompts
    ]
    return sum(each) / len(each)


def test_the_curve_is_what_the_published_artifact_does_and_its_best_point_is_the_default(
    server: Server, pairs: list[dict[str, str]]
) -> None:
    manifest = tuned(server, "tuned", pairs)
    tuning = manifest["tuning"]
    points = tuning["points"]
    assert [(each["strength"], each["layers"]) for each in points] == [
        (-2.0, [10]),
        (2.0, [10]),
        (-2.0, [12, 13]),
        (2.0, [12, 13]),
    ]
    best = points[tuning["chosen"]]
    assert best["effect"] == max(each["effect"] for each in points if each["fluent"])
    assert (manifest["default_strength"], manifest["default_layers"]) == (best["strength"], best["layers"])
    assert manifest["provenance"]["config"]["default_strength"] == best["strength"]
    low, high = manifest["strength_range"]
    assert low <= best["strength"] <= high
    assert best["strength"] > 0 and best["effect"] > tuning["baseline"]["effect"] > points[2]["effect"]
    assert manifest["metrics"]["tuned_gain"] == pytest.approx(best["effect"] - tuning["baseline"]["effect"])
    assert tuning["baseline"]["perplexity"] > 1 and 0 < tuning["baseline"]["distinct_2"] <= 1
    assert margin(server, None) == pytest.approx(tuning["baseline"]["margin"], abs=0.1)
    steering = {"interventions": [{"artifact": "tuned", "strength": 2.0, "layers": [12, 13]}]}
    assert margin(server, steering) == pytest.approx(points[3]["margin"], abs=0.1)
    assert abs(points[3]["margin"] - points[2]["margin"]) > 0.5
    server.wait_until_idle()


def test_frozen_mode_and_a_span_are_measured_as_a_request_has_them(server: Server, pairs: list[dict[str, str]]) -> None:
    one = {"strengths": [3.0], "layers": [[12, 13]]}
    frozen = tuned(server, "tuned-frozen", pairs, **one, mode="frozen")["tuning"]
    steering = {"mode": "frozen", "interventions": [{"artifact": "tuned-frozen", "strength": 3.0, "layers": [12, 13]}]}
    assert margin(server, steering) == pytest.approx(frozen["points"][0]["margin"], abs=0.1)
    apply = {"prompt_positions": [-1]}
    last = tuned(server, "tuned-last", pairs, **one, intervention={"apply": apply})["tuning"]
    intervention = {"artifact": "tuned-last", "strength": 3.0, "layers": [12, 13], "apply": apply}
    assert margin(server, {"interventions": [intervention]}) == pytest.approx(last["points"][0]["margin"], abs=0.1)
    assert last["intervention"] == {"apply": apply}


@pytest.mark.parametrize(
    ("tune", "param", "word"),
    [
        ({"items": [ITEMS[0] | {"split": "test"}]}, "tune.items.0.split", "never tune on the test split"),
        ({"layers": [[29], [30]]}, "tune.layers", "30"),
        ({"intervention": {"op": "map"}}, "tune.intervention.op", "map"),
        ({"strengths": [0.0]}, "tune.strengths", "baseline"),
        ({"options": {"pooling": ["first"]}}, "tune.options.pooling", "last"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused_and_publishes_nothing(
    server: Server, pairs: list[dict[str, str]], tune: dict[str, Any], param: str, word: str
) -> None:
    spec = {"method": "caa", "name": "tuned-not", "pairs": pairs[:2], "tune": TUNE | tune}
    answer = server.client.post("/v1/fits", json=spec)
    if answer.status_code == 422:
        error = answer.json()["error"]
        assert error["param"] == param and word in error["message"]
    else:
        job = server.wait_for_fit(answer.json()["id"], "succeeded", "failed")
        assert job["status"] == "failed" and param in job["error"] and word in job["error"]
    assert server.client.get("/v1/artifacts/tuned-not").status_code == 404


def test_the_fits_own_texts_are_refused(server: Server, pairs: list[dict[str, str]]) -> None:
    item = {"prompt": pairs[0]["positive"], "target": " and so on", "split": "dev"}
    tune = TUNE | {"items": [item], "objective": "accuracy"}
    answer = server.client.post(
        "/v1/fits", json={"method": "caa", "name": "tuned-not", "pairs": pairs[:2], "tune": tune}
    )
    assert answer.status_code == 422 and "fit's own data" in answer.json()["error"]["message"]


def test_command_line_tunes_on_a_running_server_and_draws_the_curve(
    server: Server, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    files = {"pairs": pairs, "task": ITEMS, "test": [ITEMS[0]]}
    paths = {name: tmp_path / f"{name}.jsonl" for name in files}
    for name, rows in files.items():
        paths[name].write_text("\n".join(map(json.dumps, rows)))
    arguments = ["fit", "caa", "--url", server.base_url, "--pairs", str(paths["pairs"]), "--name", "tuned-cli"]
    arguments += [
        "--tune",
        str(paths["task"]),
        "--tune-strengths",
        "1,2",
        "--tune-layers",
        "10",
        "--tune-layers",
        "12-13",
    ]
    arguments += ["--tune-option", "pooling=mean,last", "--tune-objective", "margin", "--tune-perplexity", "1000"]
    arguments += ["--curve", str(tmp_path / "curve.jsonl")]
    refused = polyhelm(*arguments, "--test", str(paths["test"]))
    assert refused.returncode == 1 and "test set" in refused.stderr, refused.stderr
    done = polyhelm(*arguments)
    assert done.returncode == 0, done.stderr
    assert "chose strength" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 8 and rows[0]["baseline"] and sum(row["chosen"] for row in rows[1:]) == 1
    assert {row["options"]["pooling"] for row in rows[1:]} == {"mean", "last"}
    chosen = next(row for row in rows[1:] if row["chosen"])
    manifest = server.client.get("/v1/artifacts/tuned-cli/versions/1").json()["manifest"]
    assert manifest["provenance"]["config"]["pooling"] == chosen["options"]["pooling"]
    if "curve.png" in done.stdout:
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
