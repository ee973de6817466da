"""Inference-time cross-lingual intervention: one linear map per layer from a language's states to English ones.

For N translations with states h_i (source language) and t_i (target) of a layer, as the rows of H and T [N, d],

    min_norm:  W = (H^+ T)^T, b = 0                           the paper's: least squares without regularisation
    ridge:     W = (Hc^T (Hc Hc^T + lambda I)^-1 Tc)^T        the default, in its dual form, towards the mean
               W = I + (Hc^T (Hc Hc^T + lambda I)^-1 (Tc - Hc))^T     and towards the identity
               b = mean(T) - W mean(H)
    x += alpha (W x + b)                                      (`map`, then `add`)

with Hc and Tc the states minus their means. Wang et al. 2025, "Bridging the language gaps in large language models with
inference-time cross-lingual intervention" (arXiv 2410.12462), eq. 1 to 4. The paper has no bias and doesn't centre. The
change is added: it is neither a difference nor a blend, and alpha = 1 about doubles the state.

The paper's closed form inverts H^T H, which is singular for N < d; its code calls `lstsq`, the minimum-norm solution.
That one fits the N sentences exactly and, the nearer N is to d, the worse all others (the paper's figure 3: more data
hurts). Ridge removes this: the larger lambda, the nearer predictions are to its prior, which is the mean target state
or the source state moved by the difference of the means. Prior and lambda (in units of the mean ||h_i - mean(h)||^2)
are chosen for each layer by the exact leave-one-out error, for which a linear smoother needs no second fit: it is the
error of the map fitted to all, divided by 1 minus the sentence's leverage. Infinite lambdas and the source state itself
are among the choices, so that by this error no layer is worse than the mean or doing nothing.

A state can be several times as long as the others: in Gemma-3-270M, after the embeddings, that of a last token such as
a closing bracket behind a Latin word, or `,`. A single such target is most of the squared error, and decides what the
map does to all sources of its kind. So ridge leaves out pairs whose target is more than OUTLIER times as long as the
median one, as long as they are few; the paper's solver has all. A long source with an ordinary target stays: only from
such pairs can a linear map learn not to carry that length over.

A map has rank min(N, d). `rank` stores the best map of a smaller one instead (reduced-rank ridge regression, Mukherjee
and Zhu 2011, "Reduced rank ridge regression and its kernel extensions"): W projected on the leading right singular
vectors of T smoothed, diag(s / sqrt(s^2 + lambda)) U^T T with H = U diag(s) V^T. A map with the prior identity has full
rank, so that a smaller one has the mean as its prior, and no infinite lambda.

| | the paper | its released code | here |
|---|---|---|---|
| states to fit on | last token | mean over all tokens | `last`; `mean` leaves out the first token |
| component hidden | hidden states | BLOOM: the block's output; LLaMA: the MLP's, no residual | resid_post |
| attention, ffn | attention and FFN outputs | - | attn_out, mlp_out |
| embedding | the embeddings | - | resid_pre, one map; the last token's says nothing of the sentence: pool `mean` |
| every second pair | - | concatenated with its translation | `mix`: none, as the paper; or either of its two orders |
| alpha | in [-1, 1], per language and task | swept by 0.1, on the test set | `default_strength`, 0.1 |
| acts on | the prompt's last token, at every layer | with the values of a first pass | both: a request's `mode` |

Added live at every layer the change compounds, (1 + alpha)^layers; the released code doesn't, so that "frozen" is the
mode in which the paper's alphas mean what they say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from methods.sae import ordinary
from server.engine.edits import Point

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Component = Literal["hidden", "attention", "ffn", "embedding"]
Pooling = Literal["last", "mean"]
Solver = Literal["ridge", "min_norm"]
Prior = Literal["mean", "identity"]
Mix = Literal["none", "source_first", "target_first"]

POINTS: dict[Component, Point] = {
    "hidden": "resid_post",
    "attention": "attn_out",
    "ffn": "mlp_out",
    "embedding": "resid_pre",
}
RIDGES: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, math.inf)
"""Tried for each layer, in units of the mean squared length of a source state's deviation from their mean."""

