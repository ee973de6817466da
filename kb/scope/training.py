"""Fits the light head, or a threshold, on pairs of questions. Minutes on a CPU; needs torch for the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Decider
from kb.scope.features import NAMES, features
from kb.scope.head import HeadDecider, Layer
from kb.scope.pairs import Encoded, Situation, situations
from kb.scope.threshold import Judged, ThresholdDecider, calibrate
from kb.scope.words import Rarity

PROJECTED = 128
TEMPERATURE = 0.05
HIDDEN = (48, 16)
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
    """Projection, then network, then the point at which held-out near misses fire in this share of cases."""
    order = np.random.default_rng(seed).permutation(len(encoded.groups))
    held = max(int(HELD_OUT * len(order)), 10)
    rarity = Rarity.of(text for group in encoded.groups for text, _ in group.questions)
    fit, rest = encoded.part(order[held:]), encoded.part(order[:held])
    report("learning a projection that tells facts apart")
    projection = fit_projection(fit, seed)
    report("reading pairs and their near misses")
    rows, labels = _table(list(situations(fit, per_group=12, seed=seed)), rarity, projection)
    mean, scale = rows.mean(axis=0), rows.std(axis=0) + 1e-3
    report(f"learning the decision from {len(rows)} pairs")
    layers = fit_network((rows - mean) / scale, labels, seed)
    head = HeadDecider(encoder, rarity, projection, mean, scale, layers)
    near = [each for each in situations(rest, per_group=24, seed=seed + 1) if not each.matches.any()]
    best = [head.logits(features(each.question, each.candidates, rarity, projection)).max() for each in near]
    shift = float(np.quantile(best, 1 - false_fires))
    last = Layer(layers[-1].weights, layers[-1].biases - np.float32(shift))
    return HeadDecider(encoder, rarity, projection, mean, scale, (*layers[:-1], last))


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


def fit_network(rows: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Layer, ...]:
    """Layers of HIDDEN units with ReLU, by cross-entropy; `rows` float32 [pairs, features], `labels` bool [pairs]."""
    import torch

    torch.manual_seed(seed)
    widths = (rows.shape[1], *HIDDEN, 1)
    modules: list[Any] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        modules += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    network = torch.nn.Sequential(*modules[:-1])
    x, y = torch.from_numpy(np.asarray(rows, np.float32)), torch.from_numpy(labels.astype(np.float32))
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    epochs, size = 30, 512
    steps = epochs * -(-len(x) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x)), size):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(x[batch])[:, 0], y[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    linear = [each for each in network if isinstance(each, torch.nn.Linear)]
    return tuple(Layer(each.weight.detach().numpy().T.copy(), each.bias.detach().numpy().copy()) for each in linear)


def _table(asked: Sequence[Situation], rarity: Rarity, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [pairs, len(NAMES)] and labels [pairs] of all candidates."""
    rows = [features(each.question, each.candidates, rarity, projection) for each in asked]
    table = np.concatenate(rows)
    assert table.shape[1] == len(NAMES)
    return table, np.concatenate([each.matches for each in asked])
