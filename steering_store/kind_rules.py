"""Which tensors an artifact of each kind has at a layer, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from steering_store.errors import InvalidManifest

if TYPE_CHECKING:
    from steering_store.manifest import Manifest, Site

INTEGERS = ("I32", "I64")
_SAE = frozenset({"encoder", "encoder_bias", "decoder"})
_MATRIX, _FACTORS = frozenset({"matrix"}), frozenset({"left", "right"})
ROLES: dict[str, tuple[frozenset[str | None], ...]] = {
    "steering_vector": (frozenset({None}),),
    "neuron_set": (frozenset({None}), frozenset({None, "weights"})),
    "linear_map": (_MATRIX, _FACTORS, _MATRIX | {"bias"}, _FACTORS | {"bias"}),
    "sae": (_SAE, _SAE | {"threshold"}, _SAE | {"decoder_bias"}, _SAE | {"threshold", "decoder_bias"}),
}
"""The sets of roles that a layer may have, one of them at every layer; None is a site without a role. A preset, which
has no sites, isn't here."""

_MAY_BE_ZERO = frozenset({"bias", "encoder_bias", "threshold", "decoder_bias"})

Numbered = Mapping[str | None, tuple[int, "Site"]]
"""The sites of one layer by role, each with its number in the manifest."""


def is_indices(kind: str, role: str | None) -> bool:
    """Whether a tensor holds indices of neurons rather than values."""
    return kind == "neuron_set" and role is None


def may_be_zero(manifest: Manifest) -> set[str]:
    """The tensors that may be all zeros; any other would steer nothing. A map beside a bias may."""
    biased = {site.layer for site in manifest.sites if site.role == "bias"}
    return {site.tensor for site in manifest.sites if site.role in _MAY_BE_ZERO or site.layer in biased}


def check_kind(manifest: Manifest) -> None:
    """Raise InvalidManifest, naming the field, where the sites don't make up an artifact of the manifest's kind."""
    _check_own_fields(manifest)
    if manifest.kind == "preset":
        return
    width = _width(manifest)
    for layer in manifest.layers:
        sites: Numbered = {site.role: (i, site) for i, site in enumerate(manifest.sites) if site.layer == layer}
        _check_roles(manifest, layer, sites)
        for i, site in sites.values():
            _check_dtype(manifest, i, site)
        _check_shapes(manifest.kind, width, sites)


def _check_own_fields(manifest: Manifest) -> None:
    """A field that belongs to one kind is with that kind, and with no other."""
    is_sae, is_preset = manifest.kind == "sae", manifest.kind == "preset"
    if is_sae != (manifest.activation is not None):
        remedy = "name the SAE's: identity, relu or jumprelu" if is_sae else "leave it out"
        raise InvalidManifest(f"activation: only a sae has one, and it must; {remedy}", "activation")
    if is_preset != (manifest.interventions is not None):
        remedy = "list its artifacts" if is_preset else "leave it out"
        raise InvalidManifest(f"interventions: only a preset has them, and it must; {remedy}", "interventions")
    if is_preset == bool(manifest.sites):
        remedy = "leave them out" if is_preset else "list at least one"
        raise InvalidManifest(f"sites: every artifact has them, except a preset; {remedy}", "sites")
    for field in ("labels", "default_features"):
        if getattr(manifest, field) is not None and not (is_sae and len(manifest.layers) == 1):
            raise InvalidManifest(f"{field}: only a sae of a single layer has them; leave them out", field)
    features = next((site.shape[0] for site in manifest.sites if site.role == "encoder" and site.shape), 0)
    listed = None if manifest.default_features == "all" else manifest.default_features
    for i, feature in enumerate(listed or ()):
        if feature.index >= features:
            raise InvalidManifest(
                f"default_features.{i}.index: {feature.index} is not below {features}, the number of features",
                f"default_features.{i}.index",
            )


def _width(manifest: Manifest) -> int:
    try:
        return manifest.width
    except KeyError:
        raise InvalidManifest(
            f"model.widths: the width of {manifest.point} is missing; GET /v1/capabilities tells it", "model.widths"
        ) from None


def _check_roles(manifest: Manifest, layer: int, sites: Numbered) -> None:
    allowed = ROLES[manifest.kind]
    for i, site in sites.values():
        if not any(site.role in roles for roles in allowed):
            raise InvalidManifest(
                f"sites.{i}.role: a {manifest.kind} has no tensor with role {site.role}; it has {_spelled(allowed)}",
                f"sites.{i}.role",
            )
    if sites.keys() not in allowed:
        raise InvalidManifest(
            f"sites: layer {layer} has {_spelled((frozenset(sites),))}; a {manifest.kind} has {_spelled(allowed)}",
            "sites",
        )
    if manifest.kind == "sae" and ("threshold" in sites) != (manifest.activation == "jumprelu"):
        raise InvalidManifest(
            f"sites: layer {layer}: threshold goes with activation jumprelu, and only with it", "sites"
        )


def _check_dtype(manifest: Manifest, i: int, site: Site) -> None:
    if (site.dtype in INTEGERS) != is_indices(manifest.kind, site.role):
        wanted = "I32 or I64" if is_indices(manifest.kind, site.role) else "F16, BF16, F32 or F64"
        raise InvalidManifest(
            f"sites.{i}.dtype: {site.dtype} must be {wanted} for the {site.role or 'tensor'} of a {manifest.kind}",
            f"sites.{i}.dtype",
        )


def _check_shapes(kind: str, width: int, sites: Numbered) -> None:
    """The free size (neurons, rank, features) is taken from the first tensor that has it."""
    if kind == "neuron_set":
        count = _size(*sites[None], axis=0, least=0, most=width)
        expected: dict[str | None, list[int]] = {None: [count], "weights": [count]}
    elif kind == "sae":
        features = _size(*sites["encoder"], axis=0)
        expected = dict.fromkeys(("encoder", "decoder"), [features, width])
        expected |= dict.fromkeys(("encoder_bias", "threshold"), [features])
        expected["decoder_bias"] = [width]
    elif "right" in sites:
        rank = _size(*sites["right"], axis=0)
        expected = {"left": [width, rank], "right": [rank, width], "bias": [width]}
    else:
        expected = {None: [width], "matrix": [width, width], "bias": [width]}
    for role, (i, site) in sites.items():
        if site.shape != expected[role]:
            raise InvalidManifest(
                f"sites.{i}.shape: {site.shape} must be {expected[role]} for the {role or 'tensor'} of a {kind} at "
                f"{site.point}, which is {width} wide",
                f"sites.{i}.shape",
            )


def _size(i: int, site: Site, *, axis: int, least: int = 1, most: int | None = None) -> int:
    size = site.shape[axis] if len(site.shape) > axis else -1
    if size < least or (most is not None and size > most):
        raise InvalidManifest(
            f"sites.{i}.shape: {site.shape} must hold at least {least}" + (f" and at most {most}" if most else ""),
            f"sites.{i}.shape",
        )
    return size


def _spelled(roles: tuple[frozenset[str | None], ...]) -> str:
    return ", or ".join(" and ".join(sorted(role or "a tensor without a role" for role in each)) for each in roles)
