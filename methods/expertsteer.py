"""ExpertSteer (Wang et al. 2025): steer a model along what another model, the expert, knows.

With h^E_i [width of E] and h^T_j [width of T] the states of expert layer i and target layer j at a text's last token:

1. Alignment. One auto-encoder per expert layer, f(h) = A h + a [width of T], g(z) = B z + b, each affine, trained to
   reconstruct the expert's states: min mean ||h - g(f(h))||^2.
2. Layer pairs. MI(i, j) = the mean over texts of I(f_i(h^E); h^T_j), the coordinates of one text's two states being the
   samples of a pair of scalars, each scaled to a variance of 1; the P pairs with the least are chosen.
3. Vector. nu_i = the direction, of length 1, of a Recursive Feature Machine (methods/rfm.py) on the expert's own states
   of positive and negative texts.

and steering adds epsilon f_i(nu_i) (nu_i where the widths agree) to the residual stream after layer j, at every token;
where several pairs share j, their sum. P is searched in 1..10 and epsilon in 1, 2, 4 ... 16; too much of either
destroys the model, so that tuning them is part of the method.

The mutual information is Kraskov, Stoegbauer and Grassberger's first estimator (2004), in nats, with 3 neighbours:

    I = psi(k) + psi(n) - mean_c [psi(n_x(c)) + psi(n_y(c))]

n_x(c) and n_y(c) counting, with c itself, the points nearer to c in x, and in y, than its k-th neighbour by max-norm.

An auto-encoder that only has to reconstruct the expert is free up to an invertible map: nothing ties a coordinate of
f(h^E) to the same coordinate of the target. So every claim needs its controls, which this file fits as well: `random`
(a random vector of the same length at the same layers), `least_squares` (the map that takes the expert's states to the
target's on the same texts, with ridge, in place of f; its vectors have f(nu)'s length, so that only the direction
differs), and `self_expert` (the target as its own expert, where widths agree).

Not stated by the paper, and chosen here: tokens, kernel, bandwidth and sign (methods/rfm.py), the auto-encoder's
training (AdamW, learning rate 1e-3, batches of 256, at most 1600 steps, stopped when a held-out tenth gets no better or
loses 1%; A and B orthogonal at first, so that it begins as a projection), the bias of f (`affine`: f(nu) = A nu + a as
printed; otherwise A nu, which is what a difference of states becomes). It is trained on states minus their mean m, over
their scale s: a few directions that all states share would otherwise be most of the loss. g's bias takes both back:
with z = A (h - m) / s + a, s z and f(h) = A h + a differ by a constant, which B z + b can hold. So nu, of length 1,
keeps about its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numba  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import torch

from methods import extractors, rfm

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Alignment = Literal["auto_encoder", "least_squares"]
Progress = Callable[[int, int], None]
"""Takes (layers done, of how many)."""

STEPS, LEAST, PATIENCE, CHECK_EVERY, BATCH, LEARNING_RATE = 1600, 200, 100, 10, 256, 1e-3
"""Of the auto-encoder's training: at most and at least so many steps; ended once none of PATIENCE was better."""
ENOUGH = 0.01
"""A share of the variance that may be lost: there is no use in training further."""
EULER = 0.5772156649015329


@dataclass(frozen=True, slots=True)
class Config:
    """`pairs` is the paper's P; `mutual_information_texts` its K for step 2; `neighbours` the estimator's k."""

    pairs: int = 3
    alignment: Alignment = "auto_encoder"
    affine: bool = True
    neighbours: int = 3
    mutual_information_texts: int = 500
    ridge: float = 0.1
    seed: int = 0
    rfm: rfm.Config = rfm.Config()


class LayerPair(NamedTuple):
    """Layers of the expert and the target, and their mutual information in nats."""

    expert: int
    target: int
    mutual_information: float


@dataclass(frozen=True)
class Fit:
    """`vectors`: by target layer, [width of T], for epsilon = 1. `mutual_information` [expert layers, target layers].

    `unexplained` [expert layers]: the auto-encoders' error on held-out states, as a share of their variance.
    `correlations`: by expert layer of a pair, of its states along nu with the labels; below `extractors.STEERABLE` the
    vector's sign has no meaning.
    """

    vectors: dict[int, Array]
    pairs: tuple[LayerPair, ...]
    mutual_information: Array
    unexplained: Array
    correlations: dict[int, float]


@dataclass(frozen=True, slots=True)
class AutoEncoder:
    """f(h) = A h + a with A [out, in]; `unexplained`: held-out squared error of g(f(h)) as a share of the variance."""

    matrix: Array
    offset: Array
    unexplained: float

    def __call__(self, states: Array) -> Array:
        """[texts, out] of [texts, in]."""
        aligned: Array = states @ self.matrix.T + self.offset
        return aligned