OUTLIER, MOST_OUTLIERS = 4.0, 0.1
"""A target's length in units of the median one; if a larger share than this is beyond it, none is left out."""


@dataclass(frozen=True, slots=True)
class Config:
    """`ridge` in units of the mean ||h - mean(h)||^2; None chooses one of RIDGES for each layer, and `prior` None the
    better of the two. `rank` None stores the map as it is. Languages are BCP 47 tags. `default_layers` None are all, as
    in the paper.
    """

    source_language: str
    target_language: str = "en"
    component: Component = "hidden"
    pooling: Pooling = "last"
    solver: Solver = "ridge"
    ridge: float | None = None
    prior: Prior | None = None
    rank: int | None = None
    mix: Mix = "none"
    default_layers: tuple[int, ...] | None = None
    default_strength: float = 0.1

    @property
    def point(self) -> Point:
        return POINTS[self.component]

    @property
    def languages(self) -> tuple[str, str]:
        """What the artifact's manifest lists: the source language first."""
        return self.source_language, self.target_language


@dataclass(frozen=True, slots=True)
class Map:
    """W of one layer: `matrix` [d, d], or factors `left` [d, rank] and `right` [rank, d] with W = left right; and b,
    `bias` [d], None for min_norm.

    `ridge` is the one used: 0 for min_norm, infinite where nothing but the prior is left. Errors are squared, over
    sentences left out one at a time, and relative to those of predicting the mean target state: `error` of the map as
    it is stored, `identity_error` of the source state itself. `rank_error` is what storing a smaller rank changes of
    the predictions for the fitted sentences, relative to their squared length; with a bias, to that of their deviations
    from the mean. `outliers` is how many of the pairs were left out, of the errors, too.
    """

    matrix: Array | None
    left: Array | None
    right: Array | None
    bias: Array | None
    ridge: float
    prior: Prior | None
    error: float
    identity_error: float
    rank_error: float
    outliers: int

    @property
    def dense(self) -> Array:
        if self.matrix is not None:
            return self.matrix
        assert self.left is not None and self.right is not None
        return self.left @ self.right

    def predict(self, h: Array) -> Array:
        """W h + b for every row of h [n, d]."""
        predicted: Array = h @ self.dense.T
        return predicted if self.bias is None else predicted + self.bias


def mixed(source: str, target: str, index: int, mix: Mix) -> tuple[str, str]:
    """The two texts of pair `index`: the released code joins every second pair with its translation, for BLOOM the
    source first and a space between, for LLaMA the target first and a line break.
    """
    if mix == "none" or index % 2 == 0:
        return source, target
    if mix == "source_first":
        return f"{source} {target}", f"{target} {target}"
    return f"{target}\n{source}", f"{target}\n{target}"


def fit(source: Array, target: Array, config: Config) -> list[Map]:
    """One map a layer, from states [pairs, layers, d]. ValueError for fewer than 3 pairs, unequal shapes, or options
    that don't fit them.
    """
    if source.shape != target.shape or source.ndim != 3:
        raise ValueError(f"need equal shapes [pairs, layers, d], got {source.shape} and {target.shape}")
    pairs, layers, width = source.shape
    if pairs < 3:
        raise ValueError(f"need at least 3 pairs, got {pairs}")
    if config.rank is not None and not 1 <= config.rank <= min(pairs, width):
        raise ValueError(f"rank {config.rank} must be from 1 to {min(pairs, width)}, which {pairs} pairs can give")
    if config.solver == "min_norm" and (config.ridge is not None or config.prior is not None):
        raise ValueError("solver min_norm has neither ridge nor prior: leave them out")
    if config.rank is not None and config.prior == "identity":
        raise ValueError("prior identity has no smaller rank: leave one of them out")
    return [fit_layer(source[:, layer], target[:, layer], config) for layer in range(layers)]


