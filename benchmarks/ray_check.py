"""docker/ray on one machine: `serve run` with the shipped files, a steered answer and a stream through it, and its end.

Ray has an environment of its own, and is told there where polyhelm is:

    python3 -m venv ray && ray/bin/pip install 'ray[serve]==2.60.0' httpx
    .venv/bin/python benchmarks/ray_check.py --ray ray/bin --data-dir polyhelm-data
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from environment import environment
from replicas_check import body, publish, used

SHIPPED = Path(__file__).parents[1] / "docker" / "ray"
RESULTS = Path(__file__).parent / "results" / "ray_check.json"
START_SECONDS, STOP_SECONDS = 900, 120
BUILD = """
import yaml, polyhelm_ray
from ray.serve.schema import ServeDeploySchema
(application,) = ServeDeploySchema.model_validate(yaml.safe_load(open("serve.yaml"))).applications
polyhelm_ray.app(application.args)
"""


def configured(folder: Path, data_dir: Path) -> int:
    """The shipped files in a folder, with a free port and this data directory; returns the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    shutil.copy(SHIPPED / "polyhelm_ray.py", folder)
    config = yaml.safe_load((SHIPPED / "serve.yaml").read_text("utf-8"))
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"]["arguments"] += ["--data-dir", str(data_dir.resolve()), "--max-model-len", "2048"]
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    return port


@contextmanager
def ray_serve(programs: Path, folder: Path, data_dir: Path) -> Iterator[tuple[httpx.Client, dict[str, bool]]]:
    """A client of the running application, and what is known of its end once it has ended."""
    port = configured(folder, data_dir)
    variables = os.environ | {
        "PATH": f"{programs.resolve()}{os.pathsep}{os.environ['PATH']}",
        "POLYHELM_COMMAND": str(Path(sys.executable).with_name("polyhelm")),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = folder / "log"
    end: dict[str, bool] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(programs.resolve() / "serve"), "run", "serve.yaml"],
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=output,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
                wait_until_ready(client, process, log)
                yield client, end
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
                end["ends_on_sigint"] = True
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                end["ends_on_sigint"] = False


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit(f"Ray Serve doesn't start:\n{log.read_text('utf-8', 'replace')[-4000:]}")


def servers() -> set[int]:
    """The processes of `polyhelm serve` on this machine."""
    found = psutil.process_iter(["pid", "cmdline"])
    return {
        each.pid
        for each in found
        if "serve" in (line := each.info["cmdline"] or []) and any("polyhelm" in a for a in line)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", type=Path, required=True, help="the folder of Ray's programs")
    parser.add_argument("--data-dir", type=Path, default=Path("polyhelm-data"))
    parser.add_argument("--build-only", action="store_true", help="check the configuration, and start nothing")
    arguments = parser.parse_args()
    # Ray's own schema takes the configuration, and the file builds an application of it; no server is started.
    build = subprocess.run([str(arguments.ray.absolute() / "python"), "-c", BUILD], cwd=SHIPPED)
    if build.returncode or arguments.build_only:
        return build.returncode
    before = servers()
    with tempfile.TemporaryDirectory() as folder:
        with ray_serve(arguments.ray, Path(folder), arguments.data_dir) as (client, end):
            started = servers() - before
            checked = requests(client)
        deadline = time.monotonic() + STOP_SECONDS
        while (left := servers() & started) and time.monotonic() < deadline:
            time.sleep(1)
    results = {"environment": environment(), "servers": len(started), **checked, **end}
    results["servers_left_at_the_end"] = len(left)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    passed = results["steered"] and results["stream_has_the_receipt"] and results["stream_reads"] > 1 and not left
    return 0 if passed and started and results["status_of_an_unknown_artifact"] == 404 else 1


def requests(client: httpx.Client) -> dict[str, Any]:
    model = client.get("/v1/models").json()["data"][0]["id"]
    publish(client, "through-ray", 1).raise_for_status()
    reads, whole = 0, b""
    with client.stream(
        "POST", "/v1/completions", json=body(model, "through-ray", stream=True, max_tokens=16)
    ) as answer:
        for part in answer.iter_raw():
            reads, whole = reads + 1, whole + part
    return {
        "steered": used(client, model, "through-ray") >= 1,
        "stream_reads": reads,
        "stream_has_the_receipt": b'"fingerprint"' in whole and whole.rstrip().endswith(b"[DONE]"),
        "status_of_an_unknown_artifact": client.post(
            "/v1/completions", json=body(model, "no-such-artifact")
        ).status_code,
    }


if __name__ == "__main__":
    sys.exit(main())
