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
(`mlp_act`), whose sign also has that of `up`; methods/gated_mlp.py works out the gates. `Tally.add` takes both; given
the written values alone it uses these for both.
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
    """What a `Tally` says.

    Per layer, averaged over inputs: `share` and `share_range` (lowest and highest of the inputs) of all neurons in
    each category [categories, layers] and [2, categories, layers]; `active` [languages, layers], the share active in
    each language. Averaged over inputs and languages: `top_share`, of the neurons with the largest contribution, and
    `contribution`, of the sum of all contributions, in each category [categories, layers]. `repeating`: the share of
    neurons that are in a category for all inputs [categories, layers].

    `contribution_scores` and, where they were given, `effective_scores`: mean, largest and smallest of a category's in
    all inputs and languages [3, categories, layers]; nan where it was always empty.
    """

    inputs: int
    share: Array
    share_range: Array
    active: Array
    top_share: Array
    contribution: Array
    repeating: Array
    contribution_scores: Array
    effective_scores: Array | None


class _Scores:
    """Mean, largest and smallest of scores by category, over inputs."""

    def __init__(self, layers: int) -> None:
        shape = len(CATEGORIES), layers
        self._sum, self._count = np.zeros(shape), np.zeros(shape)
        self._high, self._low = np.full(shape, -np.inf), np.full(shape, np.inf)

    def add(self, scores: npt.NDArray[np.float64], within: npt.NDArray[np.bool_]) -> None:
        """Of one input, [languages, layers, neurons], and which neurons each category has [categories, ...]."""
        for index, mask in enumerate(within):
            self._sum[index] += (scores * mask).sum(axis=(0, 2))
            self._count[index] += len(scores) * mask.sum(axis=1)
            self._high[index] = np.maximum(self._high[index], np.where(mask, scores, -np.inf).max(axis=(0, 2)))
            self._low[index] = np.minimum(self._low[index], np.where(mask, scores, np.inf).min(axis=(0, 2)))

    def table(self) -> Array:
        found = self._count > 0
        mean = self._sum / np.maximum(self._count, 1)
        return _float32(np.stack([np.where(found, each, np.nan) for each in (mean, self._high, self._low)]))


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
        self._contributions, self._effects = _Scores(self.layers), _Scores(self.layers)
        self._has_effects = False

    def add(self, written: Array, gates: Array | None = None, effects: Array | None = None) -> npt.NDArray[np.int8]:
        """One input: what the neurons write [languages, layers, neurons], the values whose sign says which are active,
        `written` unless given, and the `effective` scores, of all inputs or of none. Returns the categories [layers,
        neurons]. ValueError for another shape, or another number of languages than before.
        """
        signs = written if gates is None else gates
        if written.shape[1:] != self.norms.shape or signs.shape != written.shape:
            raise ValueError(f"need [languages, {self.layers}, {self.neurons}], got {written.shape} and {signs.shape}")
        if effects is not None and effects.shape != written.shape:
            raise ValueError(f"need effects {written.shape}, got {effects.shape}")
        if self.inputs and self._has_effects != (effects is not None):
            raise ValueError("effects are those of all inputs or of none")
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
        self._contributions.add(scores, within)
        if effects is not None:
            self._has_effects = True
            self._effects.add(effects.astype(np.float64), within)
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
            contribution_scores=self._contributions.table(),
            effective_scores=self._effects.table() if self._has_effects else None,
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
