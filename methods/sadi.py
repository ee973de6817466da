"""Semantics-adaptive dynamic intervention: scale the activations of a few elements that tell right from wrong.

For pair i with activations p_i (question and right answer) and n_i (question and wrong answer) at their last token,

    D = mean_i (p_i - n_i)                     [layers, elements], over all layers at once
    M = the top_k elements (layer, m) of D
    adaptive:  x_m += delta * x_m              for m in M, x being the request's own activation (`scale`)
    fixed:     x   += delta * (D * M)          the paper's ablation: the same vector for every request (`add`)

Wang et al. 2025, "Semantics-adaptive activation intervention for LLMs via dynamic steering vectors" (arXiv
2410.12299), section 3. `top_k` is counted over all layers together, without any normalisation per layer.

| component | elements | point | the paper | its released code (LLaMA) |
|---|---|---|---|---|
| heads | (layer, head) | head_out | output of the heads | the same; D is averaged over a head's dimensions first |
| neurons | (layer, neuron) | mlp_act | FFN neurons, activated | the gate's SiLU, before the up projection's factor |
| hidden | (layer, dimension) | resid_post | hidden states | what `mlp` is here |
| mlp | (layer, dimension) | mlp_out | - | calls this "hidden": the MLP's output without the residual |

Scaling a neuron's gate scales `mlp_act` by the same factor. Which neurons to scale is chosen by the gates, too, if
these are what `fit` is given: methods/gated_mlp.py. A head that is chosen is scaled as a whole. The released code takes
the top_k largest signed values (`signed_top`, the default); "of highest magnitude", as secondary sources have it, is
`abs_top`.

The paper's strength is delta. The released code multiplies by s = 1 + delta and sweeps s over 5, 10 ... 80 for heads
and hidden, 10 ... 90 for neurons, and top_k over 1 ... 10 heads, 3 ... 500 neurons, 1 ... 20 dimensions, taking the
best on the test set. Both act once, on the prompt's last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from server.engine.edits import Point

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Component = Literal["heads", "neurons", "hidden", "mlp"]
Selection = Literal["signed_top", "abs_top"]
Form = Literal["adaptive", "fixed"]

POINTS: dict[Component, Point] = {"heads": "head_out", "neurons": "mlp_act", "hidden": "resid_post", "mlp": "mlp_out"}
DEFAULT_TOP_K: dict[Component, int] = {"heads": 6, "neurons": 100, "hidden": 10, "mlp": 10}
"""From the middle of the released sweeps."""


@dataclass(frozen=True, slots=True)
class Config:
    """`top_k` elements over all layers; None takes DEFAULT_TOP_K. `default_strength` is delta: 4 is the released code's
    smallest multiplier, 5.
    """

    component: Component = "heads"
    selection: Selection = "signed_top"
    top_k: int | None = None
    form: Form = "adaptive"
    default_strength: float = 4.0

    @property
    def point(self) -> Point:
        return POINTS[self.component]

    @property
    def count(self) -> int:
        return DEFAULT_TOP_K[self.component] if self.top_k is None else self.top_k


@dataclass(frozen=True, slots=True)
class Fit:
    """`scores` [layers, elements]: D. `selected`: (layer, element), best first. `indices`: of the activation's numbers
    that are scaled, by layer. `vectors`: D * M [width], by layer. `stability`: the share of the elements that both
    halves of the pairs choose.
    """

    scores: Float64
    selected: tuple[tuple[int, int], ...]
    indices: dict[int, Indices]
    vectors: dict[int, Array]
    stability: float


def text(question: str, answer: str) -> str:
    """What is run through the model: the answer's last token comes last."""
    return f"{question.strip()} {answer.strip()}".strip()


def fit(positive: Array, negative: Array, config: Config, heads: int) -> Fit:
    """Fit from activations [pairs, layers, width] at the last token, `heads` being the model's number of heads.

    ValueError for fewer than 2 pairs, unequal shapes, a top_k above the number of elements, or sides that don't differ.
    """
    if positive.shape != negative.shape or positive.ndim != 3:
        raise ValueError(f"need equal shapes [pairs, layers, width], got {positive.shape} and {negative.shape}")
    if len(positive) < 2:
        raise ValueError(f"need at least 2 pairs, got {len(positive)}")
    differences = positive.astype(np.float64) - negative
    mean = differences.mean(0)
    block = mean.shape[1] // heads if config.component == "heads" else 1
    scores = _scores(mean, block)
    if not 1 <= config.count <= scores.size:
        raise ValueError(f"top_k {config.count} must be from 1 to the {scores.size} {config.component} of this model")
    selected = select(scores, config.count, config.selection)
    if zero := [element for element in selected if scores[element] == 0]:
        raise ValueError(
            f"the two sides don't differ at {zero[0]} (layer, element), which is among the top_k; ask less"
        )
    indices = _indices(selected, block)
    halves = (select(_scores(half.mean(0), block), config.count, config.selection) for half in _halves(differences))
    return Fit(
        scores=scores,
        selected=selected,
        indices=indices,
        vectors={layer: _masked(mean[layer], chosen) for layer, chosen in indices.items()},
        stability=len(set.intersection(*map(set, halves))) / config.count,
    )


def select(scores: Float64, count: int, selection: Selection) -> tuple[tuple[int, int], ...]:
    """The `count` best (layer, element) of scores [layers, elements], best first; of equal ones the earlier."""
    ranked = np.abs(scores) if selection == "abs_top" else scores
    flat = np.argsort(-ranked, axis=None, kind="stable")[:count]
    layers, elements = np.unravel_index(flat, scores.shape)
    return tuple(zip(layers.tolist(), elements.tolist(), strict=True))


def _scores(mean: Float64, block: int) -> Float64:
    """D averaged over the numbers of each element: [layers, width / block]."""
    averaged: Float64 = mean.reshape(len(mean), -1, block).mean(2)
    return averaged


def _halves(differences: Float64) -> tuple[Float64, Float64]:
    return differences[0::2], differences[1::2]


def _indices(selected: tuple[tuple[int, int], ...], block: int) -> dict[int, Indices]:
    chosen: dict[int, list[int]] = {}
    for layer, element in sorted(selected):
        chosen.setdefault(layer, []).extend(range(element * block, (element + 1) * block))
    return {layer: np.array(numbers, np.int64) for layer, numbers in chosen.items()}


def _masked(mean: Float64, chosen: Indices) -> Array:
    vector = np.zeros(len(mean), np.float32)
    vector[chosen] = mean[chosen]
    return vector
