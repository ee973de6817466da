"""Who may import whom: the pure packages stay importable without vLLM, a web framework or a GPU."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "methods", "steering_store", "kb")
WEB = ("fastapi", "starlette")
PURE_PARTS = {"server.engine.edits", "server.engine.operands", "server.engine.spans"}
ALLOWED_OF_OURS = {"methods": {"methods", *PURE_PARTS}, "steering_store": {"steering_store"}, "kb": {"kb"}}


def imported(file: Path) -> set[str]:
    """Every module that the file imports, also inside functions; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update({module}, (f"{module}.{alias.name}" for alias in node.names))
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_engine_folder_imports_vllm(package: str) -> None:
    engine = ROOT / "server" / "engine"
    offenders = [
        str(file.relative_to(ROOT))
        for file in files(package)
        if not file.is_relative_to(engine) and any(within(name, "vllm") for name in imported(file))
    ]
    assert offenders == []


@pytest.mark.parametrize("package", ALLOWED_OF_OURS)
def test_pure_packages_import_neither_the_web_nor_each_other(package: str) -> None:
    allowed = ALLOWED_OF_OURS[package]
    offenders = []
    for file in files(package):
        names = imported(file)
        ours = {name for name in names if any(within(name, other) for other in PACKAGES)}
        # `from server.engine import edits` is also seen as its package, which is no import of its own.
        parents = {name for name in ours if any(within(other, name) for other in ours & allowed)}
        foreign = {name for name in ours - parents if not any(within(name, module) for module in allowed)}
        foreign |= {name for name in names if any(within(name, web) for web in WEB)}
        offenders += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(foreign)]
    assert offenders == []


def test_importing_the_pure_packages_loads_no_engine_and_no_web_framework() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for name in ALLOWED_OF_OURS for file in files(name)
    ]
    modules = [module.removesuffix(".__init__") for module in [*modules, "server.models"]]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print({{"vllm", "fastapi"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_mypy_checks_every_pure_package() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]["files"]
    assert [package for package in ALLOWED_OF_OURS if files(package) and package not in checked] == []


def test_every_folder_and_module_of_the_map_exists() -> None:
    (block,) = re.findall(r"^## The map\n.*?^```\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)
    parents: list[tuple[int, Path]] = []
    missing = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        parents = [(depth, folder) for depth, folder in parents if depth < indent]
        here = parents[-1][1] if parents else ROOT
        for name in re.findall(r"[a-z_]+\.py", line):
            if not any(here.rglob(name)):
                missing.append(f"{here.name}/{name}")
        if match := re.match(r" *([\w.-]+)/(?:\s|$)", line):
            folder = here / match[1]
            parents.append((indent, folder))
            if not folder.is_dir():
                missing.append(str(folder.relative_to(ROOT)))
    assert missing == []
