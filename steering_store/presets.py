"""Presets: named lists of interventions. At publication each artifact is pinned to its digest, so that none drifts."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import JsonValue

from steering_store.errors import ArtifactNotFound, InvalidManifest, InvalidName, InvalidReference
from steering_store.manifest import Manifest, PresetItem
from steering_store.records import ArtifactVersion

Resolve = Callable[[str], ArtifactVersion]


def pinned(manifest: Manifest, resolve: Resolve) -> Manifest:
    """The manifest with every reference of its interventions as `name@sha256:HEX64`; other kinds as they are.

    Raises ArtifactNotFound, or InvalidManifest for a reference that is malformed, or to a preset, or to an artifact of
    another model than the preset's. Errors name the field.
    """
    if manifest.interventions is None:
        return manifest
    items = [_pinned(item, i, manifest, resolve) for i, item in enumerate(manifest.interventions)]
    return manifest.model_copy(update={"interventions": items})


def references(manifest: Manifest) -> list[str]:
    """Every reference of a preset's interventions and their conditions, as written; none for the other kinds."""
    items = manifest.interventions or []
    conditions = [_condition(item.options) for item in items]
    return [item.artifact for item in items] + [str(condition["artifact"]) for condition in conditions if condition]


def _pinned(item: PresetItem, i: int, manifest: Manifest, resolve: Resolve) -> PresetItem:
    options = item.options
    if condition := _condition(options):
        param = f"interventions.{i}.options.condition.artifact"
        options = options | {
            "condition": condition | {"artifact": _pin(condition["artifact"], param, manifest, resolve)}
        }
    artifact = _pin(item.artifact, f"interventions.{i}.artifact", manifest, resolve)
    return item.model_copy(update={"artifact": artifact, "options": options})


def _pin(reference: JsonValue, param: str, manifest: Manifest, resolve: Resolve) -> str:
    if not isinstance(reference, str):
        raise InvalidManifest(f"{param}: {reference!r} is no reference; write it as text, name@1", param)
    try:
        version = resolve(reference)
    except (InvalidName, InvalidReference) as exc:
        raise InvalidManifest(f"{param}: {exc.message}", param) from None
    except ArtifactNotFound as exc:
        raise ArtifactNotFound(f"{param}: {exc.message}", param) from None
    if version.manifest.kind == "preset":
        raise InvalidManifest(f"{param}: {version.ref} is a preset itself; list its interventions instead", param)
    for field in ("architecture", "hidden_size", "num_layers"):
        ours, theirs = (getattr(each.model, field) for each in (manifest, version.manifest))
        if ours != theirs:
            raise InvalidManifest(
                f"{param}: {version.ref} is for a model with {field} {theirs}, and the preset for {ours}", param
            )
    return f"{version.name}@{version.digest}"


def _condition(options: dict[str, JsonValue]) -> dict[str, JsonValue] | None:
    """The condition of an intervention, where it has one that names an artifact."""
    condition = options.get("condition")
    return condition if isinstance(condition, dict) and "artifact" in condition else None