def fit(
    positive: Array, negative: Array, target: Array, config: Config, progress: Progress = lambda done, total: None
) -> Fit:
    """Fit from states at the last token, float32: of the expert, [n, expert layers, width of E] for positive and [m,
    ...] for negative texts; and of the target for the positive texts, [n, target layers, width of T].

    ValueError for shapes that don't fit together, more pairs than there are, or too few texts.
    """
    extractors.check_shapes(positive, negative, paired=False)
    if target.ndim != 3 or len(target) != len(positive):
        raise ValueError(f"need the target's states of the {len(positive)} positive texts, got {target.shape}")
    layers, targets = positive.shape[1], target.shape[1]
    if not 1 <= config.pairs <= layers * targets:
        raise ValueError(f"pairs {config.pairs} must be between 1 and the {layers * targets} that there are")
    encoders, information = [], np.empty((layers, targets), np.float32)
    progress(0, layers)
    for layer in range(layers):
        encoder = auto_encoder(positive[:, layer], target.shape[2], config.seed)
        some = slice(config.mutual_information_texts)
        information[layer] = _pair_information(encoder(positive[some, layer]), target[some], config.neighbours)
        encoders.append(encoder)
        progress(layer + 1, layers)
    chosen = _least(information, config.pairs)
    found = {pair.expert: rfm.fit(positive[:, pair.expert], negative[:, pair.expert], config.rfm) for pair in chosen}
    vectors: dict[int, Array] = {}
    for pair in chosen:
        direction, encoder = found[pair.expert].direction, encoders[pair.expert]
        same = positive.shape[2] == target.shape[2]
        vector = direction if same else _encoded(encoder, direction, config.affine)
        if config.alignment == "least_squares":
            mapping = least_squares(positive[:, pair.expert], target[:, pair.target], config.ridge)
            vector = _with_length(mapping @ direction, float(np.linalg.norm(vector)))
        vectors[pair.target] = vectors.get(pair.target, np.zeros_like(vector)) + vector
    return Fit(
        vectors,
        chosen,
        information,
        np.array([encoder.unexplained for encoder in encoders], np.float32),
        {layer: each.correlation for layer, each in found.items()},
    )


def self_expert(positive: Array, negative: Array, config: Config) -> Fit:
    """The control in which the target is its own expert: [n, layers, width] and [m, layers, width]."""
    return fit(positive, negative, positive, config)


def random_vectors(vectors: dict[int, Array], seed: int) -> dict[int, Array]:
    """The control with random directions, as long and at the same layers."""
    rng = np.random.default_rng(seed)
    return {
        layer: _with_length(rng.standard_normal(vector.shape).astype(np.float32), float(np.linalg.norm(vector)))
        for layer, vector in sorted(vectors.items())
    }


def least_squares(expert: Array, target: Array, ridge: float) -> Array:
    """W [width of T, width of E] of min ||W h^E - h^T||^2 + lambda ||W||^2 over the states' deviations from their
    means, lambda being `ridge` times the mean square of the expert's coordinates, times the texts.
    """
    x, y = (each - each.mean(axis=0) for each in (expert.astype(np.float64), target.astype(np.float64)))
    gram = x @ x.T
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / x.shape[1]
    solved: Array = (np.linalg.solve(gram, y).T @ x).astype(np.float32)
    return solved


