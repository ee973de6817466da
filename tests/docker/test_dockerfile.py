"""What the Dockerfile promises to whoever runs the image. docker/check_image.py builds and runs it for real."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By name: the image or stage that a stage begins from, and its instructions."""
    text = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            origin, _, name = rest.partition(" AS ")
            found[name] = (origin, [])
        elif word and found:
            found[list(found)[-1]][1].append((word, rest.strip()))
    return found


STAGES = stages()


def instructions(target: str) -> list[tuple[str, str]]:
    """All that lead to a target, those of the stages below it first."""
    if target not in STAGES:
        return []
    origin, own = STAGES[target]
    return [*instructions(origin), *own]


def last(target: str, word: str) -> str:
    return [rest for each, rest in instructions(target) if each == word][-1]


def environment(target: str) -> dict[str, str]:
    return dict(
        part.split("=", 1) for word, rest in instructions(target) if word == "ENV" for part in shlex.split(rest)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_numbered_user_of_group_0(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert int(user) > 0 and group == "0"


@pytest.mark.parametrize("target", TARGETS)
def test_everything_that_is_written_is_in_a_volume(target: str) -> None:
    variables = environment(target)
    volumes = [PurePosixPath(path) for path in re.findall(r'"([^"]+)"', last(target, "VOLUME"))]
    folders = {name: value for name, value in variables.items() if name.endswith(("HOME", "_DIR", "_ROOT"))}
    assert {"HOME", "HF_HOME", "POLYHELM_DATA_DIR", "NUMBA_CACHE_DIR", "VLLM_CACHE_ROOT"} <= folders.keys()
    outside = {
        name for name, value in folders.items() if not any(PurePosixPath(value).is_relative_to(v) for v in volumes)
    }
    assert outside == set()


@pytest.mark.parametrize("target", TARGETS)
def test_the_port_is_one_and_the_probe_asks_it(target: str) -> None:
    assert last(target, "EXPOSE") == environment(target)["POLYHELM_PORT"]
    assert "POLYHELM_PORT" in last(target, "HEALTHCHECK") and "/livez" in last(target, "HEALTHCHECK")
    assert environment(target)["POLYHELM_HOST"] == "0.0.0.0"


@pytest.mark.parametrize("target", TARGETS)
def test_process_1_gets_signals(target: str) -> None:
    # In the form of a list: a shell would keep SIGTERM to itself.
    assert last(target, "ENTRYPOINT").startswith("[") and last(target, "CMD").startswith("[")


def test_nothing_secret_and_nothing_unpinned_gets_in() -> None:
    everything = [(word, rest) for _, own in STAGES.values() for word, rest in own]
    assert "ADD" not in {word for word, _ in everything}
    for word, rest in everything:
        if word in ("ARG", "ENV"):
            assert not re.search(r"(?i)secret|password|token|api_?key", rest)
        if word == "RUN" and "pip install" in rest:
            assert "--no-deps" in rest
            # From pinned files, or the checkout itself without asking an index.
            assert "-r requirements/" in rest or "--no-index" in rest
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
        assert not re.search(r"https?://(?!127\.0\.0\.1)", rest)


def test_only_what_the_packages_need_is_sent_to_the_builder() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert allowed == packages | files | {"requirements"}


def test_what_is_copied_is_sent_to_the_builder() -> None:
    copied = [rest.split()[:-1] for _, own in STAGES.values() for word, rest in own if word == "COPY"]
    for source in (each for sources in copied for each in sources if "--from" not in sources[0]):
        assert (ROOT / source).exists()
