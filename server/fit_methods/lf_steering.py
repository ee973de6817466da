"""LF-Steering, from prompts with a rephrasing that is answered wrong: methods/lf_steering.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, model_validator

from methods import lf_steering
from methods.sae import Sae
from server.fit_methods import sae_rows
from server.fit_methods.base import (
    Activations,
    Array,
    Capture,
    Context,
    DataText,
    FitError,
    Fitted,
    Layer,
    MethodSpec,
    Options,
    Part,
    Steps,
    Text,
    Wanted,
)
from server.fit_methods.sae import passages, tensors
from server.fit_methods.sae_examples import published
from server.fit_methods.sae_rows import Passage, SaeTraining

MAX_FEATURES = 128
"""A request lists 256 features, and each key feature is two."""
PAPERS_ALPHA = 20.0


class Contrast(Part):
    """A prompt that is answered right, and a rephrasing of it that isn't."""

    right: Text
    wrong: Text


class Paraphrase(Part):
    """Two phrasings of one question, and whether the model answers both alike."""

    first: Text
    second: Text
    consistent: bool


class LfSteeringOptions(Options, SaeTraining):
    """`sae`: an SAE of the store, in place of `texts` to train one from. `layer`: where to train it, in place of
    `paraphrases` to find the layer by. `threshold` is for the gains, in the SAE's units. `alpha` is part of the literal
    form, 20 unless given, the paper's; the delta form has the request's strength in its place.
    """

    sae: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    layer: Layer | None = None
    form: Literal["delta", "literal"] = "delta"
    alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    most: Annotated[int, Field(ge=1, le=MAX_FEATURES)] = MAX_FEATURES

    @model_validator(mode="after")
    def _alpha_is_of_the_literal_form(self) -> LfSteeringOptions:
        if self.alpha is not None and self.form == "delta":
            raise ValueError("alpha is part of the literal form only; delta's is default_strength")
        return self

    @property
    def training(self) -> SaeTraining:
        return SaeTraining(**self.model_dump(include=set(SaeTraining.model_fields)))


class LfSteeringSpec(MethodSpec):
    method: Literal["lf_steering"] = "lf_steering"
    pairs: Annotated[list[Contrast], Field(min_length=2)]
    paraphrases: list[Paraphrase] = []
    texts: list[Passage] = []
    options: LfSteeringOptions = LfSteeringOptions()

    @model_validator(mode="after")
    def _one_way_to_an_sae(self) -> LfSteeringSpec:
        if (self.options.sae is None) == (not self.texts):
            raise ValueError("give either options.sae, an SAE of the store, or texts to train one from")
        if self.options.sae is not None and self.options.layer is not None:
            raise ValueError("options.layer is the SAE's own: leave it out")
        if self.texts and self.options.layer is None and not self.paraphrases:
            raise ValueError("give options.layer, or paraphrases to find the layer by")
        return self

    @property
    def items(self) -> Sequence[BaseModel]:
        return [*self.pairs, *self.paraphrases, *self.texts]

    def captures(self) -> list[Capture]:
        # At which layer the passages are read is known only once the paraphrases are.
        return [self._prompts(), *([passages(self.texts, self.options.layer or 0)] if self.texts else [])]

    def steps(self, context: Context) -> Steps:
        prompts = (yield self._prompts()).pooled["resid_post"]
        right, wrong = prompts[0 : 2 * len(self.pairs) : 2], prompts[1 : 2 * len(self.pairs) : 2]
        located = self._located(prompts[2 * len(self.pairs) :])
        if self.options.sae is not None:
            source = _of_the_store(context, self.options.sae)
        else:
            layer = self.options.layer if self.options.layer is not None else located.layer if located else 0
            rows = sae_rows.kept(context.work, layer)
            if rows is None:
                captured: Activations = yield passages(self.texts, layer)
                rows = sae_rows.keep(context.work, layer, sae_rows.rows_of(captured))
                del captured
            trained = sae_rows.train(rows, self.options.training, context.work, layer, context.progress)
            source = _Source(trained.sae, layer, trained.metrics, [])
        features = lf_steering.select(
            source.sae, right[:, source.layer], wrong[:, source.layer], self.options.threshold, self.options.most
        )
        if not len(features.indices):
            raise FitError(
                "options.threshold",
                f"no feature changes by more than {self.options.threshold} between the pairs; lower it",
            )
        return self._fitted(source, features, located)

    def _prompts(self) -> Capture:
        sides = chain(
            *(
                ((f"pairs.{i}.right", each.right), (f"pairs.{i}.wrong", each.wrong))
                for i, each in enumerate(self.pairs)
            ),
            *(
                ((f"paraphrases.{i}.first", each.first), (f"paraphrases.{i}.second", each.second))
                for i, each in enumerate(self.paraphrases)
            ),
        )
        return Capture(tuple(DataText(*each) for each in sides), Wanted(("resid_post",), "last"))

    def _located(self, states: Array) -> lf_steering.Located | None:
        """From the paraphrases' states [2 x paraphrases, layers, width], where there are such."""
        if not self.paraphrases:
            return None
        consistent = np.array([each.consistent for each in self.paraphrases])
        try:
            return lf_steering.locate(states[0::2], states[1::2], consistent, seed=self.options.seed)
        except ValueError as error:
            raise FitError("paraphrases", str(error)) from error

    def _fitted(self, source: _Source, features: lf_steering.Features, located: lf_steering.Located | None) -> Fitted:
        options, alpha, rows = self.options, None, lf_steering.delta_rows(source.sae, features)
        default: list[dict[str, Any]] | Literal["all"]
        default = [{"index": index, "op": "scale", "value": 1.0} for index in range(len(rows.encoder))]
        if options.form == "literal":
            alpha = PAPERS_ALPHA if options.alpha is None else options.alpha
            rows, default = lf_steering.literal_rows(source.sae, features, alpha), "all"
        parts = tensors(rows, source.layer)
        del parts[source.layer, "decoder_bias"]
        metrics = source.metrics | {
            "key_features": float(len(features.indices)),
            "largest_gain": float(features.gains.max()),
            "smallest_gain": float(features.gains.min()),
        }
        if located is not None:
            metrics |= {"consistency_majority": located.majority, "consistency_best_layer": float(located.layer)}
            metrics |= {f"consistency_accuracy.{layer}": float(each) for layer, each in enumerate(located.accuracies)}
        key: dict[str, Any] = {"features": features.indices.tolist(), "gains": [float(each) for each in features.gains]}
        return Fitted(
            kind="sae",
            point="resid_post",
            tensors=parts,
            default_strength=options.default_strength,
            default_layers=[source.layer],
            config=options.model_dump(exclude={"default_layers", "default_strength"})
            | {"layer": source.layer, "alpha": alpha, "key": key},
            metrics=metrics,
            activation="jumprelu",
            seed=options.seed,
            parents=source.parents,
            default_features=default,
        )


class _Source(NamedTuple):
    """The SAE that features are chosen of, its layer, what it is worth, and the artifact that it is from."""

    sae: Sae
    layer: int
    metrics: dict[str, float]
    parents: list[str]


def _of_the_store(context: Context, reference: str) -> _Source:
    version, sae, layer = published(context, reference)
    known = {name: value for name, value in version.manifest.metrics.items() if name in ("fvu", "l0", "dead")}
    return _Source(sae, layer, known, [version.digest])
