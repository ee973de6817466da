"""The commands of README, CONTRIBUTING, SECURITY and docs/ are run, as they stand, against the session's server.

A block of shell commands that can't be run here has `<!-- not run: why -->` before it. Blocks of Python that speak to
the server are run, too. In a block, the address http://127.0.0.1:8000 becomes that of the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from safetensors.numpy import save

from steering_store import Store

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"
SHELL = {"bash", "sh", "shell", "console"}
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M)
LANGUAGES = {"en": "The day is {}", "de": "Der Tag ist {}", "fr": "Le jour est {}"}
WORDS = ("cold", "warm", "long", "short", "good", "bad", "new", "old", "dark", "bright", "dry", "wet")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            yield Block(str(page.relative_to(ROOT)), line, match["language"], match["code"], match["reason"])


def is_run(block: Block) -> bool:
    shell = block.language in SHELL
    return block.reason is None and (shell or (block.language == "python" and ADDRESS in block.code))


RUN = [block for block in blocks() if is_run(block)]


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def inputs(server: Server, pairs: list[dict[str, str]]) -> dict[str, bytes]:
    """The files that the commands read, by name."""
    questions = [{"prompt": f"Is it {word}?", "positive": "no", "negative": "yes"} for word in WORDS]
    translated = [{"source": f"Il fait {word}", "target": f"It is {word}"} for word in WORDS]
    parallel = [{"texts": {code: text.format(word) for code, text in LANGUAGES.items()}} for word in WORDS]
    tasks = [{"prompt": f"A {word} day is", "choices": [" good", " bad"], "answer": 0} for word in WORDS]
    return {
        "pairs.jsonl": jsonl(*pairs),
        "refusals.jsonl": jsonl(*pairs),
        "questions.jsonl": jsonl(*questions),
        "swahili.jsonl": jsonl(*translated),
        "parallel.jsonl": jsonl(*parallel),
        "task.jsonl": jsonl(*(each | {"split": "validation"} for each in tasks[:3])),
        "test.jsonl": jsonl(*(each | {"split": "test"} for each in tasks[3:])),
        "manifest.json": json.dumps(server.manifest()).encode(),
        "vectors.safetensors": save(server.vectors(1)),
    }


@pytest.fixture(scope="module")
def documented(server: Server) -> Server:
    """The server with artifacts by the names that the pages use."""
    for seed, name in enumerate(("sentiment", "french"), 11):
        server.publish(name, seed=seed)
    return server


@pytest.fixture
def folder(inputs: dict[str, bytes], models: Path, tmp_path: Path) -> Path:
    """Where the commands of a page are run, one after the other: with the files, and a data directory with `mine@1`."""
    for name, content in inputs.items():
        (tmp_path / name).write_bytes(content)
    # curl says with its exit code that it got an error.
    (tmp_path / ".curlrc").write_text("fail-with-body\n")
    data_dir = tmp_path / "polyhelm-data"
    data_dir.mkdir()
    (data_dir / "models").symlink_to(models)
    store = Store(data_dir / "artifacts")
    store.publish("mine", inputs["manifest.json"], {"vectors.safetensors": inputs["vectors.safetensors"]})
    return tmp_path


@pytest.mark.engine
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_commands_of_the_documentation_work(page: str, documented: Server, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing: install it (Debian: apt-get install curl)")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    environment |= {"PYTHONPATH": str(ROOT), "CURL_HOME": str(folder)}
    for block in (each for each in RUN if each.page == page):
        code = block.code.replace(ADDRESS, documented.base_url)
        interpreter = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run(
            [*interpreter, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{code}\n{done.stdout}\n{done.stderr}"


def test_every_block_of_commands_is_found() -> None:
    # A changed form of the fences must not empty the test above.
    assert any(block.page == "README.md" and "curl" in block.code for block in RUN)
    fences = sum(len(re.findall(r"^```(?:bash|sh|shell|console)$", page.read_text("utf-8"), re.M)) for page in PAGES)
    assert fences == sum(block.language in SHELL for block in blocks())


def test_what_is_not_run_says_why() -> None:
    reasons = [block.reason for block in blocks() if block.language in SHELL and not is_run(block)]
    assert all(reason and len(reason.split()) > 2 for reason in reasons)
