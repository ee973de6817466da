"""The vLLM that is installed has what polyhelm relies on, and the check sees it when something changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.seams import SeamError, contract
from server.engine.seams.sources import Sources, parameters

ROOT = Path(__file__).parents[3]
RUNNER = "vllm/v1/worker/gpu/model_runner.py"
KEYS = "vllm/v1/core/kv_cache_utils.py"


def test_the_installed_vllm_has_everything() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.engine.seams.contract"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_nothing_of_vllm_is_imported() -> None:
    code = "import sys; from server.engine.seams import contract; contract.main([]); print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


CHANGES = [
    (RUNNER, "dummy_run: bool = False", "dry: bool = False", "runner_v2: .*execute_model takes .*dry"),
    (RUNNER, "    def prepare_inputs(", "    def lay_out_inputs(", "runner_v2: .*prepare_inputs is gone"),
    (RUNNER, " self.prepare_inputs(", " self.lay_out_inputs(", "runner_v2: .*doesn't call self.prepare_inputs"),
    ("vllm/v1/core/sched/output.py", "    def prompt_len(", "    def length(", "requests: .*has no prompt_len"),
    ("vllm/v1/worker/gpu_input_batch.py", "self.num_computed_tokens_cpu", "self.done", "runner_v1: .*no num_computed"),
    (KEYS, "def generate_block_hash_extra_keys(", "def extra_keys(", "prefix_key: .*extra_keys is gone"),
    (
        "vllm/v1/core/kv_cache_manager.py",
        "from vllm.logger import",
        "from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys\nfrom vllm.logger import",
        "prefix_key: vllm.v1.core.kv_cache_manager also imports",
    ),
    ("vllm/v1/engine/utils.py", '"EngineCore', '"Core', "plugin: .*doesn't name EngineCore"),
    ("vllm/exceptions.py", "class VLLMValidationError", "class Invalid", "admission: .*VLLMValidationError is gone"),
    ("vllm/v1/engine/async_llm.py", "aggregate_engine_logging:", "logging:", "frontend: .*takes no aggregate_engine"),
]

MOVED = ("vllm/entrypoints/launchers/cli_args.py", "vllm/entrypoints/common/cli_args.py")


def test_what_changes_is_named(tmp_path: Path) -> None:
    for file in (contract.installed() / "vllm").rglob("*.py"):
        target = tmp_path / file.relative_to(contract.installed())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for file, old, new, _ in CHANGES:
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
    (before,) = (path for place in MOVED if (path := tmp_path / place).exists())
    (after,) = (tmp_path / place for place in MOVED if tmp_path / place != before)
    after.parent.mkdir(exist_ok=True)
    before.rename(after)
    found = [str(each) for each in contract.differences(tmp_path)]
    assert [expected for *_, expected in CHANGES if not any(re.search(expected, each) for each in found)] == [], found
    assert [each for each in found if "cli_args" in each] == [], "what was moved to its other place is no difference"
    after.unlink()
    gone = [str(each) for each in contract.differences(tmp_path) if "cli_args" in str(each)]
    assert len(gone) == 3, "the parser, its check, and FrontendArgs"


def test_every_attribute_listed_is_used() -> None:
    """An entry for what polyhelm no longer reads would refuse a vLLM for nothing."""
    handlers = (ROOT / "server" / "api" / "openai.py", ROOT / "server" / "app.py")
    stale = []
    for table in (contract.ATTRIBUTES, contract.ASSIGNED):
        for seam, entries in table.items():
            files = [*contract.ENGINE.rglob(f"{seam}.py"), *(handlers if seam in ("frontend", "endpoint") else ())]
            text = "".join(file.read_text() for file in files)
            assert text, f"server/engine has no {seam}.py"
            used = set(re.findall(r"\w+", text))
            stale += [f"{seam}: {name}" for names in entries.values() for name in names.split() if name not in used]
    assert stale == []


def test_an_untested_version_is_warned_about_and_refused_only_for_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine import seams

    warnings: list[str] = []
    monkeypatch.setattr(seams.log, "warning", lambda event, **fields: warnings.append(event), raising=False)
    found: list[contract.Difference] = []
    monkeypatch.setattr(contract, "differences", lambda folder: found)
    found.append(contract.Difference("prefix_key", "no matter"))
    seams._check_untested("9.9.9")
    assert len(warnings) == 1
    found.append(contract.Difference("runner_v2", "execute_model is gone"))
    with pytest.raises(SeamError, match=r"vLLM 9\.9\.9 .*execute_model is gone.*0\.32\.0"):
        seams._check_untested("9.9.9")


def test_sources_follow_imports_bases_and_stars(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("if True:\n    from .inner import Child as Renamed\n")
    (package / "inner" / "__init__.py").write_text("from package.inner.child import *\n")
    (package / "inner" / "child.py").write_text(
        "from ..base import Base\nclass Child(Base):\n    def __init__(self, a, *, b=1, **more): self.set_here = a\n"
    )
    (package / "base.py").write_text("class Base:\n    field: int\n    def method(self, x): ...\n")
    sources = Sources(tmp_path)
    assert sources.lacking("package", "Renamed", ["field", "method", "set_here", "none"]) == ["none"]
    constructor, method = (sources.function("package", f"Renamed.{name}") for name in ("__init__", "method"))
    assert constructor is not None and parameters(constructor) == ("self", "a", "b", "**more")
    assert method is not None and parameters(method) == ("self", "x")
    assert sources.find("package", "Nothing") is None
    assert sources.find("package", "base") is not None


def test_a_folder_without_vllm_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contract.main([str(tmp_path)]) == 2
    assert "holds no vllm/" in capsys.readouterr().err
