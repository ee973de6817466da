"""A sparse auto-encoder of one layer, trained on running text: methods/sae_training.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from methods.sae import Sae
from server.fit_methods import sae_rows
from server.fit_methods.base import (
    Array,
    Capture,
    Context,
    DataText,
    Fitted,
    Layer,
    MethodSpec,
    Options,
    Steps,
    Wanted,
)
from server.fit_methods.sae_rows import Passage, Rows, SaeTraining
from steering_store.labels import MAX_EXAMPLES
from steering_store.manifest import Role


class SaeOptions(Options, SaeTraining):
    """`examples`: so many texts for each feature on which it fires most."""

    layer: Layer
    examples: Annotated[int, Field(ge=0, le=MAX_EXAMPLES)] = 5

    @property
    def training(self) -> SaeTraining:
        return SaeTraining(**self.model_dump(include=set(SaeTraining.model_fields)))


class SaeSpec(MethodSpec):
    data_field = "texts"
    method: Literal["sae"] = "sae"
    texts: Annotated[list[Passage], Field(min_length=1)]
    options: SaeOptions

    def captures(self) -> list[Capture]:
        return [passages(self.texts, self.options.layer)]

    def steps(self, context: Context) -> Steps:
        options = self.options
        rows = sae_rows.kept(context.work, options.layer)
        if rows is None:
            rows = sae_rows.keep(context.work, options.layer, sae_rows.rows_of((yield self.captures()[0])))
        trained = sae_rows.train(rows, options.training, context.work, options.layer, context.progress)
        labels = _labels(trained.sae, rows, options.examples, context)
        return Fitted(
            kind="sae",
            point="resid_post",
            tensors=tensors(trained.sae, options.layer),
            default_strength=options.default_strength,
            default_layers=[options.layer],
            config=options.model_dump(exclude={"default_layers", "default_strength"}),
            metrics=trained.metrics,
            activation="jumprelu" if trained.sae.activation == "jumprelu" else "relu",
            seed=options.seed,
            labels=labels or None,
        )


def passages(texts: list[Passage], layer: int, field: str = "texts") -> Capture:
    """Every token of the passages at one layer of the residual stream."""
    named = tuple(DataText(f"{field}.{number}.text", each.text) for number, each in enumerate(texts))
    return Capture(named, Wanted(("resid_post",), "rows", (layer,)))


def tensors(sae: Sae, layer: int) -> dict[tuple[int, Role | None], Array]:
    """As an artifact has them."""
    roles: dict[Role, Array | None] = {
        "encoder": sae.encoder,
        "encoder_bias": sae.encoder_bias,
        "decoder": sae.decoder,
        "decoder_bias": sae.decoder_bias,
        "threshold": sae.threshold,
    }
    return {(layer, role): tensor for role, tensor in roles.items() if tensor is not None}


def _labels(sae: Sae, rows: Rows, count: int, context: Context) -> bytes:
    if not count:
        return b""
    return sae_rows.examples(sae, rows, count, context.decode, {}, context.progress)
