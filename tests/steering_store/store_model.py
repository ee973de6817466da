"""What a store must hold after a history: its rules once more, in a few lines and without a disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save

from steering_store import Store
from steering_store.errors import ArtifactNotFound, InUse, Yanked

FILE = "vectors.safetensors"
REFUSALS = (ArtifactNotFound, InUse, Yanked)

Operation = list[Any]
"""An action and its arguments, as JSON holds them: ["publish", "a", 2.0]."""


def content(fill: float) -> bytes:
    return save({"layer.2": np.full(8, fill, np.float32)})


def perform(store: Store, manifest: dict[str, Any], operation: Operation) -> Any:
    """Do it, and return what is acknowledged: the number of a published version, or True, or None for a refusal."""
    action, *arguments = operation
    try:
        if action == "publish":
            name, fill = arguments
            return store.publish(name, manifest, {FILE: content(fill)}).version.version
        if action == "collect":
            store.collect_garbage(grace_seconds=0, dry_run=False)
        else:
            getattr(store, action)(*arguments)
    except REFUSALS:
        return None
    return True


@dataclass
class Model:
    """The state that matters: live versions by name and number, with what they are filled with; the highest numbers;
    which are yanked; where the aliases point; and the audit trail."""

    versions: dict[tuple[str, int], float] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    yanked: set[tuple[str, int]] = field(default_factory=set)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    trail: list[tuple[str, str, str | None, int | None, int | None]] = field(default_factory=list)

    def apply(self, operation: Operation) -> Any:
        """Change the state, and return what the store must acknowledge."""
        action, *arguments = operation
        acknowledged: Any = getattr(self, "_" + action)(*arguments)
        return acknowledged

    def _publish(self, name: str, fill: float) -> int:
        for (other, number), there in self.versions.items():
            if (other, there) == (name, fill):
                return number
        self.last[name] = self.last.get(name, 0) + 1
        self.versions[name, self.last[name]] = fill
        self.trail.append((name, "publish", None, None, self.last[name]))
        return self.last[name]

    def _set_alias(self, name: str, alias: str, number: int) -> bool | None:
        before = self.aliases.get((name, alias))
        if before == number:
            return True
        if (name, number) not in self.versions or (name, number) in self.yanked:
            return None
        self.aliases[name, alias] = number
        self.trail.append((name, "set_alias", alias, before, number))
        return True

    def _delete_alias(self, name: str, alias: str) -> bool | None:
        before = self.aliases.pop((name, alias), None)
        if before is None:
            return None
        self.trail.append((name, "delete_alias", alias, before, None))
        return True

    def _yank(self, name: str, number: int) -> bool | None:
        if (name, number) not in self.versions:
            return None
        if (name, number) not in self.yanked:
            self.yanked.add((name, number))
            self.trail.append((name, "yank", None, number, number))
        return True

    def _unyank(self, name: str, number: int) -> bool | None:
        if (name, number) not in self.versions:
            return None
        if (name, number) in self.yanked:
            self.yanked.discard((name, number))
            self.trail.append((name, "unyank", None, number, number))
        return True

    def _delete_version(self, name: str, number: int) -> bool | None:
        held = any(other == name and there == number for (other, _), there in self.aliases.items())
        if held or (name, number) not in self.versions:
            return None
        del self.versions[name, number]
        self.trail.append((name, "delete", None, number, None))
        self.yanked.discard((name, number))
        return True

    def _collect(self) -> bool:
        return True

    def visible(self) -> tuple[object, ...]:
        """What can be seen from outside: not `last`, and not in what order things happened to different artifacts."""
        return self.versions, self.yanked, self.aliases, sorted(self.trail, key=lambda entry: entry[0])


def observed(store: Store, names: tuple[str, ...]) -> Model:
    """The state of a store, every file of it read."""
    model = Model()
    for name in names:
        try:
            versions = store.versions(name, include_yanked=True)
        except ArtifactNotFound:
            versions = []
        for version in versions:
            values = store.load_tensors(version)["layer.2"]
            assert (values == values[0]).all()
            model.versions[name, version.version] = float(values[0])
            model.yanked |= {(name, version.version)} if version.yanked else set()
        try:
            model.aliases |= {(name, alias.alias): alias.version for alias in store.aliases(name)}
            history = store.history(name)
        except ArtifactNotFound:
            continue
        model.trail += [(name, e.action, e.alias, e.from_version, e.to_version) for e in history]
    return model
