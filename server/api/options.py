"""An intervention's options, checked against each other and against the kind of its artifact."""

from __future__ import annotations

import math

from methods import kinds
from methods.kinds import Bounds, OptionError, Part
from server.api import steering_schema as schema
from server.api.steering_schema import LAST_PROMPT_TOKEN, Intervention
from server.engine.spans import Span
from steering_store.manifest import Manifest

FIT_STRENGTH = ("add", "add_norm", "scale", "map", "features")
"""The ops whose strength defaults to the artifact's; for the others 1 does all there is to do."""


def with_default_features(intervention: Intervention, manifest: Manifest) -> Intervention:
    """The intervention, with the artifact's own features where it lists none and the artifact has such."""
    if intervention.features is not None or manifest.default_features is None or manifest.default_features == "all":
        return intervention
    features = [schema.Feature(**each.model_dump()) for each in manifest.default_features]
    return intervention.model_copy(update={"features": features})


def chosen_op(intervention: Intervention, manifest: Manifest) -> str:
    """The op, by default the kind's own; `features` for a sae. OptionError for options that it doesn't have."""
    kind = manifest.kind
    ops = kinds.OPS[kind]
    if (kind == "sae") != (intervention.features is not None or manifest.default_features == "all"):
        remedy = "list those to change" if kind == "sae" else "leave it out"
        raise OptionError(
            "features", f"this artifact is a {kind}, and only a sae has features, which it needs; {remedy}"
        )
    if intervention.op is not None and intervention.op not in ops:
        instead = " or ".join(map(repr, ops)) or "an op for each of its features"
        raise OptionError("op", f"{intervention.op!r} isn't what a {kind} does; it takes {instead}")
    op = intervention.op or (ops[0] if ops else "features")
    for name in ("value", "min", "max"):
        if getattr(intervention, name) is not None and op != "clamp":
            raise OptionError(name, "is for op clamp only; leave it out")
    return op


def chosen_strength(intervention: Intervention, op: str, manifest: Manifest, most: float, scale: float = 1.0) -> float:
    """The strength times `scale`, which a preset has. OptionError unless it is finite and at most `most`."""
    if op == "set" and (intervention.strength is not None or scale != 1):
        raise OptionError("strength", "op set replaces the whole activation and has no strength; leave it out")
    default = manifest.default_strength if op in FIT_STRENGTH else 1.0
    strength = scale * (default if intervention.strength is None else intervention.strength)
    if not math.isfinite(strength) or abs(strength) > most:
        raise OptionError("strength", f"strength {strength} must be a finite number of at most {most:g}")
    return strength


def chosen_layers(intervention: Intervention, manifest: Manifest, reference: str) -> tuple[int, ...]:
    """OptionError for layers that the artifact lacks, or more than one of a sae's."""
    available = manifest.layers
    layers = sorted(set(intervention.layers or manifest.default_layers or available))
    if missing := sorted(set(layers) - set(available)):
        raise OptionError(
            "layers", f"{reference} has nothing for layers {missing}; it has layers {available[0]} to {available[-1]}"
        )
    if manifest.kind == "sae" and len(layers) != 1:
        raise OptionError("layers", f"the features of a sae belong to one layer; choose one of {layers}")
    return tuple(layers)


def chosen_span(intervention: Intervention, mode: str) -> Span:
    """OptionError where mode "frozen" is to touch anything but the last prompt token."""
    span = intervention.apply.span()
    if mode == "live":
        return span
    if "apply" in intervention.model_fields_set and span != LAST_PROMPT_TOKEN:
        raise OptionError(
            "apply",
            'mode "frozen" edits the last prompt token only: leave apply out, or write {"prompt_positions": [-1]}',
        )
    return LAST_PROMPT_TOKEN


def parts(
    intervention: Intervention, op: str, strength: float, layers: tuple[int, ...], manifest: Manifest, most: float
) -> tuple[Part, ...]:
    """What the intervention does, as edits without a place. `most` bounds the values of features."""
    renorm = (Part("renorm"),) if intervention.renorm else ()
    if manifest.kind == "neuron_set":
        return kinds.neuron_set(strength) + renorm
    if manifest.kind == "linear_map":
        return kinds.linear_map(strength, layers, _has_bias(manifest, layers)) + renorm
    if manifest.kind == "sae":
        assert manifest.activation is not None
        if intervention.features is None:
            return kinds.whole_sae(strength, layers[0], manifest.activation) + renorm
        count = next(site.shape[0] for site in manifest.sites if (site.layer, site.role) == (layers[0], "encoder"))
        features = [
            _feature(f"features.{number}", feature, count, most)
            for number, feature in enumerate(intervention.features or ())
        ]
        return kinds.sae(strength, layers[0], manifest.activation, features) + renorm
    bounds = Bounds.of(intervention.min, intervention.max, intervention.value) if op == "clamp" else None
    return kinds.steering_vector(op, strength, bounds) + renorm


def _has_bias(manifest: Manifest, layers: tuple[int, ...]) -> bool:
    biased = {site.layer for site in manifest.sites if site.role == "bias"} & set(layers)
    if biased and biased != set(layers):
        raise OptionError(
            "layers", f"the map has a bias at layers {sorted(biased)} only: choose these, or only others of {layers}"
        )
    return bool(biased)


def _feature(where: str, feature: schema.Feature, count: int, most: float) -> kinds.Feature:
    if feature.index >= count:
        raise OptionError(f"{where}.index", f"{feature.index} isn't below the {count} features of this sae")
    given = {name: getattr(feature, name) for name in ("value", "min", "max") if getattr(feature, name) is not None}
    for name, value in given.items():
        if abs(value) > most:
            raise OptionError(f"{where}.{name}", f"{value} must be at most {most:g}")
        if feature.op == "ablate" or (feature.op != "clamp" and name != "value"):
            raise OptionError(f"{where}.{name}", f"isn't for op {feature.op}; leave it out")
    if feature.op == "clamp":
        try:
            return kinds.Feature(feature.index, "clamp", bounds=Bounds.of(feature.min, feature.max, feature.value))
        except OptionError as error:
            raise OptionError(f"{where}.{error.field}", str(error)) from None
    if feature.op != "ablate" and feature.value is None:
        raise OptionError(f"{where}.value", f"op {feature.op} needs one")
    return kinds.Feature(feature.index, feature.op, feature.value or 0.0)
