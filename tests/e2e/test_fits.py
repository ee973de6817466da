"""Fits on the running server: over HTTP, from the command line, and through a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

POLYHELM = str(Path(sys.executable).with_name("polyhelm"))
Pairs = list[dict[str, str]]


def submit(server: Server, pairs: Pairs, name: str, **fields: Any) -> dict[str, Any]:
    response = server.client.post("/v1/fits", json={"method": "caa", "name": name, "pairs": pairs} | fields)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/fits/{job['id']}"
    assert (job["status"], job["artifact"], job["error"]) == ("queued", None, None)
    return job


def versions(server: Server, name: str) -> list[dict[str, Any]]:
    response = server.client.get(f"/v1/artifacts/{name}")
    return list(response.json()["versions"]) if response.status_code == 200 else []


def test_fit_goes_from_queued_to_succeeded_with_progress(server: Server, pairs: Pairs) -> None:
    job = submit(server, pairs * 2, "watched")
    seen = []
    while job["status"] in ("queued", "running"):
        time.sleep(0.05)
        job = server.client.get(f"/v1/fits/{job['id']}").json()
        seen.append(job["progress"]["done"])
    assert (job["status"], job["artifact"]) == ("succeeded", "watched@1")
    assert job["progress"] == {"done": 48, "total": 48}
    assert seen == sorted(seen) and len(set(seen)) > 2
    assert job in server.client.get("/v1/fits").json()["data"]


def test_fitted_artifact_can_be_used_at_once(server: Server, pairs: Pairs) -> None:
    job = submit(server, pairs[:4], "used-at-once", options={"pooling": "mean", "variant": "pca"})
    job = server.wait_for_fit(job["id"], "succeeded", "failed")
    (applied,) = server.complete({"artifact": job["artifact"], "strength": 1.0})["steering"]["applied"]
    assert applied["tokens_touched"] + applied["tokens_from_cache"] == 11
    assert applied["sites"] == [f"resid_post.{layer}" for layer in range(10, 20)]


def test_manifest_of_a_fit_says_where_it_is_from(server: Server, pairs: Pairs) -> None:
    fields = {
        "options": {"default_layers": [14, 15], "default_strength": 3.0, "pooling": "mean"},
        "data": {"name": "twelve reviews", "license": "Apache-2.0"},
        "description": "kinder reviews",
        "license": "MIT",
        "languages": ["en"],
    }
    job = submit(server, pairs, "described", **fields)
    job = server.wait_for_fit(job["id"], "succeeded", "failed")
    manifest = versions(server, "described")[0]["manifest"]
    model = server.capabilities["model"]
    assert manifest["model"]["weights_digest"] == model["weights_digest"]
    assert manifest["model"]["tokenizer_digest"] == model["tokenizer_digest"]
    assert [site["layer"] for site in manifest["sites"]] == list(range(30))
    assert (manifest["default_layers"], manifest["default_strength"]) == ([14, 15], 3.0)
    assert (manifest["description"], manifest["license"], manifest["languages"]) == ("kinder reviews", "MIT", ["en"])
    assert sorted(map(int, manifest["h_norm"])) == list(range(30))
    provenance = manifest["provenance"]
    assert (provenance["method"], provenance["config"]["pooling"]) == ("caa", "mean")
    assert (provenance["data"]["name"], provenance["data"]["rows"]) == ("twelve reviews", 12)
    assert len(provenance["data"]["sha256"]) == 64
    assert provenance["code_version"] == server.capabilities["polyhelm_version"]
    assert provenance["created_at"].startswith(job["created_at"][:19])
    assert 0.5 <= manifest["metrics"]["agreement_best"] <= 1
    assert manifest["annotations"] == {"fit": job["id"]}


def test_fit_of_equal_data_is_reproducible(server: Server, pairs: Pairs) -> None:
    for _ in range(2):
        job = submit(server, pairs[:4], "reproduced")
        server.wait_for_fit(job["id"], "succeeded", "failed")
    first, second = versions(server, "reproduced")
    assert first["manifest"]["provenance"]["data"] == second["manifest"]["provenance"]["data"]
    answers = [server.text({"artifact": f"reproduced@{version}"}, max_tokens=8) for version in (1, 2)]
    assert answers[0] == answers[1]


def test_cancelled_fits_publish_nothing_and_the_next_one_runs(server: Server, pairs: Pairs) -> None:
    for _ in range(6):
        running, queued = submit(server, pairs * 20, "cancelled"), submit(server, pairs, "cancelled")
        server.wait_for_fit(running["id"], "running")
        for job in (queued, running):
            answer = server.client.delete(f"/v1/fits/{job['id']}")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        again = server.client.delete(f"/v1/fits/{running['id']}")
        assert again.status_code == 409
        assert "cancelled already" in again.json()["error"]["message"]
    job = submit(server, pairs[:2], "after-cancelled")
    assert server.wait_for_fit(job["id"], "succeeded", "failed")["status"] == "succeeded"
    assert server.client.get(f"/v1/fits/{running['id']}").json()["status"] == "cancelled"
    assert versions(server, "cancelled") == []
    server.wait_until_idle()


def test_server_answers_while_it_fits(server: Server, pairs: Pairs) -> None:
    alone = server.text({"artifact": "one"}, max_tokens=8)
    job = submit(server, pairs * 10, "in-the-background")
    server.wait_for_fit(job["id"], "running")
    (applied,) = server.complete({"artifact": "one"}, max_tokens=8, ignore_eos=True)["steering"]["applied"]
    assert applied["tokens_touched"] + applied["tokens_from_cache"] == 11
    server.client.delete(f"/v1/fits/{job['id']}")
    server.wait_until_idle()
    assert server.text({"artifact": "one"}, max_tokens=8) == alone


def test_crash_and_stop_in_the_middle_of_a_fit_lose_nothing(
    start_server: Callable[..., Any], tmp_path: Path, pairs: Pairs
) -> None:
    data_dir = tmp_path / "data"
    with start_server(data_dir) as server:
        before = server.publish("kept", seed=5)
        text = server.text({"artifact": "kept"}, max_tokens=8)
        job = submit(server, pairs * 20, "interrupted")
        while server.client.get(f"/v1/fits/{job['id']}").json()["progress"]["done"] < 20:
            time.sleep(0.05)
        engine = psutil.Process(server.process.pid).children(recursive=True)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, left = psutil.wait_procs(engine, timeout=30)
        assert not left, "an engine outlives its server"

    started = time.monotonic()
    with start_server(data_dir) as server:
        print(f"\nsecond start: {time.monotonic() - started:.0f} s")
        assert server.client.get(f"/v1/fits/{job['id']}").json()["status"] in ("queued", "running")
        assert versions(server, "kept") == [before]
        assert server.text({"artifact": "kept"}, max_tokens=8) == text
        finished = server.wait_for_fit(job["id"], "succeeded", "failed", seconds=300)
        assert (finished["status"], finished["artifact"]) == ("succeeded", "interrupted@1")
        assert [version["version"] for version in versions(server, "interrupted")] == [1]
        assert len(server.client.get("/v1/fits").json()["data"]) == 1
        stopped = submit(server, pairs * 20, "stopped")
        server.wait_for_fit(stopped["id"], "running")
    # A stopped server takes the job up again at its next start: it must not be on disk as failed.
    record = json.loads((data_dir / "fits" / f"{stopped['id']}.json").read_text())
    assert record["job"]["status"] in ("queued", "running")


def polyhelm(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")}
    return subprocess.run([POLYHELM, *arguments], capture_output=True, text=True, env=environment, timeout=180)


@pytest.fixture(scope="module")
def pairs_file(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(pair) for pair in pairs[:4]) + "\n\n")
    return str(file)


def test_command_line_fits_on_a_running_server(server: Server, pairs_file: str) -> None:
    options = ("--layers", "12-14,20", "--strength", "2.5", "--pooling", "mean", "--description", "by hand", "--json")
    done = polyhelm("fit", "caa", "--url", server.base_url, "--pairs", pairs_file, "--name", "by-cli", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifact"] == "by-cli@1"
    manifest = versions(server, "by-cli")[0]["manifest"]
    assert (manifest["default_layers"], manifest["default_strength"]) == ([12, 13, 14, 20], 2.5)
    assert (manifest["description"], manifest["provenance"]["data"]["name"]) == ("by hand", "pairs.jsonl")


def test_command_line_fits_without_a_server_and_prints_only_the_result(
    models: Path, pairs_file: str, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(models)
    options = ("--data-dir", str(tmp_path), "--variant", "pca", "--json")
    done = polyhelm("fit", "caa", "--pairs", pairs_file, "--name", "alone", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifact"] == "alone@1"
    assert polyhelm("artifact", "verify", "alone@1", "--data-dir", str(tmp_path)).returncode == 0


def test_command_line_reads_the_data_folder_of_a_running_server(server: Server) -> None:
    folder = ("--data-dir", str(server.data_dir), "--json")
    listed = polyhelm("artifact", "list", *folder)
    assert listed.returncode == 0, listed.stderr
    assert {"one", "two"} <= {row["name"] for row in json.loads(listed.stdout)}
    shown = polyhelm("artifact", "show", "one@1", *folder)
    assert json.loads(shown.stdout)["digest"] == server.client.get("/v1/artifacts/one/versions/1").json()["digest"]
    verified = polyhelm("artifact", "verify", *folder)
    assert (verified.returncode, json.loads(verified.stdout)) == (0, {"ok": True, "problems": []})


def test_doctor_finds_nothing_wrong_but_the_port_in_use(server: Server, tmp_path: Path) -> None:
    port = server.base_url.rpartition(":")[2]
    healthy = polyhelm("doctor", "--json", "--data-dir", str(server.data_dir), "--port", "0")
    findings = {finding["check"]: finding for finding in json.loads(healthy.stdout)}
    assert healthy.returncode == (0 if all(finding["ok"] for finding in findings.values()) else 1)
    for check in ("python", "engine", "vLLM plugin", "torch", "data folder", "artifacts"):
        assert findings[check]["ok"], findings[check]
    taken = polyhelm("doctor", "--json", "--data-dir", str(tmp_path), "--port", port)
    (finding,) = (each for each in json.loads(taken.stdout) if each["check"] == "port")
    assert (taken.returncode, finding["ok"]) == (1, False)
    assert "choose another --port" in finding["remedy"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["fit", "caa", "--name", "x"], "--pairs"),
        (["fit", "caa", "--pairs", "missing.jsonl", "--name", "x"], "missing.jsonl"),
        (["fit", "no-such-method"], "no-such-method"),
        (["fit", "sadi", "--pairs", "FILE", "--name", "x", "--component", "head"], "component"),
        (["fit", "incline", "--pairs", "FILE", "--name", "x"], "--source-language"),
        (["fit", "caa", "--pairs", "FILE", "--name", "x", "--strength", "much"], "--strength"),
        (["fit", "caa", "--pairs", "FILE", "--name", "x", "--pooling", "first"], "pooling"),
        (["fit", "caa", "--pairs", "FILE", "--name", "x", "--layers", "a-b"], "layers"),
        (["fit", "caa", "--pairs", "FILE", "--name", "x" * 65], "name"),
        (["artifact", "show"], "ref"),
        (["doctor", "--port", "99999999"], "--port"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_option(pairs_file: str, arguments: list[str], word: str) -> None:
    done = polyhelm(*(pairs_file if argument == "FILE" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "word"), [("{}\n\n{not json\n", "line 3"), ('{"positive": "a"}\n', "negative"), ("", "at least 2")]
)
def test_pairs_that_cannot_be_read_exit_with_2_and_name_the_place(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    done = polyhelm("fit", "caa", "--url", "http://127.0.0.1:9", "--pairs", str(file), "--name", "x")
    assert done.returncode == 2, done.stderr
    assert word in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid", "127.0.0.1:9"])
def test_unreachable_server_exits_with_1_and_says_which(pairs_file: str, url: str) -> None:
    done = polyhelm("fit", "caa", "--url", url, "--pairs", pairs_file, "--name", "x")
    assert done.returncode == 1
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_refusal_of_the_server_exits_with_1_and_its_reason(server: Server, pairs_file: str) -> None:
    done = polyhelm("fit", "caa", "--url", server.base_url, "--pairs", pairs_file, "--name", "Upper")
    assert done.returncode == 1
    assert "not allowed: use" in done.stderr
