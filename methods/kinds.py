"""From an artifact and the options of an intervention to edits: one function per artifact kind. Pure numpy.

For an activation x, with v^ = v / ||v||, a_k(x) = activation(x . e_k + b_k) the features of an SAE, s the strength of
the intervention, and every coefficient read from x as it was before the edit:

| kind, op | opcode | what it does |
|---|---|---|
| steering_vector add | add | x += s v |
| steering_vector add_norm | add_norm | x += s ||x|| v^ |
| steering_vector ablate | rank, e = d = v^, f = identity | x -= s (x . v^) v^ |
| steering_vector clamp | rank, e = d = v^, f = clip to [min, max] minus current | x += s (clip(x . v^) - x . v^) v^ |
| steering_vector set | set | x = v |
| neuron_set scale | scale | x_i *= 1 + s m_i |
| linear_map map | map, add | x += s (W x + b), b = 0 where it has no bias |
| sae clamp | rank, f = clip to [min, max] minus current | a_k becomes clip(a_k): x += s (clip(a_k) - a_k) d_k |
| sae ablate | rank, f = 0 minus current | a_k becomes 0: x -= s a_k d_k |
| sae scale | rank, f = 0 minus current, d = -value d_k | a_k becomes (1 + value) a_k: x += s value a_k d_k |
| sae, all of its features | rank, f = activation | x += s sum_k a_k d_k |
| sae add | add, v = sum_k value_k d_k | a_k becomes a_k + value: x += s value d_k |

A decoder is linear, so that changing features and decoding, plus what the SAE had left unexplained, is the same as
adding the change times the decoder rows: `decode(a') + (x - decode(a)) = x + sum_k (a'_k - a_k) d_k`. Only the rows of
the chosen features are needed, and neither the decoder's bias nor the other features. All clamps, ablations and scales
of an intervention are one `rank`, so that they read the same x; the `add` comes behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from server.engine.edits import Activation, Function, Opcode

Float32 = npt.NDArray[np.float32]
Tensors = Mapping[str | None, npt.NDArray[Any]]
"""An artifact's tensors of one layer, by role."""

Form = Literal["vector", "projection", "mask", "map", "bias", "features", "sum"]
FeatureOp = Literal["add", "scale", "clamp", "ablate"]

OPS: dict[str, tuple[str, ...]] = {
    "steering_vector": ("add", "add_norm", "ablate", "clamp", "set"),
    "neuron_set": ("scale",),
    "linear_map": ("map",),
    "sae": (),
}
"""The `op`s of an intervention, by kind of artifact, the default first; a sae has them per feature."""

UNBOUNDED = float(np.finfo(np.float32).max)
"""A bound that never holds, for a row beside rows that have one. JSON has no infinity."""

_ROLES: dict[Form, tuple[str | None, ...]] = {
    "vector": (None,),
    "projection": (None,),
    "mask": (None, "weights"),
    "map": ("matrix", "left", "right"),
    "bias": ("bias",),
    "features": ("encoder", "encoder_bias", "threshold", "decoder"),
    "sum": ("decoder",),
}


