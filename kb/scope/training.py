"""Fits the light head, or a threshold, on pairs of questions. Minutes on a CPU; needs torch for the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Decider
from kb.scope.features import features
from kb.scope.head import HeadDecider
from kb.scope.pairs import Encoded, situations
from kb.scope.threshold import Judged, ThresholdDecider, calibrate
from kb.scope.words import Rarity

PROJECTED = 128
TEMPERATURE = 0.05
PENALTY = 1e-4
PER_GROUP = 16
"""Situations that are made of each group."""
HELD_OUT = 0.15
"""Share of the groups that the threshold of the decision is set on."""
Report = Callable[[str], None]


class Quality(NamedTuple):
    """On held-out groups: questions about a fact that were taken to be, with the right one; and those that were, with
    their own fact left out.
    """

    recall: float
    false_fires: float


def fit_threshold(encoded: Encoded, encoder: EncoderIdentity, *, false_fires: float, seed: int = 0) -> ThresholdDecider:
    """A threshold for each pair of languages with this share of near misses above it."""
    judged = []
    for each in situations(encoded, per_group=12, seed=seed):
        for candidate, match in zip(each.candidates, each.matches, strict=True):
            cosine = float(candidate.vector @ each.question.vector)
            judged.append(Judged(each.question.language, candidate.language, cosine, bool(match)))
            if not match:
                # Only the nearest near miss can be taken for the fact.
                break
    return calibrate(judged, encoder, false_fires=false_fires)


def fit_head(
    encoded: Encoded, encoder: EncoderIdentity, *, false_fires: float, report: Report, seed: int = 0
) -> HeadDecider:
    """Projection, then weights, then the point at which held-out near misses fire in this share of cases.

    Each is fitted on groups of its own: what a projection has learned by heart would teach the weights to trust it.
    """
    order = np.random.default_rng(seed).permutation(len(encoded.groups))
    held, half = max(int(HELD_OUT * len(order)), 10), len(order) // 2
    rarity = Rarity.of(text for group in encoded.groups for text, _ in group.questions)
    report("learning a projection that tells facts apart")
    projection = fit_projection(encoded.part(order[:half]), seed)
    report("reading pairs and their near misses")
    asked = list(situations(encoded.part(order[half:-held]), per_group=PER_GROUP, seed=seed))
    rows = np.concatenate([features(each.question, each.candidates, rarity, projection) for each in asked])
    labels = np.concatenate([each.matches for each in asked])
    report(f"learning the decision from {len(rows)} pairs")
    weights = fit_weights(rows, labels)
    near = situations(encoded.part(order[-held:]), per_group=2 * PER_GROUP, seed=seed + 1)
    best = [
        float((features(each.question, each.candidates, rarity, projection) @ weights).max())
        for each in near
        if not each.matches.any()
    ]
    bias = -float(np.quantile(best, 1 - false_fires))
    return HeadDecider(encoder, rarity, projection, weights, bias)


def quality(decider: Decider, encoded: Encoded, seed: int = 2) -> Quality:
    """What the decider makes of these groups."""
    right, wrong = [], []
    for each in situations(encoded, per_group=12, seed=seed):
        judged = decider.probabilities(each.question, each.candidates)
        fires = judged.max() >= 0.5
        if each.matches.any():
            right.append(fires and each.matches[int(judged.argmax())])
        else:
            wrong.append(fires)
    return Quality(float(np.mean(right)), float(np.mean(wrong)))


def fit_projection(encoded: Encoded, seed: int) -> np.ndarray:
    """float32 [dimension, PROJECTED] that brings a group's questions together and others apart: InfoNCE over batches
    (van den Oord et al. 2018, equation 4) of two questions of each group.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    dimension = encoded.vectors[0].shape[1]
    matrix = torch.empty(dimension, min(PROJECTED, dimension))
    torch.nn.init.orthogonal_(matrix, generator=generator)
    matrix.requires_grad_()
    optimiser = torch.optim.AdamW([matrix], lr=2e-3, weight_decay=1e-2)
    for _ in range(250):
        numbers = random.permutation(len(encoded.groups))[:512]
        picks = [(encoded.vectors[n], random.choice(len(encoded.vectors[n]), 2, replace=False)) for n in numbers]
        one, other = (torch.from_numpy(np.stack([rows[pick[side]] for rows, pick in picks])) for side in (0, 1))
        projected = [torch.nn.functional.normalize(each @ matrix, dim=1) for each in (one, other)]
        logits = projected[0] @ projected[1].T / TEMPERATURE
        truth = torch.arange(len(logits))
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(logits, truth) + cross_entropy(logits.T, truth)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return np.asarray(matrix.detach().numpy())


def fit_weights(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 [features]: logistic regression on standardised features, L2-regularised. `labels` is bool [pairs]."""
    import torch

    mean, scale = rows.mean(axis=0), rows.std(axis=0) + 1e-3
    x = torch.from_numpy(np.asarray((rows - mean) / scale, np.float32))
    y = torch.from_numpy(labels.astype(np.float32))
    weights = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights + bias, y)
        value = entropy + PENALTY * (weights**2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return np.asarray(weights.detach().numpy() / scale, np.float32)