def auto_encoder(states: Array, width: int, seed: int) -> AutoEncoder:
    """Train f and g on states [texts, in]. ValueError for fewer than 10 texts, or states that are all the same."""
    if len(states) < 10:
        raise ValueError(f"an auto-encoder needs at least 10 texts, got {len(states)}")
    order = np.random.default_rng(seed).permutation(len(states))
    held_out, train = states[order[: len(states) // 10]], states[order[len(states) // 10 :]]
    mean = train.mean(0, dtype=np.float64)
    scale = float(np.sqrt(np.square(train - mean).mean()))
    if scale == 0:
        raise ValueError("the expert's states are all the same; there is nothing to align")
    scaled = [torch.from_numpy(((part - mean) / scale).astype(np.float32)) for part in (train, held_out)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = torch.nn.Linear(states.shape[1], width), torch.nn.Linear(width, states.shape[1])
        torch.nn.init.orthogonal_(encoder.weight)
        with torch.no_grad():
            decoder.weight.copy_(encoder.weight.T)
            decoder.bias.copy_(-(decoder.weight @ encoder.bias))
        unexplained = _train(encoder, decoder, *scaled)
    matrix: Array = encoder.weight.detach().numpy()
    return AutoEncoder(matrix, encoder.bias.detach().numpy(), unexplained)


def mutual_information(x: Float64, y: Float64, neighbours: int = 3) -> float:
    """In nats, of samples x [n] and y [n] of two scalars. ValueError unless there are more samples than neighbours.

    It can come out a little below 0. Samples that are equal count as nearer than any distance but 0.
    """
    if x.shape != y.shape or x.ndim != 1 or not 0 < neighbours < len(x):
        raise ValueError(f"need two series of more than {neighbours} samples, got {x.shape} and {y.shape}")
    return float(_ksg(np.ascontiguousarray(x), np.ascontiguousarray(y), neighbours, _digamma(len(x))))


def _pair_information(aligned: Array, target: Array, neighbours: int) -> Float64:
    """[target layers]: averaged over texts, for aligned [texts, width] and target [texts, layers, width]."""
    table = _digamma(aligned.shape[1])
    total = np.zeros(target.shape[1])
    for x, states in zip(_standard(aligned), _standard(target), strict=True):
        total += [_ksg(x, y, neighbours, table) for y in states]
    return total / len(aligned)


def _standard(states: Array) -> Float64:
    """Each state's coordinates [..., width] with a variance of 1: the estimator is biased by unequal ones, and that of
    f is an accident of its training.
    """
    wide = states.astype(np.float64)
    scaled: Float64 = wide / np.maximum(wide.std(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return scaled


def _least(information: Array, count: int) -> tuple[LayerPair, ...]:
    order = np.argsort(information, axis=None, kind="stable")[:count]
    return tuple(
        LayerPair(int(i), int(j), float(information[i, j]))
        for i, j in zip(*np.unravel_index(order, information.shape), strict=True)
    )


def _encoded(encoder: AutoEncoder, direction: Array, affine: bool) -> Array:
    linear: Array = encoder.matrix @ direction
    return linear + encoder.offset if affine else linear


def _with_length(vector: Array, length: float) -> Array:
    return vector * np.float32(length / np.linalg.norm(vector))


def _train(encoder: torch.nn.Linear, decoder: torch.nn.Linear, train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Leaves the best weights in place, and returns their squared error on the held-out states as a share of the
    variance.
    """
    modules = torch.nn.Sequential(encoder, decoder)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE)
    variance = float(held_out.square().sum())

    def lost() -> float:
        with torch.no_grad():
            return float((held_out - modules(held_out)).square().sum()) / variance

    best, found_at, step = lost(), 0, 0
    state = {name: value.clone() for name, value in modules.state_dict().items()}
    batches: Iterator[torch.Tensor] = iter(())
    while step < STEPS and best > ENOUGH and (step < LEAST or step - found_at < PATIENCE):
        batch = next(batches, None)
        if batch is None:
            batches = iter(torch.split(train[torch.randperm(len(train))], BATCH))
            continue
        optimizer.zero_grad()
        loss = (batch - modules(batch)).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        step += 1
        if step % CHECK_EVERY == 0 and (error := lost()) < 0.999 * best:
            best, found_at = error, step
            state = {name: value.clone() for name, value in modules.state_dict().items()}
    modules.load_state_dict(state)
    return best


def _digamma(most: int) -> Float64:
    """psi(0..most) at whole numbers; the first is never read."""
    return np.concatenate([[np.nan, -EULER], -EULER + np.cumsum(1 / np.arange(1, most))])


@numba.njit  # type: ignore[untyped-decorator]
def _nearer(ordered: Float64, centre: float, radius: float) -> int:
    """How many are less than `radius` from the centre. The differences are compared: centre + radius rounds."""
    first, end = 0, len(ordered)
    while first < end:
        middle = (first + end) // 2
        first, end = (middle + 1, end) if centre - ordered[middle] >= radius else (first, middle)
    low, end = first, len(ordered)
    while first < end:
        middle = (first + end) // 2
        first, end = (middle + 1, end) if ordered[middle] - centre < radius else (first, middle)
    return first - low


@numba.njit  # type: ignore[untyped-decorator]
def _ksg(x: Float64, y: Float64, neighbours: int, digamma: Float64) -> float:
    """Walks outwards from each point in the order of x until no nearer one can follow."""
    n = len(x)
    order = np.argsort(x)
    ordered, values, sorted_y = x[order], y[order], np.sort(y)
    nearest = np.empty(neighbours)
    total = 0.0
    for c in range(n):
        nearest[:] = np.inf
        low, high = c - 1, c + 1
        while low >= 0 or high < n:
            left = ordered[c] - ordered[low] if low >= 0 else np.inf
            right = ordered[high] - ordered[c] if high < n else np.inf
            if min(left, right) >= nearest[-1]:
                break
            other = low if left <= right else high
            distance = max(min(left, right), abs(values[other] - values[c]))
            low, high = (low - 1, high) if left <= right else (low, high + 1)
            place = neighbours - 1
            if distance < nearest[place]:
                while place > 0 and nearest[place - 1] > distance:
                    nearest[place] = nearest[place - 1]
                    place -= 1
                nearest[place] = distance
        radius = nearest[-1]
        for series, centre in ((ordered, ordered[c]), (sorted_y, values[c])):
            total += digamma[max(_nearer(series, centre, radius), 1)]
    return float(digamma[neighbours] + digamma[n] - total / n)
