"""What opens the neurons of a gated MLP, worked out from the residual stream and the weights.

With h the stream that a layer receives, a what its attention returns, and N_w(x) = w x / sqrt(mean(x^2) + epsilon):

    m = h + a                 or  h + N(a)     where the family normalises what the attention returns
    x = N(m)                  or  m            where it doesn't normalise what the MLP receives
    gate_j = act(g_j . x),  written_j = gate_j (u_j . x)

g_j and u_j are rows of the gate and up projections. `written` is the down projection's input, `mlp_act`, whose sign
also has that of u_j . x: the sign of the gate can't be read from it. Since the engine captures `mlp_act`, too, what is
worked out here can be compared with it: for a family whose layers are built otherwise it doesn't agree.

What neuron j adds to the stream is written_j v_j, with v_j the column of the down projection, multiplied by the weights
of the norm behind it where there is one (Gemma 2 and 3, OLMo 2; its divisor is the same for all neurons of a token).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Activation = Literal["silu", "gelu_pytorch_tanh"]


class Opened(NamedTuple):
    """`gates` and `written`, both [tokens, neurons]."""

    gates: Array
    written: Array


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """Of one layer: `gate` and `up` [neurons, hidden], `writes` [neurons], the lengths of the v_j, and the weights
    [hidden] of the norms, as they multiply, None where there is no such norm.
    """

    gate: Array
    up: Array
    writes: Array
    attention_norm: Array | None
    norm: Array | None
    epsilon: float
    activation: Activation

    def __call__(self, stream: Array, attention: Array) -> Opened:
        """For h and a [tokens, hidden]."""
        mixed = stream + _normalised(attention, self.attention_norm, self.epsilon)
        x = _normalised(mixed, self.norm, self.epsilon)
        gates = ACTIVATIONS[self.activation](x @ self.gate.T)
        return Opened(gates, gates * (x @ self.up.T))


def disagreement(worked_out: Array, captured: Array) -> float:
    """The error of `worked_out` relative to the length of what was captured; that of knowing nothing is above 1."""
    return float(np.linalg.norm(worked_out - captured) / max(np.linalg.norm(captured), np.finfo(np.float32).tiny))


def _normalised(x: Array, weight: Array | None, epsilon: float) -> Array:
    if weight is None:
        return x
    made: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * weight
    return made


def _silu(x: Array) -> Array:
    # Beyond 80 the exponential's overflow would be a warning, and its value nothing.
    made: Array = x / (1 + np.exp(-np.clip(x, -80, None)))
    return made


def _gelu(x: Array) -> Array:
    made: Array = 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))
    return made


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": _silu, "gelu_pytorch_tanh": _gelu}
