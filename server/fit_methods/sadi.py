"""SADI, from questions with a right and a wrong answer: methods/sadi.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from methods import sadi
from server.fit_methods.base import (
    Activations,
    DataText,
    FitError,
    Fitted,
    ModelShape,
    OnePassSpec,
    Options,
    Part,
    Progress,
    Text,
    Wanted,
)


class AnsweredPair(Part):
    """A question, which may be empty, and what may follow it: more of the behaviour, less of it."""

    prompt: str = ""
    positive: Text
    negative: Text


class SadiOptions(Options):
    component: sadi.Component = "heads"
    selection: sadi.Selection = "signed_top"
    top_k: PositiveInt | None = None
    form: sadi.Form = "adaptive"
    default_strength: Annotated[float, Field(allow_inf_nan=False)] = 4.0


class SadiSpec(OnePassSpec):
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

    def wanted(self) -> Wanted:
        return Wanted((sadi.POINTS[self.options.component],), "last")

    def fit(self, activations: Activations, model: ModelShape, progress: Progress) -> Fitted:
        options = self.options
        config = sadi.Config(
            options.component, options.selection, options.top_k, options.form, options.default_strength
        )
        x = activations.pooled[config.point]
        fitted = sadi.fit(x[0::2], x[1::2], config, model.heads)
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
            config=asdict(config) | {"top_k": config.count} | _chosen_heads(fitted, config),
            metrics={
                "stability": fitted.stability,
                "largest_difference": max(chosen),
                "smallest_difference": min(chosen),
            },
        )


def _chosen_heads(fitted: sadi.Fit, config: sadi.Config) -> dict[str, list[list[int]]]:
    """(layer, head), best first. The tensors hold the numbers of their dimensions; other elements are told by these."""
    return {"heads": [list(each) for each in fitted.selected]} if config.component == "heads" else {}
