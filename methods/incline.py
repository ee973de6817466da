"""Inference-time cross-lingual intervention: one linear map per layer from a language's states to English ones.

For N translations with states h_i (source language) and t_i (target) of a layer, as the rows of H and T [N, d],

    min_norm:  W = (H^+ T)^T                                  the paper's: least squares without regularisation
    ridge:     W = (H^T (H H^T + lambda I)^-1 T)^T            the default, in its dual form
    x += alpha * W x                                          (`map`)

Wang et al. 2025, "Bridging the language gaps in large language models with inference-time cross-lingual intervention"
(arXiv 2410.12462), eq. 1 to 4. No bias and no centring, as in the paper. The change is added: it is neither a
difference nor a blend, and alpha = 1 about doubles the state.

The paper's closed form inverts H^T H, which is singular for N < d; its code calls `lstsq`, the minimum-norm solution.
That one fits the N sentences exactly and, the nearer N is to d, the worse all others (the paper's figure 3: more data
hurts). Ridge removes this. lambda is given in units of the mean ||h_i||^2, and chosen for each layer by the exact
leave-one-out error, for which a linear smoother needs no second fit: with A = (H H^T + lambda I)^-1, the error on
sentence i of a map fitted without it is (A T)_i / A_ii.

A map has rank min(N, d). `rank` stores the best map of a smaller one instead (reduced-rank ridge regression, Mukherjee
and Zhu 2011, "Reduced rank ridge regression and its kernel extensions"): W projected on the leading right singular
vectors of T smoothed, diag(s / sqrt(s^2 + lambda)) U^T T with H = U diag(s) V^T.

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

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from server.engine.edits import Point

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Component = Literal["hidden", "attention", "ffn", "embedding"]
Pooling = Literal["last", "mean"]
Solver = Literal["ridge", "min_norm"]
Mix = Literal["none", "source_first", "target_first"]

POINTS: dict[Component, Point] = {
    "hidden": "resid_post",
    "attention": "attn_out",
    "ffn": "mlp_out",
    "embedding": "resid_pre",
}
RIDGES: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Tried for each layer, in units of the mean squared length of a source state."""


@dataclass(frozen=True, slots=True)
class Config:
    """`ridge` in units of the mean ||h||^2; None chooses one of RIDGES for each layer. `rank` None stores the map as it
    is. Languages are BCP 47 tags. `default_layers` None are all, as in the paper.
    """

    source_language: str
    target_language: str = "en"
    component: Component = "hidden"
    pooling: Pooling = "last"
    solver: Solver = "ridge"
    ridge: float | None = None
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
    """W of one layer: `matrix` [d, d], or factors `left` [d, rank] and `right` [rank, d] with W = left right.

    `ridge` is the one used, 0 for min_norm. Errors are squared, over sentences left out one at a time, and relative to
    those of predicting the mean target state: `error` of the map as it is stored, `identity_error` of the source state
    itself. `rank_error` is what storing a smaller rank changes of the predictions for the fitted sentences, relative to
    their squared length.
    """

    matrix: Array | None
    left: Array | None
    right: Array | None
    ridge: float
    error: float
    identity_error: float
    rank_error: float

    @property
    def dense(self) -> Array:
        if self.matrix is not None:
            return self.matrix
        assert self.left is not None and self.right is not None
        return self.left @ self.right


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
    if config.solver == "min_norm" and config.ridge is not None:
        raise ValueError("solver min_norm has no ridge: leave it out")
    return [fit_layer(source[:, layer], target[:, layer], config) for layer in range(layers)]


def fit_layer(source: Array, target: Array, config: Config) -> Map:
    """The map of one layer, from states [pairs, d]."""
    h, t = source.astype(np.float64), target.astype(np.float64)
    baseline = ((t - t.mean(0)) ** 2).sum() * (len(t) / (len(t) - 1)) ** 2
    if not h.any() or baseline == 0:
        raise ValueError("the states are all zero, or the target states all equal: the texts don't differ")
    problem = _Problem.of(h, t)
    unit = float((h**2).sum(1).mean())
    if config.solver == "min_norm":
        ridge = 0.0
    elif config.ridge is not None:
        ridge = config.ridge
    else:
        ridge = min(RIDGES, key=lambda each: float((problem.left_out(each * unit) ** 2).sum()))
    return _stored(problem, ridge, unit, baseline, h, t, config.rank)