def fit_layer(source: Array, target: Array, config: Config) -> Map:
    """The map of one layer, from states [pairs, d]."""
    kept = np.ones(len(source), np.bool_) if config.solver == "min_norm" else _ordinary(target)
    h, t = source[kept].astype(np.float64), target[kept].astype(np.float64)
    baseline = ((t - t.mean(0)) ** 2).sum() * (len(t) / (len(t) - 1)) ** 2
    if not h.any() or baseline == 0:
        raise ValueError("the states are all zero, or the target states all equal: the texts don't differ")
    found = _min_norm(h, t, config.rank) if config.solver == "min_norm" else _ridge(h, t, config)
    factored = found.factors is not None and (config.rank is not None or 2 * len(found.factors[1]) < h.shape[1])
    left, right = found.factors if factored and found.factors is not None else (None, None)
    return Map(
        matrix=None if factored else found.w.astype(np.float32),
        left=None if left is None else left.astype(np.float32),
        right=None if right is None else right.astype(np.float32),
        bias=None if found.bias is None else found.bias.astype(np.float32),
        ridge=found.ridge,
        prior=found.prior,
        error=float((found.left_out**2).sum() / baseline),
        identity_error=float(((t - h) ** 2).sum() / baseline),
        rank_error=found.rank_error,
        outliers=int((~kept).sum()),
    )


def _ordinary(target: Array) -> npt.NDArray[np.bool_]:
    """The pairs to fit on."""
    kept = ordinary(target, OUTLIER)
    few: bool = (~kept).mean() <= MOST_OUTLIERS
    return kept if few else np.ones_like(kept)


@dataclass(frozen=True, slots=True)
class _Found:
    """A map in full, and its errors `left_out` [N, d] on sentences that it was fitted without. `factors` where these
    make it up.
    """

    w: Float64
    factors: tuple[Float64, Float64] | None
    bias: Float64 | None
    ridge: float
    prior: Prior | None
    left_out: Float64
    rank_error: float = 0.0


@dataclass(frozen=True, slots=True)
class _Problem:
    """H = u diag(s) v, thin, and T with its coordinates c = u^T T. `constant` is the leverage of an intercept that was
    taken out of both.
    """

    u: Float64
    s: Float64
    v: Float64
    t: Float64
    c: Float64
    constant: float = 0.0

    @classmethod
    def of(cls, h: Float64, t: Float64, constant: float = 0.0) -> _Problem:
        u, s, v = np.linalg.svd(h, full_matrices=False)
        return cls(u, s, v, t, u.T @ t, constant)

    def towards_identity(self) -> _Problem:
        """The same for T - H, the change that W makes."""
        return replace(self, t=self.t - (self.u * self.s) @ self.v, c=self.c - self.s[:, None] * self.v)

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """The directions that `lstsq` uses: singular values above its cut-off."""
        cutoff = float(self.s[0]) * np.finfo(np.float64).eps * max(len(self.u), self.v.shape[1])
        kept: npt.NDArray[np.bool_] = self.s > cutoff
        return kept

    def gains(self, ridge: float) -> Float64:
        """W = (v^T diag(gains) c)^T."""
        if ridge > 0:
            return self.s / (self.s**2 + ridge)
        return np.divide(1.0, self.s, out=np.zeros_like(self.s), where=self.kept)

    def left_out(self, ridge: float) -> Float64:
        """The error [N, d] on each sentence of the map fitted to the others: the error of the map fitted to all, over
        1 minus the sentence's leverage. Without ridge both are divided by one that goes to 0.
        """
        lost, outside = self._lost(ridge)
        errors = self.u @ (lost[:, None] * self.c)
        remaining = self.u**2 @ lost - self.constant
        if len(self.u) > len(self.s):
            errors += outside * (self.t - self.u @ self.c)
            remaining += outside * (1 - (self.u**2).sum(1))
        return errors / remaining[:, None]

    def _lost(self, ridge: float) -> tuple[Float64, float]:
        """The share of T that the map leaves, along each direction of u and outside of them; up to a common factor."""
        if np.isinf(ridge):
            return np.ones_like(self.s), 1.0
        if ridge > 0:
            return ridge / (self.s**2 + ridge), 1.0
        kept = self.kept
        if kept.all() and len(self.u) == len(self.s):
            return 1 / self.s**2, 0.0
        return (~kept).astype(np.float64), 1.0

    def smaller(self, ridge: float, rank: int) -> tuple[Float64, Float64, Float64, float]:
        """The best map of a rank as its two factors, the directions [d, rank] of the target space that it writes, and
        what it changes.
        """
        gains = self.gains(ridge)
        weights = self.s / np.sqrt(self.s**2 + ridge) if ridge > 0 else (gains > 0).astype(np.float64)
        _, _, leading = np.linalg.svd(weights[:, None] * self.c, full_matrices=False)
        directions: Float64 = leading[:rank].T
        predicted = self.u @ ((self.s * gains)[:, None] * self.c)
        lost = predicted - predicted @ directions @ directions.T
        right = directions.T @ (gains[:, None] * self.c).T @ self.v
        return directions, right, directions, float((lost**2).sum() / (predicted**2).sum())


