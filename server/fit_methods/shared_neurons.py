"""Neurons that languages share, from translations of the same inputs: methods/shared_neurons.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from methods import shared_neurons
from server.fit_methods import gates
from server.fit_methods.base import (
    Array,
    Capture,
    Context,
    DataText,
    FitError,
    Fitted,
    MethodSpec,
    Options,
    Part,
    Steps,
    Tensor,
    Text,
    Wanted,
)
from steering_store.manifest import Language, Role

REMEDY = "use written, the sign of what a neuron writes, which isn't the paper's"


class Parallel(Part):
    """One input in several languages."""

    texts: Annotated[dict[Language, Text], Field(min_length=2)]


class SharedNeuronsOptions(Options):
    """`active`: by the sign of what tells whether a neuron is active, its gate, or what it writes. `control`: the seed
    of a random set of the same size in each layer, in place of the category's own neurons.
    """

    form: Literal["category", "clas"] = "category"
    active: Literal["gate", "written"] = "gate"
    category: shared_neurons.Category = "all_shared"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    beta: Annotated[float, Field(allow_inf_nan=False)] = 0.2
    gamma: Annotated[float, Field(allow_inf_nan=False)] = 0.2
    control: int | None = None

    default_strength: FiniteFloat | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _only_what_the_form_reads(self) -> SharedNeuronsOptions:
        """By value, not by what was given: a job on disk holds all fields."""
        fields = type(self).model_fields
        foreign = ("category", "control") if self.form == "clas" else ("beta", "gamma")
        if given := [name for name in foreign if getattr(self, name) != fields[name].default]:
            raise ValueError(f"form {self.form} doesn't read {' or '.join(given)}: leave it out")
        return self

    @property
    def strength(self) -> float:
        """The artifact's: -1 deactivates a category, 1 is the paper's alpha of CLAS."""
        if self.default_strength is not None:
            return self.default_strength
        return 1.0 if self.form == "clas" else -1.0


class SharedNeuronsSpec(MethodSpec):
    data_field = "inputs"
    method: Literal["shared_neurons"] = "shared_neurons"
    inputs: Annotated[list[Parallel], Field(min_length=1)]
    options: SharedNeuronsOptions = SharedNeuronsOptions()

    @model_validator(mode="after")
    def _same_languages(self) -> SharedNeuronsSpec:
        for index, each in enumerate(self.inputs):
            if each.texts.keys() != self.inputs[0].texts.keys():
                raise ValueError(f"inputs.{index} and inputs.0 aren't in the same languages")
        return self

    def texts(self) -> list[DataText]:
        """Each input in all languages, in the order of the first input's."""
        order = list(self.inputs[0].texts)
        return [
            DataText(f"inputs.{index}.texts.{language}", each.texts[language])
            for index, each in enumerate(self.inputs)
            for language in order
        ]

    def captures(self) -> list[Capture]:
        points = gates.POINTS if self.options.active == "gate" else gates.POINTS[:1]
        return [Capture(tuple(self.texts()), Wanted(points, "last"))]

    def steps(self, context: Context) -> Steps:
        activations = yield self.captures()[0]
        written, options = activations.pooled["mlp_act"], self.options
        opened = None
        if options.active == "gate":
            opened = gates.opened(activations, context.model_path, "options.active", REMEDY)
        writes = np.ones(written.shape[1:], np.float32) if opened is None else opened.writes
        tally = shared_neurons.Tally(writes, options.threshold, min(shared_neurons.TOP, written.shape[2]))
        languages = list(self.inputs[0].texts)
        for start in range(0, len(written), len(languages)):
            those = slice(start, start + len(languages))
            tally.add(written[those], None if opened is None else opened.gates[those])
        tensors = _clas(tally, options) if options.form == "clas" else _category(tally, options)
        layers = sorted({layer for layer, _ in tensors})
        if not layers:
            raise FitError("options.share", f"no neuron belongs to it in {options.share:.0%} of the inputs; lower it")
        if missing := sorted(set(options.default_layers or ()) - set(layers)):
            raise FitError("options.default_layers", f"no neuron was chosen at layers {missing}, only at {layers}")
        report = tally.report()
        metrics = {
            **_by_category("", report.share),
            **_by_layer("share", report.share),
            "neurons": float(sum(tensor.size for (_, role), tensor in tensors.items() if role is None)),
        }
        if opened is not None:
            metrics |= _by_category("contribution.", report.contribution)
            metrics |= _by_layer("contribution", report.contribution) | _by_layer("top_share", report.top_share)
            metrics["gates_error"] = opened.error
        return Fitted(
            kind="neuron_set",
            point="mlp_act",
            tensors=tensors,
            default_strength=options.strength,
            default_layers=options.default_layers or layers,
            config=options.model_dump(exclude={"default_layers", "default_strength"})
            | {"languages": languages, "gated": opened is not None},
            metrics=metrics,
            languages=languages,
            seed=options.control,
        )


def _by_category(prefix: str, shares: Array) -> dict[str, float]:
    means = map(float, shares.mean(axis=1))
    return dict(zip((f"{prefix}{category}" for category in shared_neurons.CATEGORIES), means, strict=True))


def _by_layer(name: str, shares: Array) -> dict[str, float]:
    return {
        f"{name}.{category}.{layer}": float(share)
        for category, by_layer in zip(shared_neurons.CATEGORIES, shares, strict=True)
        for layer, share in enumerate(by_layer)
    }


def _category(tally: shared_neurons.Tally, options: SharedNeuronsOptions) -> dict[tuple[int, Role | None], Tensor]:
    members = tally.members(options.category, options.share)
    if options.control is not None:
        members = shared_neurons.control(members, tally.neurons, options.control)
    return {(layer, None): neurons for layer, neurons in enumerate(members) if len(neurons)}


def _clas(tally: shared_neurons.Tally, options: SharedNeuronsOptions) -> dict[tuple[int, Role | None], Tensor]:
    partial, specific = (tally.members(category, options.share) for category in ("partial_shared", "specific"))
    tensors: dict[tuple[int, Role | None], Any] = {}
    for layer, (neurons, weights) in enumerate(shared_neurons.clas(partial, specific, options.beta, options.gamma)):
        if len(neurons):
            tensors |= {(layer, None): neurons, (layer, "weights"): weights}
    return tensors
