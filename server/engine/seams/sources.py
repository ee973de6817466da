"""Reads Python packages as sources, by their syntax trees: what is defined, with which parameters and attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Found(NamedTuple):
    """A definition and the module that holds it; `node` is None for a module, and for a plain value."""

    module: str
    node: Definition | None


class Sources:
    """The packages that lie in one folder. Nothing is imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, Tree | None] = {}

    def tree(self, module: str) -> Tree | None:
        """A module's tree; None if there is no such module."""
        if module not in self._trees:
            path = self.folder.joinpath(*module.split("."))
            file = next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)
            self._trees[module] = None if file is None else Tree(file)
        return self._trees[module]

    def find(self, module: str, name: str) -> Found | None:
        """What `from module import name` gives, followed through re-exports; None if there is nothing."""
        tree = self.tree(module)
        if tree is None:
            return None
        if name in tree.definitions:
            return Found(module, tree.definitions[name])
        if name in tree.imports:
            source, original = tree.imports[name]
            source = self._absolute(module, source)
            # Outside of the folder there is nothing to read.
            return self.find(source, original) if self.tree(source.split(".")[0]) else Found(source, None)
        if name in tree.values:
            return Found(module, None)
        for source in tree.stars:
            if found := self.find(self._absolute(module, source), name):
                return found
        return Found(f"{module}.{name}", None) if self.tree(f"{module}.{name}") is not None else None

    def _absolute(self, module: str, relative: str) -> str:
        if not relative.startswith("."):
            return relative
        tail = relative.lstrip(".")
        package = self.folder.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".")[: None if package else -1]
        kept = parts[: len(parts) - (len(relative) - len(tail) - 1)]
        return ".".join([*kept, *([tail] if tail else [])])

    def function(self, module: str, qualified: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """A function, or `Class.method`, which may be inherited."""
        owner, _, method = qualified.rpartition(".")
        if not owner:
            found = self.find(module, method)
            return found.node if found and isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef) else None
        for _, node in self.lineage(module, owner):
            for each in node.body:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name == method:
                    return each
        return None

    def lineage(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases, as far as they are in the folder."""
        found = self.find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return
        yield found.module, found.node
        for base in found.node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name):
                yield from self.lineage(found.module, base.id)

    def fields(self, module: str, name: str) -> set[str]:
        """What a class and its bases define: fields, methods and properties."""
        return {name for _, node in self.lineage(module, name) for statement in node.body for name in _bound(statement)}

    def lacking(self, module: str, name: str, attributes: list[str]) -> list[str]:
        """Those of `attributes` that a class neither defines nor sets on `self`."""
        missing = set(attributes) - self.fields(module, name)
        for _, node in self.lineage(module, name) if missing else ():
            missing -= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and _set_on_self(each)}
        return [each for each in attributes if each in missing]


class Tree:
    """One module: what it binds at its top level, also inside `if` and `try`."""

    def __init__(self, file: Path) -> None:
        self.node = ast.parse(file.read_text("utf-8"), str(file))

    @cached_property
    def _statements(self) -> list[ast.stmt]:
        return list(_flat(self.node.body))

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        """The first definition of each name."""
        named = [each for each in self._statements if isinstance(each, Definition)]
        return {each.name: each for each in reversed(named)}

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """For a name that `from module import original` binds: (module, original)."""
        return {
            alias.asname or alias.name: ("." * each.level + (each.module or ""), alias.name)
            for each in self._statements
            if isinstance(each, ast.ImportFrom)
            for alias in each.names
        }

    @cached_property
    def stars(self) -> list[str]:
        """The modules of `from module import *`."""
        return [
            "." * each.level + (each.module or "")
            for each in self._statements
            if isinstance(each, ast.ImportFrom) and each.names[0].name == "*"
        ]

    @cached_property
    def values(self) -> set[str]:
        return {name for each in self._statements if not isinstance(each, Definition) for name in _bound(each)}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """The names of a function's parameters, in order; one that starts with `**` takes any keyword."""
    arguments = function.args
    named = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return (*named, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else []))


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(statement, field, None)
            if inner and not isinstance(statement, Definition):
                for each in inner:
                    yield from _flat(each.body if isinstance(each, ast.ExceptHandler) else [each])


def _set_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, Definition):
        return {statement.name}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
