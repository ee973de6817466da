"""The gates of a served model's neurons, from what was captured of it: methods/gated_mlp.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from methods.gated_mlp import disagreement
from server.engine.edits import Point
from server.fit_methods.base import Activations, Array, FitError
from server.model_weights import Mlps, UnknownWeights

POINTS: tuple[Point, ...] = ("mlp_act", "resid_post", "resid_pre", "attn_out")
"""What has to be captured, of the same tokens."""
DISAGREEMENT = 0.1
"""Between the down projection's input as it was captured and as it is worked out: more than bfloat16 makes of it."""


class Opened(NamedTuple):
    """Of all texts, `gates` [texts, layers, neurons]; `writes` [layers, neurons], the length of what a neuron adds to
    the residual stream when it is 1; and by how much what is worked out differs from what was captured, at most.
    """

    gates: Array
    writes: Array
    error: float


def opened(activations: Activations, model: str, field: str, remedy: str) -> Opened | None:
    """None for a model whose MLPs have no gates: there what a neuron writes is its non-linearity's output. FitError of
    the field, with what else can be asked for, where the gates can't be worked out, or wouldn't be the engine's.
    """
    written, after = activations.pooled["mlp_act"], activations.pooled["resid_post"]
    gates, writes, error = np.empty_like(written), np.empty(written.shape[1:], np.float32), 0.0
    try:
        if not (mlps := Mlps(model)).gated:
            return None
        for layer in range(written.shape[1]):
            mlp = mlps.layer(layer)
            stream = after[:, layer - 1] if layer else activations.pooled["resid_pre"][:, 0]
            gates[:, layer], worked_out = mlp(stream, activations.pooled["attn_out"][:, layer])
            writes[layer] = mlp.writes
            error = max(error, disagreement(worked_out, written[:, layer]))
            if error > DISAGREEMENT:
                raise UnknownWeights(f"layer {layer} is built otherwise: what its neurons write differs by {error:.0%}")
    except UnknownWeights as reason:
        raise FitError(field, f"the neurons' gates can't be worked out: {reason}; {remedy}") from reason
    return Opened(gates, writes, error)
