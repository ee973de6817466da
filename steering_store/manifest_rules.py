"""What a manifest's fields owe to each other; each field alone is the schema's business."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from steering_store.errors import InvalidManifest, InvalidName, UnsupportedFile
from steering_store.kind_rules import check_kind
from steering_store.reference import check_file_path

if TYPE_CHECKING:
    from steering_store.manifest import Manifest


T = TypeVar("T")


def check_manifest(manifest: Manifest) -> None:
    """Raise InvalidManifest, naming the field, where two fields of a manifest contradict each other."""
    _check_files(manifest)
    _check_sites(manifest)
    check_kind(manifest)
    _check_strength(manifest)
    _check_layers(manifest)


def _check_files(manifest: Manifest) -> None:
    fields = [(f"sites.{i}.file", site.file, ".safetensors") for i, site in enumerate(manifest.sites)]
    fields += [(f"files.{i}.path", entry.path, "") for i, entry in enumerate(manifest.files)]
    fields += [("labels", manifest.labels, ".jsonl")] if manifest.labels is not None else []
    for param, path, suffix in fields:
        try:
            check_file_path(path)
        except (InvalidName, UnsupportedFile) as exc:
            raise InvalidManifest(f"{param}: {exc.message}", param) from None
        if not path.endswith(suffix):
            raise InvalidManifest(f"{param}: {path!r} must be a {suffix} file; convert it", param)
    if repeated := _repeated(entry.path for entry in manifest.files):
        raise InvalidManifest(f"files: {repeated!r} is listed twice; list each file once", "files")


def _check_sites(manifest: Manifest) -> None:
    seen: set[tuple[int, str | None]] = set()
    file_of: dict[str, str] = {}
    for i, site in enumerate(manifest.sites):
        if site.layer >= manifest.model.num_layers:
            raise InvalidManifest(
                f"sites.{i}.layer: {site.layer} is not below model.num_layers, {manifest.model.num_layers}",
                f"sites.{i}.layer",
            )
        if site.point == "resid_pre" and site.layer > 0:
            raise InvalidManifest(
                f"sites.{i}.layer: resid_pre is at layer 0 only; write resid_post.{site.layer - 1}, the same tensor",
                f"sites.{i}.layer",
            )
        if site.point != manifest.point:
            raise InvalidManifest(
                f"sites.{i}.point: {site.point}, but the first site is at {manifest.point}; publish two artifacts",
                f"sites.{i}.point",
            )
        if (site.layer, site.role) in seen:
            named = f"{site.point}.{site.layer}" + (f" with role {site.role}" if site.role else "")
            raise InvalidManifest(f"sites.{i}: {named} is listed twice; keep one", f"sites.{i}")
        seen.add((site.layer, site.role))
        if file_of.setdefault(site.tensor, site.file) != site.file:
            raise InvalidManifest(
                f"sites.{i}.tensor: {site.tensor!r} is in two files; give each tensor its own name", f"sites.{i}.tensor"
            )


def _check_strength(manifest: Manifest) -> None:
    if manifest.strength_range is None:
        return
    low, high = manifest.strength_range
    if low > high:
        raise InvalidManifest(f"strength_range: {low} is above {high}; write the lower first", "strength_range")
    if not low <= manifest.default_strength <= high:
        raise InvalidManifest(
            f"default_strength: {manifest.default_strength} is outside strength_range, {low} to {high}",
            "default_strength",
        )


def _check_layers(manifest: Manifest) -> None:
    layers = {site.layer for site in manifest.sites}
    default = manifest.default_layers
    if default is not None and (not default or _repeated(default) is not None or not layers.issuperset(default)):
        raise InvalidManifest(
            f"default_layers: {default} must name some of the sites' layers, {sorted(layers)}, each once",
            "default_layers",
        )
    for layer in manifest.h_norm:
        if layer >= manifest.model.num_layers:
            raise InvalidManifest(
                f"h_norm.{layer}: the layer is not below model.num_layers, {manifest.model.num_layers}",
                f"h_norm.{layer}",
            )


def _repeated(items: Iterable[T]) -> T | None:
    seen: set[T] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None
