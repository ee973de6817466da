"""Which neurons languages share (Wang et al. 2024, "Sharing matters", arXiv 2406.09265), and interventions from that.

For one input s in P languages, with m [languages, layers, neurons] the activations at the last prompt token, c_j is the
number of languages in which neuron j is active, m_j > theta (0 in the paper):

    all_shared: c = P    partial_shared: 1 < c < P    specific: c = 1    non_activated: c = 0

Categories belong to an input, not to a neuron; `Tally` adds inputs up. With v_j the column of the down projection that
neuron j writes, and e the unembedding row of the answer's first token:

    contribution  C_j = |m_j| ||v_j||             of the 800 largest of a layer, which share is in each category?
    effective     E_j = m_j (e . v_j)             what the neuron adds to the answer's logit, without the final norm

Interventions scale m_j, x_j *= 1 + s w_j, and so are neuron sets with weights w:

    deactivate  w = 1 for the neurons of a category, at s = -1. The paper's third version zeroes a category, by a
                protocol that isn't published. `control` draws as many random neurons of each layer.
    CLAS        (Pokharel et al. 2026, arXiv 2601.16390)  h1 = h (1 + beta M_partial);  h2 = h1 (1 - gamma M_specific);
                h' = (1 - alpha) h + alpha h2:  w = beta for partial, -gamma for specific, at s = alpha

The paper's neurons are the non-linearity's output in BLOOM. In a gated MLP, down-projection input and non-linearity
differ: act(gate) decides whether a neuron is active, act(gate) up is what is written. The engine captures the latter
(`mlp_act`), whose sign also has that of `up`. `Tally.add` takes both; given the written values alone it uses these for
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Category = Literal["all_shared", "partial_shared", "specific", "non_activated"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
TOP = 800


def categories(active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """The category, as its place in CATEGORIES, of each neuron [layers, neurons], for one input's `active`
    [languages, layers, neurons]. ValueError for fewer than 2 languages.
    """
    languages = len(active)
    if languages < 2:
        raise ValueError(f"sharing needs at least 2 languages, got {languages}")
    count = active.sum(axis=0)
    found: npt.NDArray[np.int8] = np.select([count == languages, count > 1, count == 1], [0, 1, 2], 3).astype(np.int8)
    return found


def contributions(values: Array, norms: Array) -> Array:
    """C of `values` [..., layers, neurons], `norms` [layers, neurons] being those of the columns v_j."""
    scores: Array = np.abs(values) * norms
    return scores


def effective(values: Array, down: Array, answer: Array) -> Array:
    """E [..., neurons] of `values` [..., neurons], for one layer's down projection [hidden, neurons] and the
    unembedding row of the answer's first token [hidden].
    """
    scores: Array = values * (answer @ down)
    return scores


@dataclass(frozen=True)
class Report:
    """Per layer, averaged over inputs: `share` and `share_range` (lowest and highest of the inputs) of all neurons in
    each category [categories, layers] and [2, categories, layers]; `active` [languages, layers], the share active in
    each language. Averaged over inputs and languages: `top_share`, of the neurons with the largest contribution, and
    `contribution`, of the sum of all contributions, in each category [categories, layers]. `repeating`: the share of
    neurons that are in a category for all inputs [categories, layers].
    """

    inputs: int
    share: Array
    share_range: Array
    active: Array
    top_share: Array
    contribution: Array
    repeating: Array


class Tally:
    """Adds up inputs, one at a time: memory doesn't grow with their number."""

    def __init__(self, norms: Array, threshold: float = 0.0, top: int = TOP) -> None:
        """`norms` [layers, neurons]: the length of the column v_j of each neuron. ValueError for a `top` beyond the
        neurons of a layer."""
        self.layers, self.neurons = norms.shape
        if not 0 < top <= self.neurons:
            raise ValueError(f"top {top} must be between 1 and the {self.neurons} neurons of a layer")
        self.norms, self.threshold, self.top, self.inputs = norms, threshold, top, 0
        shape = len(CATEGORIES), self.layers
        self.counts: Integers = np.zeros((*shape, self.neurons), np.int64)
        self._share, self._low, self._high = np.zeros(shape), np.ones(shape), np.zeros(shape)
        self._top, self._contribution = np.zeros(shape), np.zeros(shape)
        self._active: npt.NDArray[np.float64] | None = None

    def add(self, written: Array, gates: Array | None = None) -> npt.NDArray[np.int8]:
        """One input: what the neurons write [languages, layers, neurons], and the values whose sign says which are
        active, `written` unless given. Returns the categories [layers, neurons]. ValueError for another shape, or
        another number of languages than before.
        """
        signs = written if gates is None else gates
        if written.shape[1:] != self.norms.shape or signs.shape != written.shape:
            raise ValueError(f"need [languages, {self.layers}, {self.neurons}], got {written.shape} and {signs.shape}")
        active = signs > self.threshold
        found = categories(active)
        if self._active is None:
            self._active = np.zeros(written.shape[:2])
        if self._active.shape != written.shape[:2]:
            raise ValueError(f"{len(written)} languages, but the inputs before had {len(self._active)}")
        within = np.stack([found == index for index in range(len(CATEGORIES))])
        scores = contributions(written, self.norms).astype(np.float64)
        best = np.argpartition(-scores, self.top - 1, axis=2)[..., : self.top]
        share = within.mean(axis=2)
        self.inputs += 1
        self.counts += within
        self._share += share
        self._low, self._high = np.minimum(self._low, share), np.maximum(self._high, share)
        self._active += active.mean(axis=2)
        total = np.maximum(scores.sum(axis=2), np.finfo(np.float64).tiny)
        for index, mask in enumerate(within):
            chosen = np.take_along_axis(np.broadcast_to(mask, scores.shape), best, axis=2)
            self._top[index] += chosen.mean(axis=(0, 2))
            self._contribution[index] += ((scores * mask).sum(axis=2) / total).mean(axis=0)
        return found

    def report(self) -> Report:
        """ValueError before the first input."""
        if self._active is None:
            raise ValueError("no input has been added")
        n = self.inputs
        return Report(
            inputs=n,
            share=_float32(self._share / n),
            share_range=_float32(np.stack([self._low, self._high])),
            active=_float32(self._active / n),
            top_share=_float32(self._top / n),
            contribution=_float32(self._contribution / n),
            repeating=_float32((self.counts == n).mean(axis=2)),
        )

    def members(self, category: Category, share: float = 0.5) -> list[Integers]:
        """Of each layer, the neurons that are in the category for at least that share of the inputs (1: for all)."""
        if not 0 < share <= 1:
            raise ValueError(f"share {share} must be above 0 and at most 1")
        if not self.inputs:
            raise ValueError("no input has been added")
        often = self.counts[CATEGORIES.index(category)] >= share * self.inputs
        return [np.flatnonzero(layer) for layer in often]


def control(members: Sequence[Integers], neurons: int, seed: int) -> list[Integers]:
    """As many neurons of each layer, drawn from all its `neurons`: the control of deactivating a category."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(neurons, len(layer), replace=False)) for layer in members]


def clas(
    partial: Sequence[Integers], specific: Sequence[Integers], beta: float, gamma: float
) -> list[tuple[Integers, Array]]:
    """Of each layer, neurons and weights, for a strength of alpha; the paper's are beta = gamma = 0.2, alpha = 1.

    ValueError where a neuron of a layer is in both.
    """
    made = []
    for layer, (more, less) in enumerate(zip(partial, specific, strict=True)):
        if both := np.intersect1d(more, less).tolist():
            raise ValueError(f"layer {layer}: neurons {both[:5]} are partial-shared and specific; raise the share")
        weights = np.repeat(np.array([beta, -gamma], np.float32), [len(more), len(less)])
        made.append((np.concatenate([more, less]), weights))
    return made


def _float32(values: npt.NDArray[np.float64]) -> Array:
    return values.astype(np.float32)
