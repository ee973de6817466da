"""The files in docker/ agree with the server's settings, and with each other."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from server.settings import MiB, Settings

DOCKER = Path(__file__).parents[2] / "docker"
TEXTS = {
    path: path.read_text("utf-8")
    for path in DOCKER.rglob("*")
    if path.suffix in {".yaml", ".tpl", ".conf", ".py"} or path.name == "Dockerfile"
}
OTHERS = {"POLYHELM_IMAGE", "POLYHELM_TARGET", "POLYHELM_COMMAND", "POLYHELM_URL", "POLYHELM_API_KEY"}
"""Of compose, Ray and LiteLLM."""
COMPOSE = yaml.safe_load(TEXTS[DOCKER / "compose.yaml"])


def test_every_variable_is_a_setting() -> None:
    settings = {f"POLYHELM_{name.upper()}" for name in Settings.model_fields}
    named = {name for text in TEXTS.values() for name in re.findall(r"POLYHELM_[A-Z_]*[A-Z]", text)}
    assert named - OTHERS - settings == set()
    assert named & settings


def test_gateways_allow_bodies_as_large_as_the_server_does() -> None:
    settings = Settings(_env_file=None)
    sizes = re.findall(r"client_max_body_size (\d+)m;", TEXTS[DOCKER / "nginx" / "nginx.conf"])
    json_bodies, artifacts = (int(size) * MiB for size in sizes)
    assert json_bodies == settings.max_body_bytes
    # The form around the files takes some room, too.
    assert settings.max_artifact_bytes < artifacts < settings.max_artifact_bytes + 64 * MiB
    (envoy,) = re.findall(r"max_request_bytes: (\d+)", TEXTS[DOCKER / "envoy" / "envoy.yaml"])
    assert int(envoy) == settings.max_body_bytes


def test_every_file_that_compose_mounts_exists() -> None:
    mounts = [mount.split(":")[0] for service in COMPOSE["services"].values() for mount in service["volumes"]]
    missing = [mount for mount in mounts if mount.startswith("./") and not (DOCKER / mount).exists()]
    assert missing == []
    named = {mount for mount in mounts if re.fullmatch(r"[a-z]+", mount)}
    assert named == COMPOSE["volumes"].keys()


def test_only_the_gateway_reaches_the_server_from_outside() -> None:
    server = COMPOSE["services"]["server"]
    assert "ports" not in server and server["networks"] == ["inside"]
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert server["read_only"] and server["cap_drop"] == ["ALL"]
    # A writable place for what the Dockerfile's volumes don't hold.
    assert server["tmpfs"] == ["/tmp"]
