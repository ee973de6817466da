"""What a store must hold after a history: its rules once more, in a few lines and without a disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save

from steering_store import ArtifactVersion, Store
from steering_store.errors import ArtifactNotFound, InUse, Yanked

FILE, SECOND = "vectors.safetensors", "second.safetensors"
REFUSALS = (ArtifactNotFound, InUse, Yanked)

Operation = list[Any]
"""An action and its arguments, as JSON holds them: ["publish", "a", 2.0]."""


Value = float | str
"""What a version holds: one file with this fill, or `pair:FILL`, two of them, the first the same as that of the fill
alone; or `preset:NAME:VALUE`, a preset of the version of NAME with that value."""


def content(fill: float, layer: int = 2) -> bytes:
    return save({f"layer.{layer}": np.full(8, fill, np.float32)})


def contents(value: Value) -> dict[str, bytes]:
    """The files of a version."""
    if isinstance(value, float):
        return {FILE: content(value)}
    kind, _, rest = value.partition(":")
    return {} if kind == "preset" else {FILE: content(float(rest)), SECOND: content(float(rest), layer=1)}


def pair_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (site,) = manifest["sites"]
    return manifest | {"sites": [site, site | {"layer": 1, "file": SECOND, "tensor": "layer.1"}]}


def preset_of(manifest: dict[str, Any], reference: str) -> dict[str, Any]:
    common = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    return common | {"kind": "preset", "interventions": [{"artifact": reference}]}


def perform(store: Store, manifest: dict[str, Any], operation: Operation) -> Any:
    """Do it, and return what is acknowledged: the number of a published version, or True, or None for a refusal."""
    action, *arguments = operation
    try:
        if action == "publish":
            name, fill = arguments
            return store.publish(name, manifest, contents(fill)).version.version
        if action == "publish_pair":
            name, fill = arguments
            return store.publish(name, pair_of(manifest), contents(f"pair:{fill}")).version.version
        if action == "publish_preset":
            name, target, number = arguments
            return store.publish(name, preset_of(manifest, f"{target}@{number}"), {}).version.version
        if action == "collect":
            store.collect_garbage(grace_seconds=0, dry_run=False)
        else:
            getattr(store, action)(*arguments)
    except REFUSALS:
        return None
    return True


@dataclass
class Model:
    """The state that matters: live versions by name and number, with what they hold; the highest numbers;
    which are yanked; where the aliases point; and the audit trail."""

    versions: dict[tuple[str, int], Value] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    yanked: set[tuple[str, int]] = field(default_factory=set)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    trail: list[tuple[str, str, str | None, int | None, int | None]] = field(default_factory=list)

    def apply(self, operation: Operation) -> Any:
        """Change the state, and return what the store must acknowledge."""
        action, *arguments = operation
        acknowledged: Any = getattr(self, "_" + action)(*arguments)
        return acknowledged

    def _publish_pair(self, name: str, fill: float) -> int:
        return self._publish(name, f"pair:{fill}")

    def _publish_preset(self, name: str, target: str, number: int) -> int | None:
        if (target, number) not in self.versions:
            return None
        return self._publish(name, f"preset:{target}:{self.versions[target, number]}")

    def _publish(self, name: str, fill: Value) -> int:
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
        held = held or f"preset:{name}:{self.versions.get((name, number))}" in self.versions.values()
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


def held(store: Store, version: ArtifactVersion) -> Value:
    """What a version holds, every byte of it read."""
    if version.manifest.interventions is not None:
        (target,) = version.manifest.interventions
        pinned = store.resolve(target.artifact)
        return f"preset:{pinned.name}:{held(store, pinned)}"
    tensors = store.load_tensors(version)
    (fill,) = {float(value) for tensor in tensors.values() for value in tensor}
    assert set(tensors) in ({"layer.2"}, {"layer.1", "layer.2"})
    return f"pair:{fill}" if len(tensors) == 2 else fill


def observed(store: Store, names: tuple[str, ...]) -> Model:
    """The state of a store, every file of it read."""
    model = Model()
    for name in names:
        try:
            versions = store.versions(name, include_yanked=True)
        except ArtifactNotFound:
            versions = []
        for version in versions:
            model.versions[name, version.version] = held(store, version)
            model.yanked |= {(name, version.version)} if version.yanked else set()
        try:
            model.aliases |= {(name, alias.alias): alias.version for alias in store.aliases(name)}
            history = store.history(name)
        except ArtifactNotFound:
            continue
        model.trail += [(name, e.action, e.alias, e.from_version, e.to_version) for e in history]
    return model
