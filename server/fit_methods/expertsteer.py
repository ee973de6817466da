"""ExpertSteer, from texts of a domain and others, with a second model loaded for the fit: methods/expertsteer.py."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from methods import expertsteer, extractors
from server import experts
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
    Text,
    Wanted,
)


class Labelled(Part):
    """A text of the domain that the expert knows (`positive`), or another one."""

    text: Text
    label: Literal["positive", "negative"]


class ExpertSteerOptions(Options):
    """`expert`: an embedded model, a folder or a hub id, which the server must allow. `pairs` is the paper's P, the
    strength its epsilon. `control`: what to fit in place of the method, with the same length at the same layers.
    """

    expert: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    pairs: Annotated[int, Field(ge=1, le=1000)] = 3
    affine: bool = True
    neighbours: Annotated[int, Field(ge=1, le=100)] = 3
    mutual_information_texts: Annotated[int, Field(ge=1)] = 500
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    seed: int = 0
    control: Literal["random", "least_squares", "self_expert"] | None = None

    @model_validator(mode="after")
    def _an_expert_unless_the_target_is_its_own(self) -> ExpertSteerOptions:
        if (self.expert is None) != (self.control == "self_expert"):
            raise ValueError("name an expert, except with control self_expert, where the target is its own")
        return self


class ExpertSteerSpec(MethodSpec):
    data_field = "texts"
    method: Literal["expertsteer"] = "expertsteer"
    texts: Annotated[list[Labelled], Field(min_length=10)]
    options: ExpertSteerOptions

    def captures(self) -> list[Capture]:
        named = tuple(DataText(f"texts.{number}.text", each.text) for number, each in enumerate(self.texts))
        return [Capture(named, Wanted(("resid_post",), "last"))]

    def steps(self, context: Context) -> Steps:
        target = (yield self.captures()[0]).pooled["resid_post"]
        positive = np.array([each.label == "positive" for each in self.texts])
        options = self.options
        states = target if options.expert is None else self._expert_states(options.expert, context)
        try:
            fit = expertsteer.fit(states[positive], states[~positive], target[positive], self._config, context.progress)
        except ValueError as error:
            raise FitError("texts", str(error)) from error
        if weak := [layer for layer, each in fit.correlations.items() if each < extractors.STEERABLE]:
            raise FitError(
                "texts",
                f"at the expert's layers {weak} both sides lie alike along the direction that was found: it has no "
                "sign to steer in; give more telling texts",
            )
        vectors = fit.vectors
        if options.control == "random":
            vectors = expertsteer.random_vectors(vectors, options.seed)
        return self._fitted(replace(fit, vectors=vectors))

    @property
    def _config(self) -> expertsteer.Config:
        options = self.options
        return expertsteer.Config(
            pairs=options.pairs,
            alignment="least_squares" if options.control == "least_squares" else "auto_encoder",
            affine=options.affine,
            neighbours=options.neighbours,
            mutual_information_texts=options.mutual_information_texts,
            ridge=options.ridge,
            seed=options.seed,
        )

    def _expert_states(self, expert: str, context: Context) -> Array:
        """[texts, layers, width], from an earlier attempt where it had got so far."""
        file = context.work / f"expert-{hashlib.sha256(expert.encode()).hexdigest()[:16]}.npy"
        if file.exists():
            kept: Array = np.load(file, allow_pickle=False)
            return kept
        path = context.expert(expert)
        states = experts.last_states(path, [each.text for each in self.texts], context.progress)
        part = file.with_name(f"part-{file.name}")
        np.save(part, states, allow_pickle=False)
        part.rename(file)
        return states

    def _fitted(self, fit: expertsteer.Fit) -> Fitted:
        options, layers = self.options, sorted(fit.vectors)
        if missing := sorted(set(options.default_layers or ()) - set(layers)):
            raise FitError("options.default_layers", f"no pair ends at layers {missing}, only at {layers}")
        return Fitted(
            kind="steering_vector",
            point="resid_post",
            tensors={(layer, None): fit.vectors[layer] for layer in layers},
            default_strength=options.default_strength,
            default_layers=options.default_layers or layers,
            config=options.model_dump(exclude={"default_layers", "default_strength"})
            | {"layer_pairs": [[pair.expert, pair.target] for pair in fit.pairs]},
            metrics={
                "unexplained": float(fit.unexplained.mean()),
                "correlation": min(fit.correlations.values()),
                **{
                    f"mutual_information.{pair.expert}.{pair.target}": float(pair.mutual_information)
                    for pair in fit.pairs
                },
            },
            seed=options.seed,
        )