def _min_norm(h: Float64, t: Float64, rank: int | None) -> _Found:
    problem = _Problem.of(h, t)
    left_out = problem.left_out(0.0)
    if rank is not None:
        left, right, directions, rank_error = problem.smaller(0.0, rank)
        left_out = t - (t - left_out) @ directions @ directions.T
        return _Found(left @ right, (left, right), None, 0.0, None, left_out, rank_error)
    left, right = (problem.gains(0.0)[:, None] * problem.c).T, problem.v
    return _Found(left @ right, (left, right), None, 0.0, None, left_out)


def _ridge(h: Float64, t: Float64, config: Config) -> _Found:
    """Of the priors and penalties that the configuration leaves open, those with the least error left out."""
    mean_h, mean_t = h.mean(0), t.mean(0)
    problem = _Problem.of(h - mean_h, t - mean_t, 1 / len(h))
    unit = float(((h - mean_h) ** 2).sum(1).mean())
    if unit == 0:
        raise ValueError("the source states are all equal: the texts don't differ")
    problems: dict[Prior, _Problem] = {}
    if config.prior != "identity":
        problems["mean"] = problem
    if config.prior != "mean" and config.rank is None:
        problems["identity"] = problem.towards_identity()
    # Nothing of a rank is left by an infinite penalty.
    open_ = RIDGES if config.rank is None else RIDGES[:-1]
    ridges = open_ if config.ridge is None else (config.ridge,)
    tried = [(prior, ridge) for prior in problems for ridge in ridges]
    errors = [float((problems[prior].left_out(ridge * unit) ** 2).sum()) for prior, ridge in tried]
    best = int(np.argmin(errors))
    prior, ridge = tried[best]
    if "identity" in problems and config.ridge is None and ((t - h) ** 2).sum() < errors[best]:
        return _Found(np.eye(h.shape[1]), None, np.zeros(h.shape[1]), np.inf, "identity", t - h)
    chosen = problems[prior]
    left_out = chosen.left_out(ridge * unit)
    if config.rank is not None:
        left, right, directions, rank_error = chosen.smaller(ridge * unit, config.rank)
        left_out = chosen.t - (chosen.t - left_out) @ directions @ directions.T
        w = left @ right
        return _Found(w, (left, right), mean_t - w @ mean_h, ridge, prior, left_out, rank_error)
    left, right = (chosen.gains(ridge * unit)[:, None] * chosen.c).T, chosen.v
    w = left @ right + (np.eye(h.shape[1]) if prior == "identity" else 0)
    return _Found(w, (left, right) if prior == "mean" else None, mean_t - w @ mean_h, ridge, prior, left_out)
