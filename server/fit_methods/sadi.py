"""SADI, from questions with a right and a wrong answer: methods/sadi.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from methods import sadi
from server.fit_methods import gates
from server.fit_methods.base import (
    Capture,
    Context,
    DataText,
    FitError,
    Fitted,
    MethodSpec,
    Options,
    Part,
    Steps,
    Text,
    Wanted,
)

REMEDY = "use written, the difference of what a neuron writes, which isn't the paper's"


class AnsweredPair(Part):
    """A question, which may be empty, and what may follow it: more of the behaviour, less of it."""

    prompt: str = ""
    positive: Text
    negative: Text


class SadiOptions(Options):
    """`by`: whether neurons are chosen by what opens them, their gate, as in the paper, or by what they write. The
    fixed form adds to what they write, and is made by that.
    """

    component: sadi.Component = "heads"
    selection: sadi.Selection = "signed_top"
    top_k: PositiveInt | None = None
    form: sadi.Form = "adaptive"
    by: Literal["gate", "written"] | None = None
    default_strength: Annotated[float, Field(allow_inf_nan=False)] = 4.0

    @model_validator(mode="after")
    def _gates_are_of_neurons(self) -> SadiOptions:
        if self.by is not None and self.component != "neurons":
            raise ValueError("by is for neurons: leave it out")
        if self.by == "gate" and self.form == "fixed":
            raise ValueError("the fixed form adds to what neurons write: by must be written, or left out")
        return self

    @property
    def by_gate(self) -> bool:
        return self.component == "neurons" and self.form == "adaptive" and self.by != "written"


class SadiSpec(MethodSpec):
    method: Literal["sadi"] = "sadi"
    pairs: Annotated[list[AnsweredPair], Field(min_length=2)]
    options: SadiOptions = SadiOptions()

    def texts(self) -> list[DataText]:
        """The question with its positive, then with its negative answer, of every pair in turn."""
        return [
            DataText(f"pairs.{index}.{side}", sadi.text(pair.prompt, getattr(pair, side)))
            for index, pair in enumerate(self.pairs)
            for side in ("positive", "negative")
        ]

    def captures(self) -> list[Capture]:
        points = gates.POINTS if self.options.by_gate else (sadi.POINTS[self.options.component],)
        return [Capture(tuple(self.texts()), Wanted(points, "last"))]

    def steps(self, context: Context) -> Steps:
        activations = yield self.captures()[0]
        options = self.options
        config = sadi.Config(
            options.component, options.selection, options.top_k, options.form, options.default_strength
        )
        x, opened = activations.pooled[config.point], None
        if options.by_gate:
            opened = gates.opened(activations, context.model_path, "options.by", REMEDY)
            x = x if opened is None else opened.gates
        fitted = sadi.fit(x[0::2], x[1::2], config, context.model.heads)
        layers = sorted(fitted.indices)
        if missing := sorted(set(options.default_layers or ()) - set(layers)):
            raise FitError("options.default_layers", f"nothing was selected at layers {missing}, only at {layers}")
        adaptive = config.form == "adaptive"
        chosen = [abs(float(fitted.scores[element])) for element in fitted.selected]
        return Fitted(
            kind="neuron_set" if adaptive else "steering_vector",
            point=config.point,
            tensors={(layer, None): (fitted.indices if adaptive else fitted.vectors)[layer] for layer in layers},
            default_strength=config.default_strength,
            default_layers=options.default_layers or layers,
            config=asdict(config) | {"top_k": config.count} | _chosen_heads(fitted, config) | _by(options, opened),
            metrics=({} if opened is None else {"gates_error": opened.error})
            | {
                "stability": fitted.stability,
                "largest_difference": max(chosen),
                "smallest_difference": min(chosen),
            },
        )


def _by(options: SadiOptions, opened: gates.Opened | None) -> dict[str, str]:
    """A model without gates is one in which a neuron is opened by what it writes."""
    return {"by": "written" if opened is None else "gate"} if options.component == "neurons" else {}


def _chosen_heads(fitted: sadi.Fit, config: sadi.Config) -> dict[str, list[list[int]]]:
    """(layer, head), best first. The tensors hold the numbers of their dimensions; other elements are told by these."""
    return {"heads": [list(each) for each in fitted.selected]} if config.component == "heads" else {}
