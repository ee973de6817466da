"""A published SAE, with the texts on which each of its features fires most: methods/sae_examples.py."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from methods.sae import Sae
from server.fit_methods import sae_rows
from server.fit_methods.base import Capture, Context, FitError, Fitted, MethodSpec, Options, Steps
from server.fit_methods.sae import passages, tensors
from server.fit_methods.sae_rows import Passage
from steering_store import ArtifactVersion
from steering_store.errors import StoreError
from steering_store.labels import MAX_EXAMPLES

SAE = "options.sae"


class SaeExamplesOptions(Options):
    """`sae`: a reference to the artifact. Its labels stay."""

    sae: Annotated[str, Field(min_length=1, max_length=256)]
    examples: Annotated[int, Field(ge=1, le=MAX_EXAMPLES)] = 5


class SaeExamplesSpec(MethodSpec):
    data_field = "texts"
    method: Literal["sae_examples"] = "sae_examples"
    texts: Annotated[list[Passage], Field(min_length=1)]
    options: SaeExamplesOptions

    def captures(self) -> list[Capture]:
        return [passages(self.texts, 0)]

    def steps(self, context: Context) -> Steps:
        version, sae, layer = published(context, self.options.sae)
        activations = yield passages(self.texts, layer)
        known = context.store.feature_labels(version)
        rows = sae_rows.rows_of(activations)
        labels = sae_rows.examples(sae, rows, self.options.examples, context.decode, known, context.progress)
        manifest = version.manifest
        return Fitted(
            kind="sae",
            point="resid_post",
            tensors=tensors(sae, layer),
            default_strength=manifest.default_strength,
            default_layers=[layer],
            config={
                **manifest.provenance.config,
                "sae": f"{version.name}@{version.digest}",
                "examples": self.options.examples,
            },
            metrics=manifest.metrics,
            activation=manifest.activation,
            parents=[version.digest],
            labels=labels,
        )


def published(context: Context, reference: str) -> tuple[ArtifactVersion, Sae, int]:
    """An SAE of the store at one layer of the residual stream, with its layer. FitError where it is none."""
    try:
        version = context.store.resolve(reference)
    except StoreError as error:
        raise FitError(SAE, str(error)) from error
    manifest = version.manifest
    if manifest.kind != "sae" or len(manifest.layers) != 1 or manifest.point != "resid_post":
        raise FitError(SAE, f"{version.ref} isn't a sae of one layer of resid_post")
    if context.weights is not None and manifest.model.weights_digest not in (None, context.weights):
        raise FitError(SAE, f"{version.ref} was made for another model: its weights aren't those of the served one")
    if manifest.activation == "identity":
        raise FitError(SAE, f"{version.ref} has no activation: it isn't sparse")
    loaded = context.store.load_tensors(version)
    parts = {site.role: loaded[site.tensor] for site in manifest.sites}
    sae = Sae(
        manifest.activation or "relu",
        parts["encoder"],
        parts["encoder_bias"],
        parts["decoder"],
        parts.get("decoder_bias", np.zeros(parts["encoder"].shape[1], np.float32)),
        threshold=parts.get("threshold"),
    )
    return version, sae, manifest.layers[0]