class OptionError(ValueError):
    """Options that contradict each other or the artifact's kind; `field` is the one to correct."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an edit's operand is made of an artifact's tensors.

    `vector`: as it is. `projection`: a rank-1 encoder and decoder of the unit vector. `mask`: zeros [width] with the
    weights, or 1, at the indices. `map`: as it is. `bias`: a map's, as a vector. `features`: the `rows` of an SAE, its
    decoder's times `gains`. `sum`: one vector, the sum of the decoder's `rows` times `gains`. Without `layers` it is
    made for every layer; without `gains` they are 1.
    """

    form: Form
    layers: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    gains: tuple[float, ...] | None = None

    @property
    def roles(self) -> tuple[str | None, ...]:
        """The roles of the artifact's tensors that it reads, where there are such."""
        return _ROLES[self.form]

    def key(self, digest: str) -> str:
        """The name under which the operand made of that artifact is kept: equal names mean equal numbers."""
        if self.form in ("vector", "mask"):
            return digest
        recipe = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{digest}/{hashlib.sha256(recipe.encode()).hexdigest()}"

    def build(self, tensors: Tensors, width: int) -> dict[str, Float32]:
        """The operand's tensors of one layer, by the roles of `server/engine/operands.py`.

        With `rows`, the tensors of an SAE hold these rows only, in that order.
        """
        if self.form == "vector":
            return {"vector": tensors[None]}
        if self.form == "projection":
            unit = (tensors[None] / np.linalg.norm(tensors[None].astype(np.float64))).astype(np.float32)[None]
            return {"encoder": unit, "decoder": unit}
        if self.form == "mask":
            mask = np.zeros(width, np.float32)
            mask[tensors[None]] = tensors.get("weights", 1)
            return {"mask": mask}
        if self.form == "map":
            return {role: tensors[role] for role in ("matrix", "left", "right") if role in tensors}
        if self.form == "bias":
            return {"vector": tensors["bias"]}
        decoder = tensors["decoder"]
        if self.gains is not None:
            decoder = (decoder * np.array(self.gains)[:, None]).astype(np.float32)
        if self.form == "sum":
            return {"vector": decoder.sum(0, dtype=np.float64).astype(np.float32)}
        operand = {"encoder": tensors["encoder"], "bias": tensors["encoder_bias"], "decoder": decoder}
        return operand | ({"threshold": tensors["threshold"]} if "threshold" in tensors else {})


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a value is clamped to: a `value`, or from `low` to `high`, either of which may be open."""

    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, minimum: float | None, maximum: float | None, value: float | None) -> Bounds:
        """OptionError unless there is either a value, or at least one of the ends."""
        if value is not None:
            if minimum is not None or maximum is not None:
                raise OptionError("value", "takes the place of min and max; leave these out")
            return cls(value, value)
        if minimum is None and maximum is None:
            raise OptionError("value", "a clamp needs a value, or min, max or both")
        if minimum is not None and maximum is not None and minimum > maximum:
            raise OptionError("min", f"{minimum} is above max, {maximum}")
        return cls(minimum, maximum)


@dataclass(frozen=True, slots=True)
class Feature:
    """What becomes of one feature of an SAE. `value` is for add and scale, `bounds` for clamp."""

    index: int
    op: FeatureOp
    value: float = 0.0
    bounds: Bounds | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """An edit to be: what an intervention does, at sites and tokens that are its own business."""

    opcode: Opcode
    recipe: Recipe | None = None
    strength: float = 1.0
    function: Function | None = None


def steering_vector(op: str, strength: float, bounds: Bounds | None) -> tuple[Part, ...]:
    """`bounds` are those of a clamp, in units of x . v^."""
    if op == "ablate":
        return (Part("rank", Recipe("projection"), -strength, Function()),)
    if op == "clamp":
        assert bounds is not None
        return (Part("rank", Recipe("projection"), strength, _function("identity", [bounds])),)
    if op == "set":
        return (Part("set", Recipe("vector")),)
    return (Part("add" if op == "add" else "add_norm", Recipe("vector"), strength),)


def neuron_set(strength: float) -> tuple[Part, ...]:
    return (Part("scale", Recipe("mask"), strength),)


def linear_map(strength: float, layers: Sequence[int], bias: bool) -> tuple[Part, ...]:
    """Of the chosen layers only: a map is as large as a layer's weights. `bias`: whether it has one at each of them."""
    mapped = Part("map", Recipe("map", tuple(layers)), strength)
    return (mapped, Part("add", Recipe("bias", tuple(layers)), strength)) if bias else (mapped,)


def sae(strength: float, layer: int, activation: Activation, features: Sequence[Feature]) -> tuple[Part, ...]:
    """OptionError for a feature that is named twice."""
    for position, feature in enumerate(features):
        if feature.index in [other.index for other in features[:position]]:
            raise OptionError(f"features.{position}.index", f"feature {feature.index} is listed twice; keep one")
    parts = []
    if dependent := [feature for feature in features if feature.op != "add"]:
        bounds = [feature.bounds or Bounds(0.0, 0.0) for feature in dependent]
        gain, recipe = _recipe("features", layer, dependent)
        parts.append(Part("rank", recipe, strength * gain, _function(activation, bounds)))
    if added := [feature for feature in features if feature.op == "add"]:
        gain, recipe = _recipe("sum", layer, added)
        parts.append(Part("add", recipe, strength * gain))
    return tuple(parts)


def whole_sae(strength: float, layer: int, activation: Activation) -> tuple[Part, ...]:
    """All features, however many."""
    return (Part("rank", Recipe("features", (layer,)), strength, Function(activation)),)


def _recipe(form: Form, layer: int, features: Sequence[Feature]) -> tuple[float, Recipe]:
    """A gain for all rows, and the recipe. Gains in the operand would upload it again for every value of a sweep."""
    gains = [{"add": feature.value, "scale": -feature.value}.get(feature.op, 1.0) for feature in features]
    rows = tuple(feature.index for feature in features)
    if len(set(gains)) == 1:
        return gains[0], Recipe(form, (layer,), rows)
    return 1.0, Recipe(form, (layer,), rows, tuple(gains))


def _function(activation: Activation, bounds: Sequence[Bounds]) -> Function:
    low = [-UNBOUNDED if each.low is None else each.low for each in bounds]
    high = [UNBOUNDED if each.high is None else each.high for each in bounds]
    return Function(activation, _unless_all(low, -UNBOUNDED), _unless_all(high, UNBOUNDED))


def _unless_all(values: list[float], absent: float) -> tuple[float, ...] | None:
    return None if set(values) == {absent} else tuple(values)