@dataclass(frozen=True, slots=True)
class _Problem:
    """H = u diag(s) v, thin, and T with its coordinates c = u^T T."""

    u: Float64
    s: Float64
    v: Float64
    t: Float64
    c: Float64

    @classmethod
    def of(cls, h: Float64, t: Float64) -> _Problem:
        u, s, v = np.linalg.svd(h, full_matrices=False)
        return cls(u, s, v, t, u.T @ t)

    @property
    def _kept(self) -> npt.NDArray[np.bool_]:
        """The directions that `lstsq` uses: singular values above its cut-off."""
        cutoff = float(self.s[0]) * np.finfo(np.float64).eps * max(len(self.u), self.v.shape[1])
        kept: npt.NDArray[np.bool_] = self.s > cutoff
        return kept

    def gains(self, ridge: float) -> Float64:
        """W = (v^T diag(gains) c)^T."""
        if ridge > 0:
            return self.s / (self.s**2 + ridge)
        return np.divide(1.0, self.s, out=np.zeros_like(self.s), where=self._kept)

    def left_out(self, ridge: float) -> Float64:
        """The error [N, d] on each sentence of the map fitted to the others: (A T)_i / A_ii.

        A = u diag(a) u^T + b (I - u u^T); without ridge, A up to a factor that cancels, as ridge goes to 0.
        """
        inside, outside = self._weights(ridge)
        at = self.u @ (inside[:, None] * self.c)
        diagonal = self.u**2 @ inside
        if len(self.u) > len(self.s):
            at += outside * (self.t - self.u @ self.c)
            diagonal += outside * (1 - (self.u**2).sum(1))
        return at / diagonal[:, None]

    def _weights(self, ridge: float) -> tuple[Float64, float]:
        if ridge > 0:
            return 1 / (self.s**2 + ridge), 1 / ridge
        kept = self._kept
        if kept.all() and len(self.u) == len(self.s):
            return 1 / self.s**2, 0.0
        return (~kept).astype(np.float64), 1.0


def _stored(
    problem: _Problem, ridge: float, unit: float, baseline: float, h: Float64, t: Float64, rank: int | None
) -> Map:
    gains = problem.gains(ridge * unit)
    predicted_left_out = t - problem.left_out(ridge * unit)
    left, right = (gains[:, None] * problem.c).T, problem.v
    rank_error = 0.0
    if rank is not None:
        directions = _leading(problem, ridge * unit, rank)
        predicted = problem.u @ ((problem.s * gains)[:, None] * problem.c)
        lost = predicted - predicted @ directions @ directions.T
        rank_error = float((lost**2).sum() / (predicted**2).sum())
        predicted_left_out = predicted_left_out @ directions @ directions.T
        left, right = directions, directions.T @ left @ right
    factored = rank is not None or 2 * left.shape[1] < len(left)
    return Map(
        matrix=None if factored else (left @ right).astype(np.float32),
        left=left.astype(np.float32) if factored else None,
        right=right.astype(np.float32) if factored else None,
        ridge=ridge,
        error=float(((t - predicted_left_out) ** 2).sum() / baseline),
        identity_error=float(((t - h) ** 2).sum() / baseline),
        rank_error=rank_error,
    )


def _leading(problem: _Problem, ridge: float, rank: int) -> Float64:
    """The `rank` directions [d, rank] of the target space that keep most of the fit."""
    gains = problem.gains(ridge)
    weights = problem.s / np.sqrt(problem.s**2 + ridge) if ridge > 0 else (gains > 0).astype(np.float64)
    _, _, directions = np.linalg.svd(weights[:, None] * problem.c, full_matrices=False)
    leading: Float64 = directions[:rank].T
    return leading
